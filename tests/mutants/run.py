"""Faults put into the code on purpose, each with the test that must notice it.

    .venv/bin/python tests/mutants/run.py

Each mutant is made in a copy of the tree; the working tree is not touched. Exits with 1 when one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ROOMS = ("backends", "translators", "daemon")
EXAMPLES = "1000"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    test: str


STATE = "daemon/streams/state.py"
MACHINE = "tests/daemon/test_stream_machine.py"
STREAM = "tests/daemon/test_stream_state.py"
WRITER = "tests/daemon/test_writer.py"
SPOOL = "daemon/relay/spool.py"
SPOOLING = "tests/daemon/test_relay_spool.py"
WINDOW = "daemon/relay/window.py"
AWAITING = "tests/daemon/test_relay_window.py"
RELOADING = "tests/end_to_end/test_relay_reload.py"
STARTING = "tests/daemon/test_long_start.py"

MUTANTS = (
    Mutant(
        "live messages are not held while a replay runs",
        STATE,
        "            self._hold(seq, payload)\n            if backwards:\n",
        "            if seq > self.applied:\n                self._accept(seq, payload)\n"
        "                return [*verdicts, Apply(seq, [payload])]\n            if backwards:\n",
        MACHINE,
    ),
    Mutant(
        "the fingerprint of the last applied message is not compared",
        STATE,
        "if expected and fingerprint(payload) != expected:",
        "if False:",
        MACHINE,
    ),
    Mutant(
        "a gap that cannot be filled does not fence",
        STATE,
        "        verdicts.append(self._fence(seq - 1, reason))\n",
        "        self.applied = seq - 1\n",
        MACHINE,
    ),
    Mutant(
        "an end marker alone is taken for continuity",
        STATE,
        'if replay.verify:\n            return self._another_life("the engine no longer',
        'if False:\n            return self._another_life("the engine no longer',
        MACHINE,
    ),
    Mutant(
        "held messages outlive the connection",
        STATE,
        "        self._last_live = None\n        self._held.clear()\n        return self._stop_replay()",
        "        self._last_live = None\n        return self._stop_replay()",
        STREAM,
    ),
    Mutant("an idle engine is not probed", STATE, "0 < self._probe_at_ms <= now_ms", "False", STREAM),
    Mutant(
        "an absent engine keeps its lease for ever",
        STATE,
        "now_ms - self._gone_at_ms < self._limits.lease_ms",
        "True",
        STREAM,
    ),
    Mutant(
        "a new epoch does not clear the worker",
        "daemon/writer.py",
        "        progress = self._progress[stream]\n        self._clear(progress)\n",
        "        progress = self._progress[stream]\n",
        WRITER,
    ),
    Mutant(
        "a fence does not mark the worker",
        "daemon/writer.py",
        "progress.set_trust(Trust.UNTRUSTED, fence.reason)",
        "pass",
        WRITER,
    ),
    Mutant(
        "a removal takes every copy",
        "backends/memory.py",
        "r.ref_count > 1",
        "False",
        "tests/backends/test_conformance.py",
    ),
    Mutant(
        "what the spool drops leaves no fence",
        SPOOL,
        "        for key, head in lost.values():\n            size = self._put_trace(txn, size, key, head)\n",
        "",
        f"{SPOOLING}::test_whatever_happens_the_reader_is_told",
    ),
    Mutant(
        "a record that is acknowledged before an earlier one is forgotten with it",
        WINDOW,
        "        while self._taken and self._taken[0].done:\n",
        "        while self._taken and any(one.done for one in self._taken):\n",
        AWAITING,
    ),
    Mutant(
        "an answer to what was given up counts",
        WINDOW,
        "        self._by_token.clear()\n",
        "",
        AWAITING,
    ),
    Mutant(
        "a reload does not wait until what a changed stream brought is spooled",
        "daemon/relay/service.py",
        "if left and not self._settle(self.streams[left[0]], ended):",
        "if False:",
        f"{RELOADING}::test_a_source_that_is_changed_under_load_loses_and_doubles_nothing",
    ),
    Mutant(
        "a start that stands still asks for more time",
        "daemon/long_start.py",
        "work.processor_s - before.processor_s > waited_s * _IDLE_SHARE",
        "True",
        STARTING,
    ),
    Mutant("a start asks for more time for ever", "daemon/long_start.py", "now_s < self._ends_s and ", "", STARTING),
)


def passes(test: str, mutant: Mutant | None = None) -> bool:
    """Whether a test passes on a copy of the tree, with a mutant in it or without."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "tree")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache"))
        if mutant is not None:
            path = copy / mutant.file
            code = path.read_text()
            if code.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: its code stands {code.count(mutant.old)} times in {mutant.file}")
            path.write_text(code.replace(mutant.old, mutant.new))
        packages = Path(place, "path", "kvcensus")
        packages.mkdir(parents=True)
        for room in ROOMS:
            (packages / room).symlink_to(copy / room)
        environment = os.environ | {"PYTHONPATH": str(packages.parent), "KVCENSUS_STREAM_EXAMPLES": EXAMPLES}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 0


def main() -> None:
    for test in sorted({mutant.test for mutant in MUTANTS}):
        if not passes(test):
            raise SystemExit(f"{test} fails without any mutant")
    survivors = 0
    for mutant in MUTANTS:
        alive = passes(mutant.test, mutant)
        survivors += alive
        print(f"{'SURVIVED' if alive else 'caught  '}  {mutant.name}", flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
