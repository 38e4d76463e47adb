"""What the files say: changes of the index in a journal, and its whole content in a snapshot, as msgpack.

Runs of one record that have all but their hashes in common share a `Head`, so a block costs little more than its hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..model import (
    CacheResidency,
    CacheTier,
    ClearBlocks,
    Cursor,
    GroupSpec,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)

Scope = tuple[str, str, str | None, str]
"""The fields of an IdentityScope, in order."""


class _Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Written as an array: fields are told by their place."""


class Head(_Row, frozen=True):
    """What runs have in common."""

    worker_id: str
    rank: int | None
    scope: Scope
    tier: CacheTier
    group: int
    token_count: int
    bytes_per_block: int
    consecutive: bool
    tenant_from_parent: bool
    count_copies: bool
    spec: GroupSpec | None


class Stored(_Row, frozen=True, tag=0):
    """A StoreRun. `head` is the place of its head in the record."""

    head: int
    block_hashes: tuple[bytes, ...]
    parent: bytes | None
    at_ms: int
    start_index: int | None


class Removed(_Row, frozen=True, tag=1):
    """A RemoveBlocks."""

    worker_id: str
    block_hashes: tuple[bytes, ...]
    tier: CacheTier | None
    group: int | None


class Cleared(_Row, frozen=True, tag=2):
    """A ClearBlocks."""

    worker_id: str
    tier: CacheTier | None


class Applied(_Row, frozen=True, tag=0):
    """One `apply`."""

    heads: list[Head]
    operations: list[Stored | Removed | Cleared]
    cursors: list[Cursor]


class Put(_Row, frozen=True, tag=1):
    """One `put`."""

    residency: CacheResidency


class BlockRemoved(_Row, frozen=True, tag=2):
    """One `remove_block`."""

    scope: IdentityScope
    worker_id: str
    block_hash: bytes


class AllCleared(_Row, frozen=True, tag=3):
    """One `clear`."""


class StreamForgotten(_Row, frozen=True, tag=4):
    """One `forget_stream`."""

    stream: str


class PlaceBegins(_Row, frozen=True, tag=5):
    """In a snapshot: what follows is of this worker, tier and group."""

    worker_id: str
    rank: int | None
    tier: CacheTier
    group: int
    spec: GroupSpec


class SharedRun(_Row, frozen=True):
    """In a snapshot: consecutive blocks that were stored once, with one run. `scope` is its place in the record."""

    scope: int
    hashes: tuple[bytes, ...]
    parent: bytes | None
    base: int | None
    token_count: int
    at_ms: int
    size: int


class OwnRecord(_Row, frozen=True):
    """In a snapshot: one residency of a block that has records of its own. `scope` is its place in the record."""

    block_hash: bytes
    scope: int
    parent: bytes | None
    block_index: int | None
    token_count: int
    ref_count: int
    at_ms: int
    size: int
    pinned: bool


class Blocks(_Row, frozen=True, tag=6):
    """In a snapshot: some blocks of the place. All records of one block are in one of these."""

    scopes: list[Scope]
    runs: list[SharedRun]
    records: list[OwnRecord]


class SnapshotEnds(_Row, frozen=True, tag=7):
    """The last record of a snapshot that is complete."""

    records: int
    cursors: list[Cursor]


Change = Applied | Put | BlockRemoved | AllCleared | StreamForgotten
Content = PlaceBegins | Blocks | SnapshotEnds

encode = msgspec.msgpack.Encoder().encode
decode_change = msgspec.msgpack.Decoder(Change).decode
decode_content = msgspec.msgpack.Decoder(Content).decode


def applied(operations: Sequence[Operation], cursors: Sequence[Cursor]) -> Applied:
    """The record of one `apply`."""
    heads: dict[Head, int] = {}
    rows: list[Stored | Removed | Cleared] = []
    for operation in operations:
        if isinstance(operation, StoreRun):
            head = Head(
                operation.worker_id,
                operation.rank,
                fields_of(operation.scope),
                operation.tier,
                operation.group,
                operation.token_count,
                operation.bytes_per_block,
                operation.consecutive,
                operation.tenant_from_parent,
                operation.count_copies,
                operation.spec,
            )
            number = heads.setdefault(head, len(heads))
            rows.append(
                Stored(number, operation.block_hashes, operation.parent, operation.at_ms, operation.start_index)
            )
        elif isinstance(operation, RemoveBlocks):
            rows.append(Removed(operation.worker_id, operation.block_hashes, operation.tier, operation.group))
        else:
            rows.append(Cleared(operation.worker_id, operation.tier))
    return Applied(list(heads), rows, list(cursors))


def fields_of(scope: IdentityScope) -> Scope:
    """A scope as it is written."""
    return scope.model_id, scope.tokenizer_id, scope.adapter_id, scope.tenant_id


class Operations:
    """Makes operations out of records again. Equal scopes become one object, as long as it lives."""

    def __init__(self) -> None:
        self._scopes: dict[Scope, IdentityScope] = {}

    def of(self, record: Applied) -> list[Operation]:
        """The operations of one `apply`. Raises IndexError for a head that is not there."""
        heads = [(head, self.scope(head.scope)) for head in record.heads]
        operations: list[Operation] = []
        for row in record.operations:
            if isinstance(row, Stored):
                head, scope = heads[row.head]
                operations.append(
                    StoreRun(
                        head.worker_id,
                        head.rank,
                        scope,
                        head.tier,
                        row.block_hashes,
                        row.parent,
                        head.group,
                        head.token_count,
                        row.at_ms,
                        head.bytes_per_block,
                        head.consecutive,
                        head.tenant_from_parent,
                        head.count_copies,
                        head.spec,
                        row.start_index,
                    )
                )
            elif isinstance(row, Removed):
                operations.append(RemoveBlocks(row.worker_id, row.block_hashes, row.tier, row.group))
            else:
                operations.append(ClearBlocks(row.worker_id, row.tier))
        return operations

    def scope(self, fields: Scope) -> IdentityScope:
        """The scope of these fields."""
        scope = self._scopes.get(fields)
        if scope is None:
            scope = self._scopes[fields] = IdentityScope(*fields)
        return scope
