"""The words of the index: scopes, blocks, tiers, residencies, operations and cursors.

Block hashes are opaque bytes (8, 16 or 32 of them as a rule). Times are milliseconds since the Unix epoch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

ROOT = b""
"""The `prefix_hash` of a block that starts a chain. No engine hash is empty."""

MAX_HASH_BYTES = 240
"""Longest block hash accepted. A parent and a child hash share one LMDB key of at most 511 bytes."""

UNKNOWN_INDEX = None
"""The `block_index` of a block whose place in its chain was never reported."""

UNKNOWN_SCOPE = "?"
"""The `adapter_id` or `tenant_id` of blocks whose publisher has one and does not send it: neither none nor any."""


class CacheTier(StrEnum):
    """Where the bytes of a block lie. A closed set, fastest first."""

    __hash__ = str.__hash__
    """Enum's own hash is Python code, and a tier is looked up for every operation."""

    HBM = "hbm"
    REMOTE_HBM = "remote_hbm"
    CPU_DRAM = "cpu_dram"
    LOCAL_SSD = "local_ssd"
    OBJECT_STORE = "object_store"


TIERS: tuple[CacheTier, ...] = tuple(CacheTier)
TIER_NUMBER: dict[CacheTier, int] = {tier: number for number, tier in enumerate(TIERS)}


class IdentityScope(msgspec.Struct, frozen=True, order=True):
    """The identity in which block hashes are comparable. Blocks of two scopes never mix.

    `adapter_id` matches exactly: None is neither "" nor "any".
    """

    model_id: str
    tokenizer_id: str
    adapter_id: str | None = None
    tenant_id: str = ""


class KvBlockKey(msgspec.Struct, frozen=True):
    """One block of a chain. Within a scope and a group the block hash names the block; the rest describes it.

    `prefix_hash` is the hash of the parent block, `ROOT` at the start of a chain, None when it was never reported.
    `block_index` counts blocks from the start of the chain, None if unknown. `token_count` is in tokens, 0 if unknown.
    """

    model_id: str
    tokenizer_id: str
    adapter_id: str | None
    tenant_id: str
    prefix_hash: bytes | None
    block_hash: bytes
    block_index: int | None
    token_count: int
    group: int = 0

    @classmethod
    def within(
        cls,
        scope: IdentityScope,
        block_hash: bytes,
        *,
        prefix_hash: bytes | None = None,
        block_index: int | None = None,
        token_count: int = 0,
        group: int = 0,
    ) -> KvBlockKey:
        """The key of a block in `scope`."""
        return cls(
            scope.model_id,
            scope.tokenizer_id,
            scope.adapter_id,
            scope.tenant_id,
            prefix_hash,
            block_hash,
            block_index,
            token_count,
            group,
        )

    @property
    def scope(self) -> IdentityScope:
        """The scope that the key's fields spell out."""
        return IdentityScope(self.model_id, self.tokenizer_id, self.adapter_id, self.tenant_id)


class CacheResidency(msgspec.Struct, frozen=True):
    """The fact that a block is on a worker, at a tier. Its identity is (key, worker_id, tier).

    `bytes` is the size of one copy in bytes, 0 when unknown; `ref_count` is the number of physical copies.
    """

    key: KvBlockKey
    worker_id: str
    tier: CacheTier
    bytes: int = 0
    last_access_ms: int = 0
    ref_count: int = 1
    pinned: bool = False
    rank: int | None = None


class GroupKind(StrEnum):
    """How the attention of a KV-cache group uses its blocks, as far as a prefix hit depends on it."""

    FULL = "full"
    WINDOW = "window"
    STATE = "state"
    OTHER = "other"


class GroupSpec(msgspec.Struct, frozen=True):
    """What a worker said of one of its KV-cache groups."""

    kind: Annotated[GroupKind, Meta(description="How its attention uses the blocks.")] = GroupKind.FULL
    window: Annotated[int, Meta(description="The window of its attention in tokens, 0 when unknown.")] = 0
    block_size: Annotated[int, Meta(description="The size of a block in tokens, 0 when unknown.")] = 0

    def after(self, told: GroupSpec) -> GroupSpec:
        """This spec once a worker has told another. The larger block size stays: part of a block is told as a block."""
        return told if told.block_size >= self.block_size else GroupSpec(told.kind, told.window, self.block_size)


class StoreRun(msgspec.Struct, frozen=True, gc=False):
    """A worker stored a run of blocks under one parent. One per event, whatever the number of blocks.

    `consecutive` says that each block is the parent of the next one. Without it the engine left blocks out or sent bare
    hashes: each block takes its place in the chain from another record of the same worker and hash, if there is one.
    `tenant_from_parent`: the event names no tenant, so a run under a known parent belongs to the parent's.
    `token_count` is in tokens per block, `bytes_per_block` in bytes. `count_copies` adds to the `ref_count` of a record
    that exists; without it such a store only refreshes the record. `start_index` is where the publisher says that the
    first block stands in its chain; it counts for a consecutive run whose parent tells no index.
    """

    worker_id: str
    rank: int | None
    scope: IdentityScope
    tier: CacheTier
    block_hashes: tuple[bytes, ...]
    parent: bytes | None = None
    group: int = 0
    token_count: int = 0
    at_ms: int = 0
    bytes_per_block: int = 0
    consecutive: bool = True
    tenant_from_parent: bool = False
    count_copies: bool = True
    spec: GroupSpec | None = None
    start_index: int | None = None


class RemoveBlocks(msgspec.Struct, frozen=True, gc=False):
    """A worker dropped one copy of each of these blocks. `tier` or `group` None: wherever it has them."""

    worker_id: str
    block_hashes: tuple[bytes, ...]
    tier: CacheTier | None = None
    group: int | None = None


class ClearBlocks(msgspec.Struct, frozen=True, gc=False):
    """A worker dropped all its blocks, or all of one tier."""

    worker_id: str
    tier: CacheTier | None = None


Operation = StoreRun | RemoveBlocks | ClearBlocks


class Cursor(msgspec.Struct, frozen=True):
    """How far a stream has been applied. It is committed together with what its messages changed.

    `seq` is the last applied sequence number, -1 before the first one of an epoch. `fingerprint` identifies the payload
    of that message. `messages`, `blocks_stored` and `blocks_removed` count what was applied in this epoch.
    `engine_ms` is the engine's own time of the last message. `facts` is the translator's memory of the stream. `life`
    names what the numbers are of, where messages say it.
    """

    stream: str
    epoch: int
    seq: int
    fingerprint: bytes = b""
    source: str = ""
    worker_id: str = ""
    rank: int | None = None
    engine_ms: int = 0
    committed_ms: int = 0
    messages: int = 0
    blocks_stored: int = 0
    blocks_removed: int = 0
    trust: str = "fresh"
    reason: str = ""
    since_ms: int = 0
    facts: int = 0
    life: str = ""


class ApplyResult(msgspec.Struct):
    """What a bulk apply changed, in records (`stored`, `removed`, `cleared`), copies or blocks."""

    stored: int = 0
    copies_added: int = 0
    refreshed: int = 0
    removed: int = 0
    copies_removed: int = 0
    unknown_removals: int = 0
    cleared: int = 0


class Holding(msgspec.Struct, frozen=True):
    """How much one worker holds at one tier in one group: `blocks` in records, `bytes` in bytes."""

    worker_id: str
    rank: int | None
    tier: CacheTier
    group: int
    spec: GroupSpec
    blocks: int
    bytes: int


class WorkerMatch(msgspec.Struct, frozen=True):
    """For one worker, the prefix that it could serve, in blocks.

    `tiers` has the prefix within each tier alone, where there is any, `blocks` the longest of these, and
    `blocks_any_tier` the prefix of which every block lies on some tier.
    """

    worker_id: str
    rank: int | None
    tiers: dict[CacheTier, int]
    blocks: int
    blocks_any_tier: int


class IndexMetrics(msgspec.Struct, frozen=True):
    """Comparable figures of a backend. `resident_*` are live, the rest counts since it was opened.

    `bytes_written` counts the bytes of keys and values handed to the store, not what reached a disk.
    """

    resident_blocks: int = 0
    resident_bytes: int = 0
    puts: int = 0
    removes: int = 0
    prefix_scans: int = 0
    bytes_written: int = 0


class StoreHealth(msgspec.Struct, frozen=True):
    """How near a store is to its limits, and who holds it back. All 0 for a store without a file.

    `live_bytes` are in use of `limit_bytes`; the rest of the file is free to be used again. `oldest_reader_lag` is by
    how many transactions the oldest one that is read is older than the last one written; `oldest_reader_pid` reads it.
    `problem` says why the store could not tidy up its files, "" when it could: it works, and grows.
    """

    live_bytes: int = 0
    limit_bytes: int = 0
    readers: int = 0
    oldest_reader_lag: int = 0
    oldest_reader_pid: int = 0
    problem: str = ""
