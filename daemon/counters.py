"""Plain numbers that the hot path adds to; `metrics` reads them when it is scraped.

Each field has one writing thread, so an addition needs no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from itertools import repeat

from kvcensus.translators.translation import RejectReason

LAG_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
COMMIT_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Counts of observations by upper bound, with their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Sequence[float]) -> None:
        """The same as `observe` of each."""
        for at, count in Counter(map(bisect_left, repeat(self.bounds), values)).items():
            self.counts[at] += count
        self.total += sum(values)


class IntakeCounters:
    """What a source's thread counts of one stream."""

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0
        self.malformed = 0
        """Messages that are not [topic, 8-byte sequence number, payload]."""
        self.duplicates = 0
        self.gaps = 0
        self.missing = 0
        """Sequence numbers that were missing when a gap was seen; those that a replay brings count as replayed too."""
        self.replayed = 0
        self.unrecovered = 0
        """Sequence numbers given up after every replay attempt."""
        self.restarts = 0
        self.replay_requests = 0
        self.replay_failures = 0
        self.held = 0
        """Live messages held back now, while a replay runs."""
        self.held_dropped = 0
        self.connected = 0
        self.disconnects = 0
        self.handshake_failures = 0
        """Connections that the other side, or we, refused: of keys, or of the protocol."""


class BusCounters:
    """What a source's thread counts of one bus."""

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0
        self.disconnects = 0
        self.dropped = 0
        """Messages that the client dropped because too many were waiting, as far as it says."""


class AppliedCounters:
    """What the writer's thread counts of one stream."""

    def __init__(self) -> None:
        self.messages = 0
        self.events = {"stored": 0, "removed": 0, "cleared": 0}
        self.blocks_stored = 0
        self.blocks_removed = 0
        self.rejections = dict.fromkeys(RejectReason, 0)
        self.lag_s = Histogram(LAG_BOUNDS_S)


class WriterCounters:
    """What the writer's thread counts of itself."""

    def __init__(self) -> None:
        self.commits = 0
        self.commit_errors = 0
        self.commit_s = Histogram(COMMIT_BOUNDS_S)
        self.blocks_stored = 0
        self.copies_added = 0
        self.refreshed = 0
        self.blocks_removed = 0
        self.copies_removed = 0
        self.unknown_removals = 0
        self.blocks_cleared = 0


class Question(StrEnum):
    """What is compared between the index and its shadow."""

    LOCATE = "locate"
    MATCH = "match"


class ShadowCounters:
    """What the writer's thread counts of the shadow."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.following = 0
        """1 while it is driven; 0 before it has begun, and once it is broken."""
        self.records = 0
        self.commits = 0
        self.commit_s = Histogram(COMMIT_BOUNDS_S)
        self.errors = 0
        self.questions = dict.fromkeys(Question, 0)
        self.disagreements = dict.fromkeys(Question, 0)


class DropCause(StrEnum):
    """Why an entry left the quarantine without anybody asking: the limits, or a file that could not be written."""

    SIZE = "size"
    AGE = "age"
    UNWRITTEN = "unwritten"


class QuarantineCounters:
    """What is in the quarantine as of its last write, and what the writer's thread counts of it."""

    def __init__(self) -> None:
        self.entries = 0
        self.bytes = 0
        self.added = 0
        self.dropped = dict.fromkeys(DropCause, 0)
        self.errors = 0


class HttpRefusal(StrEnum):
    """Why the HTTP side turned a request or a connection away before looking at what was asked."""

    TOKEN = "token"  # noqa: S105 - no secret, but the lack of one
    """A request without one of the tokens."""
    SLOW = "slow"
    """A body that did not arrive in time."""
    IDLE = "idle"
    """A connection without a request, closed to make room for another."""
    FULL = "full"
    """A connection beyond the limit, while every other had a request."""


class HttpCounters:
    """What the event loop counts of the HTTP side."""

    def __init__(self) -> None:
        self.refused = dict.fromkeys(HttpRefusal, 0)
