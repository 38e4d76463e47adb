"""kill -9 at random moments of a long stream, over and over: nothing lost, nothing invented, nothing applied twice.

    .venv/bin/python tests/drills/kill_nine.py --kills 1000 --events 2000000

A simulated engine (prefix sharing, LRU eviction, copies) publishes all the time, also while the daemon is down. After
every tenth kill, and at the end, the engine pauses until the daemon has caught up; then the snapshot must be the engine's
own state, copy by copy, and the cursor's counts those of all that was published.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvcensus.backends.model import RemoveBlocks, StoreRun
from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine
from kvcensus.daemon.simulate.rank import RankOptions
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator
from tests.end_to_end.daemon_process import DaemonProcess, wait_until

CHECK_EVERY = 10
UP_S = 0.5
CYCLE_S = 0.85
RING = 200_000


class Source:
    """Publishes at a rate from a thread, and counts what it published."""

    def __init__(self, engine: SimulatedEngine, events_per_s: float) -> None:
        self.rank = engine.ranks[0]
        self.events = self.messages = self.stored = self.removed = 0
        self._rate = events_per_s
        self._translator = VllmTranslator(TranslatorOptions("w"))
        self._run = threading.Event()
        self._idle = threading.Event()
        self._run.set()
        threading.Thread(target=self._publish, daemon=True).start()

    def _publish(self) -> None:
        started, begun = time.monotonic(), self.events
        while True:
            if not self._run.is_set():
                self._idle.set()
                self._run.wait()
                self._idle.clear()
                started, begun = time.monotonic(), self.events
            (message,) = self.rank.publish()
            self._count(message.payload)
            ahead_s = (self.events - begun) / self._rate - (time.monotonic() - started)
            if ahead_s > 0:
                time.sleep(ahead_s)

    def _count(self, payload: bytes) -> None:
        self.messages += 1
        for operation in self._translator.translate(payload, 0).operations:
            self.events += 1
            if isinstance(operation, StoreRun):
                self.stored += len(operation.block_hashes)
            elif isinstance(operation, RemoveBlocks):
                self.removed += len(operation.block_hashes)

    def pause(self) -> None:
        self._run.clear()
        self._idle.wait()

    def resume(self) -> None:
        self._idle.clear()
        self._run.set()


def check(daemon: DaemonProcess, source: Source) -> float:
    """The daemon's state is the engine's. Returns the seconds that catching up took."""
    source.pause()
    started = time.monotonic()
    truth = source.rank.truth()
    wait_until(lambda: daemon.stream()["last_seq"] == truth.last_seq, "the daemon has caught up", 60)
    wait_until(lambda: daemon.stream()["state"] == "live", "the replay has ended")
    elapsed = time.monotonic() - started
    stream = daemon.stream()
    expected = {
        (tier.value, block_hash, group): copies
        for tier, held in truth.held.items()
        for (block_hash, group), copies in held.items()
    }
    found = {
        (one["tier"], bytes.fromhex(one["block_hash"]), one["group"]): one["ref_count"] for one in daemon.snapshot()
    }
    assert found == expected, (
        f"lost {len(expected.keys() - found.keys())}, invented {len(found.keys() - expected.keys())}"
    )
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
        source = Source(engine, arguments.events / arguments.kills / CYCLE_S)
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
