"""What the daemon says of its streams and of itself: the words of `/v1/streams`, `/v1/workers` and `/readyz`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta
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


WorkerId = Annotated[str, Meta(description="The worker: NAME, or NAME/RANK for a stream of one data-parallel rank.")]
Rank = Annotated[int | None, Meta(description="The data-parallel rank, null for a stream without one.")]
WorkerTrust = Annotated[Trust, Meta(description="How far the worker's blocks can be believed.")]
TrustReason = Annotated[str, Meta(description='Why `trust` is not `fresh`, "" when it is.')]
SinceMs = Annotated[int, Meta(description="Since when `trust` is so, in ms since the Unix epoch; 0: unknown.")]
LastSeq = Annotated[int, Meta(description="The sequence number of the last committed message, -1 before the first.")]
Ready = Annotated[bool, Meta(description="Whether the daemon can answer.")]
ReadyProblems = Annotated[list[str], Meta(description="What is wrong, also what does not keep it from answering.")]


class StreamStatus(msgspec.Struct, frozen=True):
    """A stream as of its last commit."""

    stream: Annotated[str, Meta(description="The name of its cursor.")]
    source: Annotated[str, Meta(description="The configured name of the source or bus.")]
    endpoint: Annotated[str, Meta(description="Where its messages come from.")]
    worker_id: WorkerId
    rank: Rank
    epoch: Annotated[int, Meta(description="Which life of the publisher it is: one more after each restart.")]
    last_seq: LastSeq
    state: Annotated[StreamState, Meta(description="What the stream is doing.")]
    trust: WorkerTrust
    reason: TrustReason
    since_ms: SinceMs
    engine_ms: Annotated[
        int, Meta(description="The engine's time of the last committed message, in ms since the Unix epoch; 0: never.")
    ]
    committed_ms: Annotated[int, Meta(description="When that was committed, in ms since the Unix epoch; 0: never.")]
    messages: Annotated[int, Meta(description="Messages applied in this epoch.")]
    blocks_stored: Annotated[int, Meta(description="Blocks that these stored.")]
    blocks_removed: Annotated[int, Meta(description="Blocks that these removed.")]
    silent: Annotated[
        bool, Meta(description="Whether the source has never delivered anything, although it had the time.")
    ]


class BusStatus(msgspec.Struct, frozen=True):
    """A bus and how far it has been read."""

    bus: Annotated[str, Meta(description="The configured name.")]
    type: Annotated[str, Meta(description="What its messages are: `vllm`, `sglang` or `dynamo`.")]
    servers: Annotated[tuple[str, ...], Meta(description="The addresses of the servers.")]
    jetstream: Annotated[str, Meta(description='The JetStream stream that keeps its messages, "" for none.')]
    state: Annotated[StreamState, Meta(description="What the bus is doing.")]
    problem: Annotated[str, Meta(description='Why nothing comes, "" when nothing is wrong.')]
    position: Annotated[
        int, Meta(description="The sequence number in `jetstream` as of the last commit, -1 before the first.")
    ]
    pending: Annotated[int, Meta(description="Messages left to read in `jetstream`, or waiting in the client.")]
    workers: Annotated[int, Meta(description="Workers that are followed.")]
    refused: Annotated[int, Meta(description="Messages of workers that are not followed, since the daemon started.")]


class BusFigures(Protocol):
    """What there is to read of a bus."""

    counters: BusCounters

    def status(self) -> BusStatus:
        """The bus as it is now."""


class Readiness(msgspec.Struct, frozen=True):
    """Whether the daemon can answer, and what is wrong."""

    ready: Ready
    problems: ReadyProblems


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

    def standings(self) -> Mapping[str, Callable[[], StreamStatus]]:
        """By worker, what gives the status of its stream as of the last commit before now: most are never asked for."""

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
