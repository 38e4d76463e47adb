"""Half of the measured limit for a long time, with faults: memory flat, lag reported, no divergence.

    .venv/bin/python tests/drills/soak.py --minutes 30

First the daemon's limit is measured: how many blocks a second of the same engine it commits when messages come as fast
as they can. Then the engine publishes half of that, and every ten seconds something goes wrong: live messages are lost
or repeated, the connection breaks, the engine restarts. Every minute the engine pauses, and the daemon's snapshot must
be the engine's state, copy by copy, with trust.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvcensus.daemon.bench.processes import rss_mb
from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine, SimulatedRank
from kvcensus.daemon.simulate.rank import RankOptions
from tests.drills.source import Source, assert_equal
from tests.end_to_end.daemon_process import DaemonProcess, wait_until

LIMIT_MESSAGES = 40_000
FAULT_EVERY_S = 10.0
CHECK_EVERY_S = 60.0
RING = 100_000
LIVE_HWM = 1_000_000


def inject(rank: SimulatedRank, generator: random.Random) -> str:
    """One fault, chosen at random. Returns its name."""
    fault = generator.choice(["lose", "repeat", "disconnect", "restart"])
    with rank.lock:
        if fault == "lose":
            rank.publish(generator.randint(1, 50), live=False)
        elif fault == "repeat":
            for message in rank.publish(generator.randint(1, 10)):
                rank.send([message])
        elif fault == "disconnect":
            rank.sockets.ask(rank.sockets.take_down)
            rank.sockets.ask(rank.sockets.bring_up)
        else:
            rank.restart()
    return fault


def measured_limit(daemon: DaemonProcess, rank: SimulatedRank) -> tuple[float, float]:
    """Blocks/s and messages/s that the daemon commits of messages made beforehand and sent as fast as they go."""
    before = daemon.stream()
    with rank.lock:
        messages = [rank.rank.next_message() for _ in range(LIMIT_MESSAGES)]
        started = time.monotonic()
        for first in range(0, len(messages), 500):
            part = messages[first : first + 500]
            rank.sockets.ask(lambda part=part: rank.sockets.publish(part, live=True, keep=True))  # type: ignore[misc]
        last = rank.truth().last_seq
    wait_until(lambda: daemon.stream()["last_seq"] == last, "the daemon has caught up", 120)
    elapsed = time.monotonic() - started
    blocks = sum(daemon.stream()[key] - before[key] for key in ("blocks_stored", "blocks_removed"))
    return blocks / elapsed, LIMIT_MESSAGES / elapsed


def applied_blocks(daemon: DaemonProcess) -> float:
    """Blocks stored and removed since the daemon started, over all epochs."""
    stored = daemon.metric("kvcensus_stream_blocks_stored_total", source="w")
    return stored + daemon.metric("kvcensus_stream_blocks_removed_total", source="w")


def lag_buckets(daemon: DaemonProcess) -> dict[float, float]:
    """How many messages had at most a lag, by that lag in seconds."""
    _, body = daemon.request("GET", "/metrics", accept="text/plain")
    buckets = {}
    for line in body.decode().splitlines():
        if line.startswith("kvcensus_stream_lag_seconds_bucket"):
            series, _, count = line.rpartition(" ")
            buckets[float(series.partition('le="')[2].partition('"')[0])] = float(count)
    return buckets


def p99(before: dict[float, float], after: dict[float, float]) -> float:
    """The bound of the bucket in which the 99th percentile of what came between lies."""
    total = after[float("inf")] - before[float("inf")]
    return next(bound for bound in after if after[bound] - before[bound] >= 0.99 * total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    rank_options = RankOptions(cache=CacheOptions(blocks=20_000))
    options = EngineOptions("w", arguments.seed, rank=rank_options, buffer_steps=RING, live_hwm=LIVE_HWM)
    faults: Counter[str] = Counter()
    memory: list[float] = []
    recoveries: list[float] = []
    with tempfile.TemporaryDirectory() as place, SimulatedEngine(options) as engine:
        rank = engine.ranks[0]
        endpoints = [f"tcp://127.0.0.1:{port}" for port in (engine.base_port, engine.replay_port)]
        flags = ("--engine", endpoints[0], "--replay-endpoint", endpoints[1], "--worker", "w")
        with DaemonProcess(Path(place), *flags) as daemon:
            assert daemon.process is not None
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            limit, messages_per_s = measured_limit(daemon, rank)
            print(f"limit {limit:,.0f} blocks/s; soaking at half of it", file=sys.stderr)
            source = Source(rank, messages_per_s=messages_per_s / 2)
            began = time.monotonic()
            before, lag_before = applied_blocks(daemon), lag_buckets(daemon)
            next_fault, next_check = began + FAULT_EVERY_S, began + CHECK_EVERY_S
            while (now := time.monotonic()) < began + 60 * arguments.minutes:
                if now >= next_check:
                    source.pause()
                    recoveries.append(assert_equal(daemon, rank))
                    assert daemon.stream()["trust"] == "fresh", daemon.stream()
                    memory.append(rss_mb(daemon.process.pid)[0])
                    print(f"{now - began:.0f} s, {memory[-1]:.0f} MB, {dict(faults)}", file=sys.stderr)
                    source.resume()
                    next_check += CHECK_EVERY_S
                elif now >= next_fault:
                    faults[inject(rank, generator)] += 1
                    next_fault += FAULT_EVERY_S
                time.sleep(0.05)
            source.pause()
            elapsed = time.monotonic() - began
            wait_until(lambda: daemon.stream()["state"] == "live", "the daemon has caught up", 120)
            blocks = applied_blocks(daemon) - before
            recoveries.append(assert_equal(daemon, rank))
            report = {
                "minutes": elapsed / 60,
                "limit_blocks_per_s": limit,
                "soak_blocks_per_s": blocks / elapsed,
                "faults": dict(faults),
                "checks": len(recoveries),
                "divergences": 0,
                "lag_p99_s_at_most": p99(lag_before, lag_buckets(daemon)),
                "caught_up_s": {"p50": statistics.median(recoveries), "max": max(recoveries)},
                "own_memory_mb": {"first": memory[:1], "median": statistics.median(memory), "last": memory[-1:]},
            }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
