"""The bodies of requests and answers, from which the API description is made as well.

Hashes are hex: lower case in answers, either case in requests, where a 64-bit integer (signed or not) is accepted too.
Times are milliseconds since the Unix epoch; ages are milliseconds. In JSON and msgpack alike.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvcensus.backends.model import CacheResidency, CacheTier, GroupSpec, IdentityScope

from ..status import BusStatus, StreamStatus, Trust

ROOT_WORD = "root"
"""How `ROOT` is written where a parent's hash is expected."""

Hash = Annotated[
    str | int,
    Meta(description="A block hash: hex of 1 to 240 bytes, or a 64-bit integer, which becomes 8 bytes, big-endian."),
]
ParentHash = Annotated[
    str | int, Meta(description="The hash of the parent block, or `root` for the blocks that start a chain.")
]
Group = Annotated[int, Meta(ge=0, description="Only records of this KV-cache group.")]


Limit = Annotated[
    int, Meta(ge=1, description="At most so many children, the first by hash, each with every residency.")
]


class ScopeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scope. `tokenizer_id` is `model_id` when it is left out. `adapter_id` null is neither "" nor "any"."""

    model_id: str
    tokenizer_id: str | None = None
    adapter_id: str | None = None
    tenant_id: str = ""

    def scope(self) -> IdentityScope:
        """The scope that is meant."""
        tokenizer_id = self.model_id if self.tokenizer_id is None else self.tokenizer_id
        return IdentityScope(self.model_id, tokenizer_id, self.adapter_id, self.tenant_id)


class MatchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Consecutive blocks of one prompt, first block first. Without a scope, every scope is looked at."""

    block_hashes: list[Hash]
    scope: ScopeBody | None = None
    trusted_only: Annotated[
        bool | None, Meta(description="Leave out workers whose trust is not `fresh`. Absent: as configured.")
    ] = None


class LocateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One block. Without a scope, every scope is looked at."""

    block_hash: Hash
    scope: ScopeBody | None = None
    group: Group | None = None


class ChildrenBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block, or the root, whose children are asked for."""

    scope: ScopeBody
    prefix_hash: ParentHash
    limit: Limit | None = None


class LocateQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`LocateBody` as query parameters. The scope is given by `model_id`; a parameter left out is null."""

    block_hash: Annotated[str, Meta(description="A block hash in hex.")]
    model_id: str | None = None
    tokenizer_id: str | None = None
    adapter_id: str | None = None
    tenant_id: str | None = None
    group: Group | None = None


class ChildrenQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ChildrenBody` as query parameters."""

    model_id: str
    prefix_hash: Annotated[str, Meta(description="The hash of the parent block in hex, or `root`.")]
    tokenizer_id: str | None = None
    adapter_id: str | None = None
    tenant_id: str | None = None
    limit: Limit | None = None


class MatchedWorker(msgspec.Struct, frozen=True):
    """The prefix that one worker could serve, in blocks, and how far that can be believed.

    `worker_id` is NAME for a stream without a data-parallel rank, NAME/RANK for one with a rank. `tiers` has the prefix
    within each tier alone, `blocks` the longest of these, and `blocks_any_tier` the prefix of which every block lies on
    some tier. `last_seq` is -1 and `age_ms` null when nothing was ever committed for the worker.
    """

    worker_id: str
    rank: int | None
    trust: Trust
    reason: str
    last_seq: int
    age_ms: int | None
    tiers: dict[CacheTier, int]
    blocks: int
    blocks_any_tier: int


class MatchAnswer(msgspec.Struct, frozen=True):
    """Workers that could serve any of the prefix, the longest first."""

    workers: list[MatchedWorker]


class Residency(msgspec.Struct, frozen=True):
    """The fact that a block is on a worker, at a tier: one line of the snapshot.

    `prefix_hash` is the parent's hash, `root` at the start of a chain, null when it was never reported. `block_index`
    is null and `token_count` 0 when unknown. `bytes` is the size of one copy, 0 when unknown; `ref_count` counts the
    copies.
    """

    model_id: str
    tokenizer_id: str
    adapter_id: str | None
    tenant_id: str
    prefix_hash: str | None
    block_hash: str
    block_index: int | None
    token_count: int
    worker_id: str
    tier: CacheTier
    bytes: int
    last_access_ms: int
    ref_count: int
    pinned: bool
    rank: int | None
    group: int


_Fields = tuple[
    str,
    str,
    str | None,
    str,
    str | None,
    str,
    int | None,
    int,
    str,
    CacheTier,
    int,
    int,
    int,
    bool,
    int | None,
    int,
]


def fields_of(residency: CacheResidency) -> _Fields:
    """The fields of `Residency`, in order."""
    key = residency.key
    parent = key.prefix_hash
    return (
        key.model_id,
        key.tokenizer_id,
        key.adapter_id,
        key.tenant_id,
        None if parent is None else parent.hex() or ROOT_WORD,
        key.block_hash.hex(),
        key.block_index,
        key.token_count,
        residency.worker_id,
        residency.tier,
        residency.bytes,
        residency.last_access_ms,
        residency.ref_count,
        residency.pinned,
        residency.rank,
        key.group,
    )


class TrustedResidency(Residency, frozen=True):
    """A residency, and how far its worker can be believed."""

    trust: Trust
    reason: str
    last_seq: int
    age_ms: int | None


class ResidenciesAnswer(msgspec.Struct, frozen=True):
    """Residencies of the asked blocks, over workers, tiers and groups."""

    residencies: list[TrustedResidency]


class ChildrenAnswer(msgspec.Struct, frozen=True):
    """Residencies of the children. `left_out` counts the children that a limit left out."""

    residencies: list[TrustedResidency]
    left_out: int


class HeldGroup(msgspec.Struct, frozen=True):
    """What a worker holds at one tier in one KV-cache group. `window` and `block_size` of the spec are in tokens."""

    tier: CacheTier
    group: int
    spec: GroupSpec
    blocks: int
    bytes: int


class WorkerState(msgspec.Struct, frozen=True):
    """A worker: how far it can be believed, and how much it holds."""

    worker_id: str
    rank: int | None
    trust: Trust
    reason: str
    since_ms: int
    last_seq: int
    age_ms: int | None
    blocks: int
    bytes: int
    holdings: list[HeldGroup]


class WorkersAnswer(msgspec.Struct, frozen=True):
    """Every worker that has a stream or holds a block, by worker id."""

    workers: list[WorkerState]


class StreamReport(StreamStatus, frozen=True):
    """A stream as of its last commit.

    `age_ms` is the time since that commit, `lag_s` the time in seconds since the engine sent the last committed
    message: both grow while the engine is silent, and are null before the first message. `gaps`, and the messages that
    no replay brought, count since the daemon started.
    """

    age_ms: int | None
    lag_s: float | None
    gaps: int
    unrecovered_messages: int


class StreamsAnswer(msgspec.Struct, frozen=True):
    """Every stream: the configured ones, and those that buses have brought."""

    streams: list[StreamReport]
    buses: list[BusStatus] = []


class Liveness(msgspec.Struct, frozen=True):
    """Whether every thread of the daemon still runs."""

    alive: bool


class IndexState(msgspec.Struct, frozen=True):
    """The index: `records`, and its bytes on disk. `live_bytes` are in use of `limit_bytes`; 0 for a store without."""

    records: int
    stored_bytes: int
    live_bytes: int
    limit_bytes: int


class DaemonState(msgspec.Struct, frozen=True):
    """The daemon itself. `ready` and `problems` are those of `/readyz`; `queued_*` wait for the writer."""

    version: str
    uptime_s: float
    ready: bool
    problems: list[str]
    backend: str
    index: IndexState
    queued_messages: int
    queued_bytes: int


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong. `field` is the path of the offending field, null when no field is to blame."""

    code: str
    field: str | None
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer from 400 on, except the 503 of `/livez` and `/readyz`."""

    error: ErrorDetail
