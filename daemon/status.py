"""What the daemon says of its streams and of itself: the words of `/v1/streams`, `/v1/workers` and `/readyz`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry

from kvcensus.backends.interface import IndexBackend

from .counters import (
    AppliedCounters,
    BusCounters,
    HttpCounters,
    IntakeCounters,
    QuarantineCounters,
    ShadowCounters,
    WriterCounters,
)


class StreamState(StrEnum):
    """What a stream is doing."""

    CONNECTING = "connecting"
    """No message and no replay yet."""
    REPLAYING = "replaying"
    """Asking the engine for past messages; live ones are held."""
    LIVE = "live"
    """Following."""
    DISCONNECTED = "disconnected"
    """The transport lost the engine and is reconnecting."""


class Trust(StrEnum):
    """How far a worker's blocks can be believed."""

    FRESH = "fresh"
    CATCHING_UP = "catching_up"
    STALE = "stale"
    UNTRUSTED = "untrusted"


class StreamStatus(msgspec.Struct, frozen=True):
    """A stream as of its last commit. Times are in ms since the Unix epoch, 0: never.

    `last_seq` is -1 before the first message.
    `stream` names the cursor; `source` is the configured name; `worker_id` is NAME or NAME/RANK.
    `trust`, `reason` and `since_ms` say whether the worker's blocks can be believed, why not, and since when.
    """

    stream: str
    source: str
    endpoint: str
    worker_id: str
    rank: int | None
    epoch: int
    last_seq: int
    state: StreamState
    trust: Trust
    reason: str
    since_ms: int
    engine_ms: int
    committed_ms: int
    messages: int
    blocks_stored: int
    blocks_removed: int
    silent: bool
    """The source has never delivered anything, although it had the time."""


class BusStatus(msgspec.Struct, frozen=True):
    """A bus and how far it has been read.

    `jetstream` names the stream that keeps its messages, "" for none; `position` is the sequence number there as of the
    last commit, -1 before the first, and `pending` what is left to read. `problem` is why nothing comes, or "".
    `refused` counts messages of workers that are not followed.
    """

    bus: str
    type: str
    servers: tuple[str, ...]
    jetstream: str
    state: StreamState
    problem: str
    position: int
    pending: int
    workers: int
    refused: int


class BusFigures(Protocol):
    """What there is to read of a bus."""

    counters: BusCounters

    def status(self) -> BusStatus:
        """The bus as it is now."""


class Readiness(msgspec.Struct, frozen=True):
    """Whether the daemon can answer, and what is wrong if not."""

    ready: bool
    problems: list[str]


class StreamCounters(Protocol):
    """The counters of one stream, with the labels they are exported under."""

    source: str
    stream: str
    intake: IntakeCounters
    applied: AppliedCounters


class DaemonView(Protocol):
    """What the HTTP side may see of the running daemon. Every method is safe from any thread and returns at once."""

    @property
    def backend(self) -> IndexBackend:
        """The index that is asked."""

    @property
    def registry(self) -> CollectorRegistry:
        """What `/metrics` shows."""

    @property
    def writer_counters(self) -> WriterCounters:
        """What the writer counts of itself."""

    @property
    def http_counters(self) -> HttpCounters:
        """What the HTTP side counts of itself."""

    @property
    def quarantine_counters(self) -> QuarantineCounters:
        """What the quarantine holds, and has lost."""

    @property
    def shadow_counters(self) -> ShadowCounters | None:
        """What was counted of the shadow, None without one."""

    def statuses(self) -> list[StreamStatus]:
        """Every configured stream."""

    def stream_counters(self) -> Sequence[StreamCounters]:
        """The counters of every configured stream, in the order of `statuses`."""

    def buses(self) -> Sequence[BusFigures]:
        """Every configured bus."""

    def queue_depth(self) -> tuple[int, int]:
        """Messages and bytes waiting for the writer."""

    def queue_limits(self) -> tuple[int, int]:
        """Messages and bytes at which the sources stop reading."""

    def readiness(self) -> Readiness:
        """Whether `/readyz` says yes."""

    def alive(self) -> bool:
        """Whether the writer and every source thread still run."""
