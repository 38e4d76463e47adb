"""The bodies of requests and answers, from which the API description is made as well.

Hashes are hex: lower case in answers, either case in requests, where a 64-bit integer (signed or not) is accepted too.
Times are milliseconds since the Unix epoch; ages are milliseconds. In JSON and msgpack alike.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvcensus.backends.model import CacheResidency, CacheTier, GroupSpec, IdentityScope

from ..status import (
    BusStatus,
    LastSeq,
    Rank,
    Ready,
    ReadyProblems,
    SinceMs,
    StreamStatus,
    TrustReason,
    WorkerId,
    WorkerTrust,
)

_LIMIT_MAX = (1 << 63) - 1

ROOT_WORD = "root"
"""How `ROOT` is written where a parent's hash is expected."""

Hash = Annotated[
    str | int,
    Meta(description="A block hash: hex of 1 to 240 bytes, or a 64-bit integer, which becomes 8 bytes, big-endian."),
]
HashInHex = Annotated[str, Meta(description="A block hash in hex.")]
ModelId = Annotated[str, Meta(description="The model of the scope.")]
TokenizerAsked = Annotated[str | None, Meta(description="The tokenizer of the scope; null: the same as `model_id`.")]
AdapterAsked = Annotated[str | None, Meta(description='The adapter of the scope. Null is none: neither "" nor any.')]
TenantAsked = Annotated[str | None, Meta(description='The tenant of the scope; null: "", which is none.')]
GroupAsked = Annotated[
    Annotated[int, Meta(ge=0)] | None, Meta(description="Only residencies of this KV-cache group; null: of every one.")
]
LimitAsked = Annotated[
    Annotated[int, Meta(ge=1, le=_LIMIT_MAX)] | None,
    Meta(description="At most so many children, the first by hash, each with every residency; null: all."),
]

Tier = Annotated[CacheTier, Meta(description="Where the bytes lie.")]
GroupId = Annotated[int, Meta(description="The KV-cache group, 0 where the model has but one.")]
AgeMs = Annotated[
    int | None, Meta(description="Time since the last commit of the worker's stream, in ms; null before the first.")
]


class ScopeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scope: the identity in which block hashes are comparable."""

    model_id: ModelId
    tokenizer_id: TokenizerAsked = None
    adapter_id: AdapterAsked = None
    tenant_id: Annotated[str, Meta(description='The tenant of the scope, "" for none.')] = ""

    def scope(self) -> IdentityScope:
        """The scope that is meant."""
        tokenizer_id = self.model_id if self.tokenizer_id is None else self.tokenizer_id
        return IdentityScope(self.model_id, tokenizer_id, self.adapter_id, self.tenant_id)


ScopeAsked = Annotated[ScopeBody | None, Meta(description="The only scope to look at; null: every one.")]


class MatchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Consecutive blocks of one prompt."""

    block_hashes: Annotated[
        list[Hash], Meta(description="First block first, at most as many as `http.max_hashes_per_query`.")
    ]
    scope: ScopeAsked = None
    trusted_only: Annotated[
        bool | None,
        Meta(description="Leave out workers whose trust is not `fresh`; null: as `http.trusted_only` says."),
    ] = None


class LocateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One block."""

    block_hash: Hash
    scope: ScopeAsked = None
    group: GroupAsked = None


class ChildrenBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block, or the root, whose children are asked for."""

    scope: Annotated[ScopeBody, Meta(description="The scope of the chain.")]
    prefix_hash: Annotated[
        str | int, Meta(description="The hash of the parent block, or `root` for the blocks that start a chain.")
    ]
    limit: LimitAsked = None


class LocateQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`LocateBody` as query parameters. The scope is given by `model_id`; a parameter left out is null."""

    block_hash: HashInHex
    model_id: Annotated[str | None, Meta(description="The model of the only scope to look at; null: every scope.")] = (
        None
    )
    tokenizer_id: TokenizerAsked = None
    adapter_id: AdapterAsked = None
    tenant_id: TenantAsked = None
    group: GroupAsked = None


class ChildrenQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ChildrenBody` as query parameters."""

    model_id: ModelId
    prefix_hash: Annotated[str, Meta(description="The hash of the parent block in hex, or `root`.")]
    tokenizer_id: TokenizerAsked = None
    adapter_id: AdapterAsked = None
    tenant_id: TenantAsked = None
    limit: LimitAsked = None


class MatchedWorker(msgspec.Struct, frozen=True):
    """The prefix that one worker could serve, in blocks, and how far that can be believed."""

    worker_id: WorkerId
    rank: Rank
    trust: WorkerTrust
    reason: TrustReason
    last_seq: LastSeq
    age_ms: AgeMs
    tiers: Annotated[
        dict[CacheTier, int], Meta(description="The prefix within each tier alone, in blocks, where there is any.")
    ]
    blocks: Annotated[int, Meta(description="The longest of `tiers`, in blocks.")]
    blocks_any_tier: Annotated[
        int, Meta(description="The prefix of which every block lies on some tier of the worker, in blocks.")
    ]


class MatchAnswer(msgspec.Struct, frozen=True):
    """Workers that could serve any of the prefix."""

    workers: Annotated[list[MatchedWorker], Meta(description="The longest prefix first; none of 0 blocks.")]


class Residency(msgspec.Struct, frozen=True):
    """The fact that a block is on a worker, at a tier: one line of the snapshot."""

    model_id: ModelId
    tokenizer_id: Annotated[str, Meta(description="The tokenizer of the scope.")]
    adapter_id: Annotated[
        str | None, Meta(description="The adapter of the scope: null for none, `?` for one that was not told.")
    ]
    tenant_id: Annotated[str, Meta(description='The tenant of the scope: "" for none, `?` for one that was not told.')]
    prefix_hash: Annotated[
        str | None,
        Meta(description="The parent's hash in hex, `root` at the start of a chain, null when it was never reported."),
    ]
    block_hash: HashInHex
    block_index: Annotated[
        int | None, Meta(description="The place of the block in its chain, in blocks from 0; null when unknown.")
    ]
    token_count: Annotated[int, Meta(description="Tokens of the block, 0 when unknown.")]
    worker_id: WorkerId
    tier: Tier
    bytes: Annotated[int, Meta(description="The size of one copy in bytes, 0 when unknown.")]
    last_access_ms: Annotated[
        int,
        Meta(description="The engine's time of the last store, in ms since the Unix epoch; 0 when unknown."),
    ]
    ref_count: Annotated[int, Meta(description="How many copies the worker has there.")]
    pinned: Annotated[bool, Meta(description="Whether it may not be evicted; false for engines, which do not tell.")]
    rank: Rank
    group: GroupId


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

    trust: WorkerTrust
    reason: TrustReason
    last_seq: LastSeq
    age_ms: AgeMs


class ResidenciesAnswer(msgspec.Struct, frozen=True):
    """Residencies of the asked block."""

    residencies: Annotated[
        list[TrustedResidency], Meta(description="One for each scope, worker, tier and group that has the block.")
    ]


class ChildrenAnswer(msgspec.Struct, frozen=True):
    """Residencies of the children."""

    residencies: Annotated[
        list[TrustedResidency], Meta(description="One for each child, worker, tier and group that has it.")
    ]
    more: Annotated[bool, Meta(description="Whether there are children that the limit left out.")]


class HeldGroup(msgspec.Struct, frozen=True):
    """What a worker holds at one tier in one KV-cache group."""

    tier: Tier
    group: GroupId
    spec: Annotated[GroupSpec, Meta(description="What the worker said of the group.")]
    blocks: Annotated[int, Meta(description="Blocks held there.")]
    bytes: Annotated[int, Meta(description="Their size in bytes, copies included; 0 when unknown.")]


class WorkerState(msgspec.Struct, frozen=True):
    """A worker: how far it can be believed, and how much it holds."""

    worker_id: WorkerId
    rank: Rank
    trust: WorkerTrust
    reason: TrustReason
    since_ms: SinceMs
    last_seq: LastSeq
    age_ms: AgeMs
    blocks: Annotated[int, Meta(description="Blocks held in all; one on two tiers counts twice.")]
    bytes: Annotated[int, Meta(description="Their size in bytes, copies included; 0 when unknown.")]
    holdings: Annotated[list[HeldGroup], Meta(description="The same by tier and group.")]


class WorkersAnswer(msgspec.Struct, frozen=True):
    """Every worker that has a stream or holds a block."""

    workers: Annotated[list[WorkerState], Meta(description="In the order of their ids.")]


class StreamReport(StreamStatus, frozen=True):
    """A stream as of its last commit. `age_ms` and `lag_s` grow while the engine is silent."""

    age_ms: Annotated[int | None, Meta(description="Time since the last commit, in ms; null before the first.")]
    lag_s: Annotated[
        float | None,
        Meta(description="Now minus the engine's time of the last committed message, in s; null before the first."),
    ]
    gaps: Annotated[int, Meta(description="How often numbers were missing, since the daemon started.")]
    unrecovered_messages: Annotated[int, Meta(description="Messages that no replay brought, since the daemon started.")]


class StreamsAnswer(msgspec.Struct, frozen=True):
    """Every stream."""

    streams: Annotated[
        list[StreamReport], Meta(description="The configured streams, and those that buses have brought.")
    ]
    buses: Annotated[list[BusStatus], Meta(description="The configured buses.")] = []


class Liveness(msgspec.Struct, frozen=True):
    """Whether the daemon runs."""

    alive: Annotated[bool, Meta(description="Whether every thread of the daemon still runs.")]


class IndexState(msgspec.Struct, frozen=True):
    """The index."""

    records: Annotated[int, Meta(description="Residencies.")]
    stored_bytes: Annotated[int, Meta(description="Bytes that the store occupies, 0 for one in memory.")]
    live_bytes: Annotated[int, Meta(description="Bytes of these that are in use, 0 for a store that cannot tell.")]
    limit_bytes: Annotated[int, Meta(description="Bytes that `live_bytes` may grow to, 0 for a store without a limit.")]


class DaemonState(msgspec.Struct, frozen=True):
    """The daemon itself."""

    version: Annotated[str, Meta(description="The release of kvcensus.")]
    uptime_s: Annotated[float, Meta(description="Time since it began to answer, in s.")]
    ready: Ready
    problems: ReadyProblems
    backend: Annotated[str, Meta(description="The name of the backend: `lmdb`, `memory` and so on.")]
    index: Annotated[IndexState, Meta(description="How large the index is.")]
    queued_messages: Annotated[int, Meta(description="Messages that wait for the writer.")]
    queued_bytes: Annotated[int, Meta(description="Their size in bytes.")]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong."""

    code: Annotated[str, Meta(description="The kind of error, a word for programs.")]
    field: Annotated[
        str | None, Meta(description="The path of the field that is wrong, null when no field is to blame.")
    ]
    message: Annotated[str, Meta(description="What is wrong, a sentence for people.")]


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer from 400 on, except the 503 of `/livez` and `/readyz`."""

    error: Annotated[ErrorDetail, Meta(description="What is wrong.")]
