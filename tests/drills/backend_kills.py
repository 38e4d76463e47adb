"""kill -9 of a process that changes an index without end, over and over: state and cursor agree every time.

    .venv/bin/python -m tests.drills.backend_kills --backend lmdb --kills 200

Opening is killed too, and what a killed opening leaves. After every kill the whole index is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.backends.crashing import CrashTest
from tests.backends.test_crash import PERSISTENT
from tests.valkey_servers import with_server

UP_S = 0.5
OPENING_KILLS = 0.15
"""Share of the kills that come so soon that they mostly hit the opening. As many are followed by no check."""
OPENING_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options", type=json.loads, help="JSON, instead of those of tests/backends/test_crash.py")
    parser.add_argument("--up-s", type=float, default=UP_S, help="no process lives longer after it has opened")
    parser.add_argument("--may-lose-last", action="store_true", help="do not ask for every batch that returned")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    options = arguments.options
    if options is None:
        options = with_server(arguments.backend, PERSISTENT.get(arguments.backend, {}))
    began = time.monotonic()
    checks: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        test = CrashTest(arguments.backend, Path(place), options, keeps_last=not arguments.may_lose_last)
        for kill in range(1, arguments.kills + 1):
            opening = chance.random() < OPENING_KILLS
            test.kill(chance.uniform(0, OPENING_S if opening else arguments.up_s), opening=opening)
            if chance.random() < OPENING_KILLS:
                continue
            started = time.monotonic()
            test.check()
            checks.append(time.monotonic() - started)
            if kill % 20 == 0:
                print(f"{kill} kills, batch {test.reached}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        test.check()
    report = {
        "backend": arguments.backend,
        "kills": arguments.kills,
        "batches": test.reached + 1,
        "checks": len(checks) + 1,
        "returned_and_lost": test.lost,
        "killed_between_call_and_batch": test.between,
        "disagreements": 0,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
