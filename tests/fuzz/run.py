"""Fuzz the decoders and the HTTP side with mutated real inputs.

    python tests/fuzz/run.py --inputs 1000000                 every target
    python tests/fuzz/run.py --target http --minutes 30

The exit code is 1 when anything raised or hung; such inputs are kept in tests/fuzz/corpus, which pytest replays.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="Only this target; may repeat.")
    parser.add_argument("--inputs", type=int, default=0, help="Inputs for each target.")
    parser.add_argument("--minutes", type=float, default=0, help="Longest time for each target.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="Write the reports here, a line each.")
    asked = parser.parse_args()
    if not asked.inputs and not asked.minutes:
        parser.error("give --inputs or --minutes")
    logging.disable(logging.CRITICAL)
    failed = False
    for name in asked.target or TARGETS:
        target = TARGETS[name]()
        try:
            report = campaign.run(name, target, asked.seed, asked.inputs, asked.minutes)
        finally:
            target.close()
        failed |= report.failed
        line = msgspec.json.encode(report).decode()
        print(line, flush=True)  # noqa: T201 - the report of the command
        if asked.json:
            with asked.json.open("a") as file:
                file.write(f"{line}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
