"""Every server of the cluster is away for a while, and the fleet goes on publishing.

    .venv/bin/python tests/drills/bus_outage.py --seconds 60 --rate 10000
    .venv/bin/python tests/drills/bus_outage.py --seconds 60 --rate 10000 --bound 4194304

Without --bound the relays spool what comes and deliver all of it: at the end the central index is the truth for every
worker. With it every other relay may keep no more than that. They must say what they dropped and of whom, in their log
and in their metrics alike, and the central index must disbelieve exactly these workers; all others are the truth. One
worker of each relay publishes nothing during the outage: it must lose nothing, whatever the bound.

When the servers are back the fleet goes on until the relays have caught up with it, but no longer than the outage took.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.drills.bus_stage import RelayProcess, Stage, bus_stage, run_drill
from tests.end_to_end.daemon_process import wait_until

STEADY_S = 5.0
WORKERS_PER_RELAY = 4
_LOOK_S = 0.25
_QUIET_S = 120.0
_CAUGHT_UP_RECORDS = 500
"""Records that wait when a fleet publishes and nothing is wrong: fewer."""


class Watch:
    """What the relays showed during the outage."""

    def __init__(self, relays: Sequence[RelayProcess]) -> None:
        self._relays = relays
        self.most_bytes = dict.fromkeys(relays, 0)
        self.most_records = dict.fromkeys(relays, 0)

    def look(self) -> int:
        """Returns the records that wait."""
        waiting = 0
        for relay in self._relays:
            state = relay.get("/v1/relay")
            waiting += state["waiting"]
            self.most_bytes[relay] = max(self.most_bytes[relay], state["waiting_bytes"])
            self.most_records[relay] = max(self.most_records[relay], state["waiting"])
        return waiting

    def look_for(self, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            self.look()
            time.sleep(_LOOK_S)


def interrupt(stage: Stage, watch: Watch, seconds: float, *, kill: bool) -> None:
    """Take every server away and bring them back. Meanwhile relays and daemon must say so."""
    for server in stage.cluster.servers:
        if kill:
            server.kill()
        else:
            server.stop()
    began_s = time.monotonic()
    for process in stage.processes:
        wait_until(lambda process=process: bool(process.problems()), "it says that nothing comes")  # type: ignore[misc]
    watch.look_for(seconds - (time.monotonic() - began_s))
    for server in stage.cluster.servers:
        server.start()


def what_was_dropped(relays: Sequence[RelayProcess]) -> dict[str, int]:
    """Messages by worker; logs and metrics must agree."""
    dropped: dict[str, int] = {}
    for relay in relays:
        counted = relay.dropped()
        wait_until(lambda relay=relay, counted=counted: relay.said_dropped() == counted, "it says so")  # type: ignore[misc]
        dropped |= counted
    return dropped


def play(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The drill. AssertionError for any difference."""
    relays = -(-arguments.workers // WORKERS_PER_RELAY)
    with bus_stage(
        directory,
        workers=arguments.workers,
        relays=relays,
        seed=arguments.seed,
        blocks_per_s=arguments.rate * arguments.workers / (arguments.workers - relays),
        bounds=dict.fromkeys(range(0, relays, 2), arguments.bound) if arguments.bound else {},
    ) as stage:
        fleet, watch = stage.fleet, Watch(stage.relays)
        steady_s = min(STEADY_S, arguments.seconds)
        time.sleep(steady_s)
        quiet = {relay.workers[-1]: relay for relay in stage.relays}
        for worker, relay in quiet.items():
            source = fleet.sources[worker]
            source.pause()
            last = source.rank.truth().last_seq
            wait_until(lambda: relay.published(worker) == last, f"{worker} has nothing to publish", _QUIET_S)  # noqa: B023
        stored, began_s = fleet.stored, time.monotonic()
        interrupt(stage, watch, arguments.seconds, kill=arguments.kill)
        published = fleet.stored - stored
        rate = published / (time.monotonic() - began_s)
        back_s = time.monotonic()
        while (waiting := watch.look()) > _CAUGHT_UP_RECORDS and time.monotonic() < back_s + arguments.seconds:
            time.sleep(_LOOK_S)
        time.sleep(steady_s)
        fleet.pause()
        went_on_s = time.monotonic() - back_s
        for relay, most in watch.most_bytes.items():
            assert not relay.bound or most <= relay.bound, f"{relay.directory.name} kept {most} bytes"
        dropped = what_was_dropped(stage.relays)
        bounded = {worker for relay in stage.relays if relay.bound for worker in relay.workers}
        assert dropped.keys() <= bounded - quiet.keys(), f"{sorted(dropped)} lost something"
        assert bool(dropped) == bool(arguments.bound), f"dropped {dropped}"
        settled_s = stage.settle(frozenset(dropped))
        return {
            "outage_s": arguments.seconds,
            "servers": "killed" if arguments.kill else "stopped",
            "blocks_stored_per_s": round(rate),
            "blocks_stored_during_the_outage": published,
            "messages": fleet.messages,
            "blocks_stored": fleet.stored,
            "spool_bound": arguments.bound or None,
            "spool_records_at_most": sum(watch.most_records.values()),
            "spool_bytes_at_most": list(watch.most_bytes.values()),
            "dropped_messages": dropped,
            "untrusted": sorted(dropped),
            "equal": len(fleet.sources) - len(dropped),
            "went_on_s": round(went_on_s, 1),
            "records_waiting_by_then": waiting,
            "pause_to_truth_s": round(settled_s, 2),
        }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=10_000.0, help="stored blocks a second during the outage")
    parser.add_argument("--bound", type=int, default=0, help="bytes that every other relay may keep")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="kill -9 the servers instead of stopping them")
    parser.add_argument("--keep", type=Path, help="directory for everything, kept in any case")
    arguments = parser.parse_args(words)
    return run_drill(lambda directory: play(directory, arguments), arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
