"""One write transaction: operations applied to an overlay of rows, written once, in key order, at the end.

Rows that the operations touch are fetched together beforehand, so a block costs one look-up and one insertion however
often the batch touches it, and both in key order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from struct import Struct

import lmdb

from ..model import (
    ROOT,
    TIER_NUMBER,
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from .catalog import Tables, WriterCatalog
from .rows import ENTRY, PARENT_KNOWN, ROW, Entry, PlaceRow, link_key, pack_row, row_key, unpack_row

_ENTRY_HEAD = Struct(">III")
_ENTRY_INDEX = Struct(">i")
_ENTRY_TAIL = Struct(">IQQB")
assert _ENTRY_HEAD.size + _ENTRY_INDEX.size + _ENTRY_TAIL.size + 1 == ENTRY.size

_Keep = Callable[[Entry], bool]

_LENGTH = tuple(bytes((length,)) for length in range(256))


class Batch:
    """The operations of one transaction. `finish` writes what they came to; the caller commits."""

    def __init__(self, txn: lmdb.Transaction, tables: Tables, catalog: WriterCatalog) -> None:
        self._txn = txn
        self._blocks = tables.blocks
        self._catalog = catalog
        self._rows: dict[bytes, bytes | None] = {}
        self._dirty: set[bytes] = set()
        self._links: dict[bytes, bool] = {}
        self.result = ApplyResult()
        self.bytes_written = 0

    def run(self, operations: Sequence[Operation]) -> None:
        """Apply operations in order."""
        prepared = [(operation, _keys_of(operation)) for operation in operations]
        self._fetch(prepared)
        for operation, keys in prepared:
            if isinstance(operation, StoreRun):
                self._store(operation, keys)
            elif isinstance(operation, RemoveBlocks):
                self._remove(operation, keys)
            else:
                self.clear(operation)

    def finish(self) -> None:
        """Write rows and links."""
        rows, txn, blocks = self._rows, self._txn, self._blocks
        puts = [(key, row) for key in self._dirty if (row := rows[key]) is not None]
        puts += [(key, b"") for key, wanted in self._links.items() if wanted]
        puts.sort()
        if puts:
            txn.cursor(blocks).putmulti(puts)
        deletes = [key for key in self._dirty if rows[key] is None]
        deletes += [key for key, wanted in self._links.items() if not wanted]
        deletes.sort()
        for key in deletes:
            txn.delete(key, db=blocks)
        self.bytes_written = sum(len(key) + len(row) for key, row in puts)
        self._catalog.flush(txn)

    def _fetch(self, prepared: Iterable[tuple[Operation, list[bytes]]]) -> None:
        rows = self._rows
        for operation, keys in prepared:
            rows.update(dict.fromkeys(keys))
            if isinstance(operation, StoreRun) and operation.parent:
                rows[row_key(operation.parent)] = None
        rows.update(self._txn.cursor(self._blocks).getmulti(sorted(rows)))

    def _row(self, key: bytes) -> bytes | None:
        try:
            return self._rows[key]
        except KeyError:
            row = self._rows[key] = self._txn.get(key, db=self._blocks)
            return row

    def _set_row(self, key: bytes, row: bytes | None) -> None:
        self._rows[key] = row
        self._dirty.add(key)

    def _live_entries(self, key: bytes) -> list[Entry]:
        row = self._row(key)
        if row is None:
            return []
        live = self._catalog.rows
        return [entry for entry in unpack_row(row)[1] if entry.place in live]

    def _store(self, run: StoreRun, keys: list[bytes]) -> None:
        catalog, txn = self._catalog, self._txn
        place = catalog.place(txn, run.worker_id, run.rank, run.tier, run.group)
        if run.spec is not None:
            catalog.describe(txn, place, run.spec)
        if not keys:
            return
        if run.consecutive:
            self._store_chain(run, keys, place)
            return
        for key, block_hash in zip(keys, run.block_hashes):
            self._merge(key, block_hash, b"", self._placed_by_sibling(run, key, place), run)

    def _store_chain(self, run: StoreRun, keys: list[bytes], place: int) -> None:
        """Store blocks of which each is the parent of the next. A block without a row gets one without being unpacked."""
        scope, base = self._chain_of(run)
        scope_number = self._catalog.scope_number(self._txn, scope)
        head = _ENTRY_HEAD.pack(place, scope_number, 1)
        tail = _ENTRY_TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, PARENT_KNOWN)
        unknown_tail = _ENTRY_TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, 0)
        rows, dirty = self._rows, self._dirty
        hashes = run.block_hashes
        last = len(hashes) - 1
        parent = run.parent
        index = -1 if base is None else base
        new = 0
        if parent is not None and rows[keys[0]] is None:
            self._link(parent, hashes[0])
        for at, key in enumerate(keys):
            block_hash = hashes[at]
            child = b"" if at == last else hashes[at + 1]
            if rows[key] is None:
                rows[key] = b"".join(
                    (
                        _LENGTH[len(child)],
                        child,
                        head,
                        _ENTRY_INDEX.pack(index),
                        unknown_tail if parent is None else tail,
                        _LENGTH[len(parent or b"")],
                        parent or b"",
                    )
                )
                dirty.add(key)
                new += 1
            else:
                entry = Entry(
                    place, scope_number, 1, index, run.token_count, run.at_ms, run.bytes_per_block, False, parent
                )
                self._merge(key, block_hash, child, entry, run)
            parent = block_hash
            if index >= 0:
                index += 1
        self._catalog.count(place, new, new * run.bytes_per_block)
        self.result.stored += new

    def _chain_of(self, run: StoreRun) -> tuple[IdentityScope, int | None]:
        if run.parent is None:
            return run.scope, None
        if run.parent == ROOT:
            return run.scope, 0
        key = row_key(run.parent)
        own = self._own_entry(run, key)
        if own is None:
            return run.scope, None
        scope = run.scope
        if run.tenant_from_parent:
            tenant = self._catalog.scopes.scope(self._txn, own.scope).tenant_id
            if tenant != scope.tenant_id:
                scope = IdentityScope(scope.model_id, scope.tokenizer_id, scope.adapter_id, tenant)
        same_group = self._catalog.rows[own.place].group == run.group
        return scope, own.index + 1 if same_group and own.index >= 0 else None

    def _own_entry(self, run: StoreRun, key: bytes) -> Entry | None:
        """The worker's entry of a block that says most about a run: same group, then own tier, then the fastest."""
        own = self._catalog.places_of(run.worker_id)
        entries = [entry for entry in self._live_entries(key) if entry.place in own]
        if len(entries) < 2:
            return entries[0] if entries else None

        def order(entry: Entry) -> tuple[object, ...]:
            place = own[entry.place]
            scope = self._catalog.scopes.scope(self._txn, entry.scope)
            return (
                place.group != run.group,
                place.tier is not run.tier,
                TIER_NUMBER[place.tier],
                place.group,
                scope.model_id,
                scope.tokenizer_id,
                scope.adapter_id is not None,
                scope.adapter_id or "",
                scope.tenant_id,
            )

        return min(entries, key=order)

    def _placed_by_sibling(self, run: StoreRun, key: bytes, place: int) -> Entry:
        own = self._own_entry(run, key)
        if own is None:
            scope = self._catalog.scope_number(self._txn, run.scope)
            return Entry(place, scope, 1, -1, run.token_count, run.at_ms, run.bytes_per_block, False, None)
        same_size = run.token_count in (0, own.tokens)
        return Entry(
            place,
            own.scope,
            1,
            own.index if same_size else -1,
            own.tokens if same_size else run.token_count,
            run.at_ms,
            run.bytes_per_block,
            False,
            own.parent if same_size else None,
        )

    def _merge(self, key: bytes, block_hash: bytes, child: bytes, entry: Entry, run: StoreRun) -> None:
        """Store one block whose row may exist."""
        row = self._row(key)
        old_child, old = unpack_row(row) if row is not None else (b"", [])
        live = self._catalog.rows
        entries = [other for other in old if other.place in live]
        for at, same in enumerate(entries):
            if same.place == entry.place and same.scope == entry.scope:
                merged = entries[at] = _merged(same, entry, run.count_copies)
                self._catalog.count(entry.place, 0, merged.copies * merged.bytes - same.copies * same.bytes)
                if run.count_copies:
                    self.result.copies_added += 1
                else:
                    self.result.refreshed += 1
                break
        else:
            entries.append(entry)
            self._catalog.count(entry.place, 1, entry.bytes)
            self.result.stored += 1
        self._write_entries(key, block_hash, old_child or child, old, entries)
        if child:
            self._link(block_hash, child)

    def _write_entries(
        self, key: bytes, block_hash: bytes, child: bytes, old: list[Entry], entries: list[Entry]
    ) -> None:
        """Write a block's entries; keeps the links from its parents and, when the row goes, the one to its child."""
        self._set_row(key, pack_row(child, entries) if entries else None)
        live = self._catalog.rows
        parents = {entry.parent for entry in entries}
        for parent in {entry.parent for entry in old} - parents:
            if parent is not None:
                self._links[link_key(parent, block_hash)] = False
        for parent in parents - {entry.parent for entry in old if entry.place in live}:
            if parent is not None:
                self._link(parent, block_hash)
        if not entries and child and any(e.parent == block_hash for e in self._live_entries(row_key(child))):
            self._links[link_key(block_hash, child)] = True

    def _link(self, parent: bytes, child: bytes) -> None:
        """Make a child findable from its parent: inside the parent's row if that is at hand and has room, else by a key."""
        key = row_key(parent)
        row = self._rows.get(key)
        if row is not None:
            if row[0] == 0:
                self._set_row(key, _LENGTH[len(child)] + child + row[1:])
                return
            if row[1 : 1 + row[0]] == child:
                return
        self._links[link_key(parent, child)] = True

    def _remove(self, removal: RemoveBlocks, keys: list[bytes]) -> None:
        places = {
            number for number, row in self._catalog.places_of(removal.worker_id).items() if _concerns(row, removal)
        }
        live = self._catalog.rows
        for key, block_hash in zip(keys, removal.block_hashes):
            row = self._row(key)
            child, old = unpack_row(row) if row is not None else (b"", [])
            kept = []
            found = 0
            for entry in old:
                if entry.place not in places:
                    if entry.place in live:
                        kept.append(entry)
                    continue
                found += 1
                gone = entry.copies <= 1
                self._catalog.count(entry.place, -gone, -entry.bytes)
                if gone:
                    self.result.removed += 1
                else:
                    kept.append(entry._replace(copies=entry.copies - 1))
            if found:
                self._write_entries(key, block_hash, child, old, kept)
            self.result.copies_removed += found
            self.result.unknown_removals += not found

    def clear(self, clear: ClearBlocks) -> None:
        """Make the places of a worker dead."""
        for number, row in list(self._catalog.places_of(clear.worker_id).items()):
            if clear.tier is None or row.tier is clear.tier:
                self.result.cleared += self._catalog.bury(self._txn, number)

    def put(self, residency: CacheResidency) -> None:
        """Insert or replace one record."""
        block = residency.key
        place = self._catalog.place(self._txn, residency.worker_id, residency.rank, residency.tier, block.group)
        entry = Entry(
            place,
            self._catalog.scope_number(self._txn, block.scope),
            residency.ref_count,
            -1 if block.block_index is None else block.block_index,
            block.token_count,
            residency.last_access_ms,
            residency.bytes,
            residency.pinned,
            block.prefix_hash,
        )
        self._replace(block.block_hash, lambda other: other[:2] != entry[:2], [entry])

    def remove_scoped(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        """Remove a worker's records of a block in one scope, whatever their copies. Returns how many."""
        number = self._catalog.scopes.number(self._txn, scope)
        places = self._catalog.places_of(worker_id)
        return self._replace(block_hash, lambda entry: entry.scope != number or entry.place not in places, [])

    def purge(self, key: bytes, block_hash: bytes) -> None:
        """Rewrite a row without its dead entries."""
        row = self._row(key)
        if row is not None:
            child, old = unpack_row(row)
            self._write_entries(key, block_hash, child, old, self._live_entries(key))

    def _replace(self, block_hash: bytes, keep: _Keep, new: list[Entry]) -> int:
        key = row_key(block_hash)
        row = self._row(key)
        child, old = unpack_row(row) if row is not None else (b"", [])
        live = [entry for entry in old if entry.place in self._catalog.rows]
        kept = [entry for entry in live if keep(entry)]
        gone = [entry for entry in live if not keep(entry)]
        for entry in gone:
            self._catalog.count(entry.place, -1, -entry.bytes * entry.copies)
        for entry in new:
            self._catalog.count(entry.place, 1, entry.bytes * entry.copies)
        if gone or new:
            self._write_entries(key, block_hash, child, old, kept + new)
        return len(gone)


def _merged(same: Entry, entry: Entry, count_copies: bool) -> Entry:
    return Entry(
        same.place,
        same.scope,
        same.copies + count_copies,
        same.index if entry.index < 0 else entry.index,
        entry.tokens or same.tokens,
        entry.at_ms or same.at_ms,
        entry.bytes or same.bytes,
        same.pinned,
        same.parent if entry.parent is None else entry.parent,
    )


def _concerns(row: PlaceRow, removal: RemoveBlocks) -> bool:
    return (removal.tier is None or row.tier is removal.tier) and (removal.group is None or row.group == removal.group)


def _keys_of(operation: Operation) -> list[bytes]:
    if isinstance(operation, ClearBlocks):
        return []
    return [_LENGTH[len(block_hash)] + block_hash + ROW for block_hash in operation.block_hashes]
