"""kill -9 at random moments of a long stream, over and over: nothing lost, nothing invented, nothing applied twice.

    .venv/bin/python tests/drills/kill_nine.py --kills 1000 --events 2000000

A simulated engine (prefix sharing, LRU eviction, copies) publishes all the time, also while the daemon is down. After
every tenth kill, and at the end, the engine pauses until the daemon has caught up; then the snapshot must be the
engine's own state, copy by copy, and the cursor's counts those of all that was published.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine
from kvcensus.daemon.simulate.rank import RankOptions
from tests.drills.source import Source, assert_equal
from tests.end_to_end.daemon_process import DaemonProcess

CHECK_EVERY = 10
UP_S = 0.5
CYCLE_S = 0.85
RING = 200_000


def check(daemon: DaemonProcess, source: Source) -> float:
    """The daemon's state is the engine's, and so are its counts. Returns the seconds that catching up took."""
    source.pause()
    elapsed = assert_equal(daemon, source.rank)
    stream = daemon.stream()
    counted = (stream["messages"], stream["blocks_stored"], stream["blocks_removed"])
    assert counted == (source.messages, source.stored, source.removed), (counted, vars(source))
    assert (stream["trust"], stream["epoch"]) == ("fresh", 1), stream
    source.resume()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    cache = CacheOptions(blocks=4096)
    options = EngineOptions("w", arguments.seed, rank=RankOptions(cache=cache), buffer_steps=RING)
    starts: list[float] = []
    recoveries: list[float] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, SimulatedEngine(options) as engine:
        endpoints = [f"tcp://127.0.0.1:{port}" for port in (engine.base_port, engine.replay_port)]
        daemon = DaemonProcess(
            Path(place), "--engine", endpoints[0], "--replay-endpoint", endpoints[1], "--worker", "w"
        )
        daemon.start()
        source = Source(engine.ranks[0], events_per_s=arguments.events / arguments.kills / CYCLE_S)
        for kill in range(1, arguments.kills + 1):
            time.sleep(generator.uniform(0, UP_S))
            daemon.kill()
            started = time.monotonic()
            daemon.start()
            starts.append(time.monotonic() - started)
            if kill % CHECK_EVERY == 0:
                recoveries.append(check(daemon, source))
                print(f"{kill} kills, {source.events:,} events, {time.monotonic() - began:.0f} s", file=sys.stderr)
        while source.events < arguments.events:
            time.sleep(0.1)
        recoveries.append(check(daemon, source))
        source.pause()
        assert daemon.terminate() == 0
    report = {
        "kills": arguments.kills,
        "events": source.events,
        "messages": source.messages,
        "blocks_stored": source.stored,
        "blocks_removed": source.removed,
        "checks": len(recoveries),
        "lost": 0,
        "invented": 0,
        "applied_twice": 0,
        "start_to_answer_s": {"p50": statistics.median(starts), "max": max(starts)},
        "pause_to_caught_up_s": {"p50": statistics.median(recoveries), "max": max(recoveries)},
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
