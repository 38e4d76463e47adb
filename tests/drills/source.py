"""A simulated rank that publishes all the time, and whether the daemon's index is its state."""

from __future__ import annotations

import threading
import time

from kvcensus.backends.model import RemoveBlocks, StoreRun
from kvcensus.daemon.simulate.engine import SimulatedRank
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..end_to_end.daemon_process import DaemonProcess, wait_until

CATCH_UP_S = 120.0
_AHEAD_S = 0.005


class Source:
    """Publishes from a thread: so many events or stored blocks a second, or so many messages, which are not counted."""

    def __init__(
        self,
        rank: SimulatedRank,
        *,
        events_per_s: float = 0.0,
        blocks_per_s: float = 0.0,
        messages_per_s: float = 0.0,
    ) -> None:
        self.rank = rank
        self.events = self.messages = self.stored = self.removed = 0
        self.events_per_s = events_per_s
        self.blocks_per_s = blocks_per_s
        self.messages_per_s = messages_per_s
        self._translator = VllmTranslator(TranslatorOptions("w"))
        self._run = threading.Event()
        self._idle = threading.Event()
        self._run.set()
        threading.Thread(target=self._publish, daemon=True).start()

    def _publish(self) -> None:
        due_s = time.monotonic()
        while True:
            if not self._run.is_set():
                self._idle.set()
                self._run.wait()
                self._idle.clear()
                due_s = time.monotonic()
            (message,) = self.rank.publish()
            if self.messages_per_s:
                due_s += 1 / self.messages_per_s
            else:
                events, stored = self.events, self.stored
                self._count(message.payload)
                if self.blocks_per_s:
                    due_s += (self.stored - stored) / self.blocks_per_s
                else:
                    due_s += (self.events - events) / self.events_per_s
            ahead_s = due_s - time.monotonic()
            if ahead_s > _AHEAD_S:
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


def assert_equal(daemon: DaemonProcess, rank: SimulatedRank) -> float:
    """Once it has caught up with a rank that pauses, the daemon's snapshot is the rank's state, copy by copy.

    Returns the seconds that catching up took.
    """
    started = time.monotonic()
    truth = rank.truth()
    wait_until(
        lambda: daemon.stream()["last_seq"] == truth.last_seq and daemon.stream()["state"] == "live",
        "the daemon has caught up",
        CATCH_UP_S,
    )
    elapsed = time.monotonic() - started
    expected = {
        (tier.value, block_hash, group): copies
        for tier, held in truth.held.items()
        for (block_hash, group), copies in held.items()
    }
    found = {
        (one["tier"], bytes.fromhex(one["block_hash"]), one["group"]): one["ref_count"] for one in daemon.snapshot()
    }
    lost, invented = expected.keys() - found.keys(), found.keys() - expected.keys()
    assert found == expected, f"lost {len(lost)}, invented {len(invented)} of {len(expected)}"
    return elapsed
