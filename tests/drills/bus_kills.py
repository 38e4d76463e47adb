"""kill -9 of the central daemon, of relays, of servers and of the stream's leader, while a fleet publishes.

    .venv/bin/python tests/drills/bus_kills.py --kills 100 --workers 16 --blocks 1000000

Simulated engines publish all the time. At random moments something is killed, and started again after a random while;
meanwhile others may be killed, but a cluster of three can lose only one server at a time. At the end the central index
must be what the engines hold, copy by copy, with trust, and each worker's counts those of what its engine published.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.drills.bus_stage import JETSTREAM, Stage, bus_stage, run_drill
from tests.end_to_end.daemon_process import DaemonProcess

KINDS = ("central", "relay", "server", "leader")
EVERY_S = 6.0
"""Seconds from a kill to the next on average: a leader's death alone costs the stream four or more."""
DOWN_S = 3.0
WORKERS_PER_RELAY = 4
_LOOK_S = 0.05


class _Down(NamedTuple):
    """Something that was killed, and when and how it comes back."""

    name: str
    at_s: float
    start: Callable[[], object]


class Killer:
    """Kills one thing after the other and starts each again. `kills` counts them by kind."""

    def __init__(self, stage: Stage, generator: random.Random, every_s: float, down_s: float, log: Path) -> None:
        self._stage = stage
        self._random = generator
        self._every_s = every_s
        self._down_s = down_s
        self._down: list[_Down] = []
        self.kills: Counter[str] = Counter()
        self._log = log
        self._began_s = time.monotonic()

    def run(self, kills: int) -> None:
        """As many kills as that, all kinds as often; ends when all is started again."""
        kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
        self._random.shuffle(kinds)
        for number, kind in enumerate(kinds, 1):
            self._idle(self._random.uniform(0, 2 * self._every_s))
            while (victim := self._victim(kind)) is None:
                self._idle(_LOOK_S)
            self._kill(kind, *victim)
            if number % 10 == 0:
                self._say(
                    f"{number} kills, {self._stage.fleet.stored:,} blocks, {self._stage.fleet.messages:,} messages"
                )
        while self._down:
            self._idle(_LOOK_S)
        for process in self._stage.processes:
            process.wait_until_it_answers()

    def _idle(self, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < ends_s:
            for one in [down for down in self._down if down.at_s <= now_s]:
                self._down.remove(one)
                one.start()
                self._note("started", one.name)
            self._stage.check_alive({down.name for down in self._down})
            time.sleep(min(_LOOK_S, max(0.0, ends_s - now_s)))

    def _victim(self, kind: str) -> tuple[str, Callable[[], None], Callable[[], object]] | None:
        """What of this kind is killed now: its name, how to kill it and how to start it; None while all are down."""
        away = {one.name for one in self._down}
        if kind in ("central", "relay"):
            processes = [self._stage.central] if kind == "central" else [*self._stage.relays]
            up = [one for one in processes if one.directory.name not in away]
            if not up:
                return None
            process: DaemonProcess = self._random.choice(up)
            return process.directory.name, process.kill, lambda: process.start(wait=False)
        servers = self._stage.cluster.servers
        if any(one.name in away for one in servers):
            return None
        leads = kind == "leader"
        server = self._stage.cluster.leader_of(JETSTREAM) if leads else self._random.choice(servers)
        return server.name, server.kill, server.start

    def _kill(self, kind: str, name: str, kill: Callable[[], None], start: Callable[[], object]) -> None:
        kill()
        self.kills[kind] += 1
        self._note("killed", f"{name} ({kind})")
        self._down.append(_Down(name, time.monotonic() + self._random.uniform(0, self._down_s), start))

    def _note(self, what: str, name: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {what} {name}\n")

    def _say(self, text: str) -> None:
        print(f"{text}, {time.monotonic() - self._began_s:.0f} s", file=sys.stderr)


def play(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The drill. AssertionError for any difference."""
    generator = random.Random(arguments.seed)
    began_s = time.monotonic()
    rate = arguments.blocks / (arguments.kills * arguments.every)
    relays = -(-arguments.workers // WORKERS_PER_RELAY)
    with bus_stage(
        directory, workers=arguments.workers, relays=relays, seed=arguments.seed, blocks_per_s=rate
    ) as stage:
        killer = Killer(stage, generator, arguments.every, arguments.down, directory / "kills.txt")
        killer.run(arguments.kills)
        while stage.fleet.stored < arguments.blocks:
            time.sleep(_LOOK_S)
        stage.fleet.pause()
        settled_s = stage.settle()
        fleet = stage.fleet
        return {
            "kills": dict(killer.kills),
            "workers": arguments.workers,
            "relays": relays,
            "messages": fleet.messages,
            "blocks_stored": fleet.stored,
            "blocks_removed": sum(source.removed for source in fleet.sources.values()),
            "messages_in_the_stream": stage.stored_messages(),
            "lost": 0,
            "invented": 0,
            "applied_twice": 0,
            "pause_to_truth_s": round(settled_s, 2),
            "seconds": round(time.monotonic() - began_s),
        }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between kills, on average")
    parser.add_argument("--down", type=float, default=DOWN_S, help="seconds that something is down, at most")
    parser.add_argument("--keep", type=Path, help="directory for everything, kept in any case")
    arguments = parser.parse_args(words)
    return run_drill(lambda directory: play(directory, arguments), arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
