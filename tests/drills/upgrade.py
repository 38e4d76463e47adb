"""Upgrade, rollback, a rolling upgrade of two daemons, and a change of schema, with real versions and a busy engine.

    .venv/bin/python tests/drills/upgrade.py [--commit COMMIT]

The previous version is the wheel of an older commit with the same schema, in a virtual environment of its own; the
present one is what this interpreter has installed; the next one is the last commit with its schema patched. A simulated
engine publishes all the time, also while no daemon runs. Needs git and a package index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine
from kvcensus.daemon.simulate.rank import RankOptions
from tests.drills.source import Source, assert_equal
from tests.end_to_end.daemon_process import DaemonProcess, wait_until

ROOT = Path(__file__).parents[2]
PREVIOUS = "5751188"
EXIT_DATA = 65
RING = 200_000
EVENTS_PER_S = 400.0
MESSAGES_BETWEEN = 200
WAIT_S = 60.0
ROUTER_S = 0.01
SCHEMA_FILE = Path("backends/lmdb/rows.py")


def installed(place: Path, commit: str, patch: Callable[[Path], None] = lambda tree: None) -> str:
    """The interpreter of a virtual environment that has the wheel of a commit."""
    tree, environment = place / "tree", place / "venv"
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    patch(tree)
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(place), str(tree)], check=True)
    subprocess.run([*pip, "install", *map(str, place.glob("*.whl"))], check=True)
    return python


def bump_schema(tree: Path) -> None:
    text = (tree / SCHEMA_FILE).read_text()
    assert text.count("\nSCHEMA = 1\n") == 1
    (tree / SCHEMA_FILE).write_text(text.replace("\nSCHEMA = 1\n", "\nSCHEMA = 2\n"))


class Versioned(DaemonProcess):
    """A daemon whose version can be changed while it is stopped."""

    def run_by(self, python: str) -> None:
        self._command[0] = python


def daemon_of(directory: Path, python: str, *engines: SimulatedEngine) -> Versioned:
    directory.mkdir(exist_ok=True)
    sources = "".join(
        f"[[sources]]\nname = '{one.name}'\nendpoint = 'tcp://127.0.0.1:{one.base_port}'\n"
        f"replay_endpoint = 'tcp://127.0.0.1:{one.replay_port}'\n"
        for one in engines
    )
    (directory / "kvcensus.toml").write_text(sources)
    daemon = Versioned(directory, "--config", str(directory / "kvcensus.toml"))
    daemon.run_by(python)
    return daemon


def check(daemon: DaemonProcess, source: Source) -> None:
    """The index is what the engine holds; nothing was lost or applied twice, in the first life that was met."""
    source.pause()
    assert_equal(daemon, source.rank)
    stream = daemon.stream()
    counted = (stream["messages"], stream["blocks_stored"], stream["blocks_removed"])
    assert counted == (source.messages, source.stored, source.removed), (counted, vars(source))
    assert (stream["trust"], stream["epoch"]) == ("fresh", 1), stream
    source.resume()


def published_more(source: Source) -> None:
    before = source.messages
    wait_until(lambda: source.messages > before + MESSAGES_BETWEEN, "the engine publishes", WAIT_S)


def upgrade_and_rollback(place: Path, previous: str, source: Source, engine: SimulatedEngine) -> Versioned:
    """Back and forth, each time once stopped and once killed; the engine publishes while nobody listens."""
    daemon = daemon_of(place / "one", previous, engine)
    daemon.start()
    for python, name in ((sys.executable, "upgrade"), (previous, "rollback")) * 2:
        published_more(source)
        check(daemon, source)
        published_more(source)
        killed = name == "rollback"
        if killed:
            daemon.kill()
        else:
            assert daemon.terminate() == 0
        published_more(source)
        daemon.run_by(python)
        daemon.start()
        check(daemon, source)
        told(f"{name} after {'kill -9' if killed else 'a stop'}: {source.messages} messages, each applied once")
    return daemon


class Router:
    """Asks the daemons in turn for blocks that one worker holds all the time, and wants a whole answer from one."""

    def __init__(self, daemons: list[DaemonProcess], worker: str, hashes: tuple[bytes, ...]) -> None:
        self._daemons, self._worker, self._hashes = daemons, worker, hashes
        self.asked = self.gaps = self.second = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _answers(self, daemon: DaemonProcess) -> bool:
        try:
            return daemon.match(self._hashes).get(self._worker) == len(self._hashes)
        except (OSError, AssertionError):
            return False

    def _ask(self) -> None:
        while not self._end.wait(ROUTER_S):
            first, second = (self._answers(one) for one in self._daemons)
            self.asked += 1
            self.gaps += not (first or second)
            self.second += second and not first

    def __enter__(self) -> Router:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def rolling_upgrade(place: Path, previous: str, source: Source, engine: SimulatedEngine) -> None:
    with quiet_engine() as (quiet, hashes):
        daemons = [daemon_of(place / name, previous, engine, quiet) for name in ("a", "b")]
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            until_fresh(daemon)
        with Router([*daemons], quiet.ranks[0].worker_id, hashes) as router:
            for daemon in daemons:
                assert daemon.terminate() == 0
                published_more(source)
                daemon.run_by(sys.executable)
                daemon.start()
                until_fresh(daemon)
        assert router.gaps == 0, vars(router)
        assert router.second > 0, vars(router)
        source.pause()
        for daemon in daemons:
            wait_until(
                lambda daemon=daemon: daemon.streams()[engine.name]["messages"] == source.messages, "caught up", WAIT_S
            )
            truth = source.rank.truth()
            held = {key for blocks in truth.held.values() for key in blocks}
            assert daemon.copies()[engine.ranks[0].worker_id].keys() == held
            assert daemon.terminate() == 0
        source.resume()
    told(
        f"rolling upgrade of two: {router.asked} asks, {router.second} of them answered by the other one alone, no gap"
    )


@contextmanager
def quiet_engine() -> Iterator[tuple[SimulatedEngine, tuple[bytes, ...]]]:
    """An engine that has published and rests, and the hashes of a chain that it holds."""
    with SimulatedEngine(EngineOptions("quiet", 2, rank=RankOptions(cache=CacheOptions(blocks=512)))) as engine:
        while True:
            engine.ranks[0].publish()
            for held in engine.ranks[0].truth().held.values():
                for block_hash, _ in held:
                    yield engine, (block_hash,)
                    return


def until_fresh(daemon: DaemonProcess) -> None:
    wait_until(
        lambda: (
            len(daemon.streams()) > 1
            and all(one["trust"] == "fresh" and one["messages"] for one in daemon.streams().values())
        ),
        "every worker is fresh",
        WAIT_S,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".mdb"}


def change_of_schema(place: Path, following: str, source: Source, daemon: Versioned, engine: SimulatedEngine) -> None:
    """The refusal, the way back, and both ways across: through another backend, and a new directory with replay."""
    data = daemon.directory / "data"
    assert daemon.terminate() == 0
    before = contents(data)
    assert before
    daemon.run_by(following)
    daemon.start(wait=False)
    assert daemon.process is not None
    assert daemon.process.wait(WAIT_S) == EXIT_DATA
    assert contents(data) == before
    told(f"schema 2 refuses an index of schema 1: exit {EXIT_DATA}, {', '.join(before)} byte-equal")

    daemon.run_by(sys.executable)
    daemon.start()
    check(daemon, source)
    told("going back: the old version goes on with the old directory")

    assert daemon.terminate() == 0
    copied, moved = place / "copied", place / "moved"
    run(sys.executable, "backend", "copy", f"lmdb:{data}", f"filesystem:{copied}")
    moved.mkdir()
    run(following, "backend", "copy", f"filesystem:{copied}", f"lmdb:{moved / 'data'}")
    for directory, name in ((moved, "copied through `filesystem`"), (place / "anew", "a new directory, replayed")):
        one = daemon_of(directory, following, engine)
        one.start()
        check(one, source)
        assert one.terminate() == 0
        told(f"schema 2, {name}: equal, each message applied once")


def run(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "kvcensus.daemon.cli", *arguments], check=True, stderr=subprocess.DEVNULL)


def told(step: str) -> None:
    print(f"ok  {step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=PREVIOUS, help="The previous version.")
    arguments = parser.parse_args()
    options = EngineOptions("w", 1, rank=RankOptions(cache=CacheOptions(blocks=4096)), buffer_steps=RING)
    with tempfile.TemporaryDirectory() as name, SimulatedEngine(options) as engine:
        place = Path(name)
        previous = installed(place / "previous", arguments.commit)
        following = installed(place / "next", "HEAD", bump_schema)
        told(f"installed {arguments.commit} and HEAD with schema 2")
        source = Source(engine.ranks[0], events_per_s=EVENTS_PER_S)
        daemon = upgrade_and_rollback(place, previous, source, engine)
        change_of_schema(place, following, source, daemon, engine)
        rolling_upgrade(place, previous, source, engine)
        source.pause()


if __name__ == "__main__":
    main()
