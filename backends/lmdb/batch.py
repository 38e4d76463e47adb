"""One write transaction: operations applied in order to an overlay of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from struct import Struct

import lmdb

from ..entries import Entry, PlaceRow, beside_sibling, merged, place_order, scope_order, told_index
from ..model import (
    ROOT,
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from .catalog import Tables, WriterCatalog
from .overlay import Overlay
from .rows import (
    LENGTH,
    NOBODY,
    PARENT_KNOWN,
    ROW,
    ROW_OF_ONE,
    holders,
    pack_entry,
    pack_row,
    row_key,
    sole_entry,
    sole_holder,
    unpack_row,
)

_HEAD = Struct(">III")
_INDEX = Struct(">i")
_TAIL = Struct(">IQQB")


class Batch:
    """The operations of one transaction. `finish` writes what they came to; the caller commits."""

    def __init__(
        self,
        txn: lmdb.Transaction[bytes],
        tables: Tables,
        catalog: WriterCatalog,
        overlay: Overlay | None = None,
    ) -> None:
        """`overlay` keeps the rows of a store that is not LMDB."""
        self._txn = txn
        self._catalog = catalog
        self._overlay = overlay or Overlay(txn, tables.blocks)
        self.result = ApplyResult()
        self.bytes_written = 0

    def run(self, operations: Sequence[Operation]) -> None:
        """Apply operations in order."""
        keys = [
            LENGTH[len(block_hash)] + block_hash + ROW
            for operation in operations
            if isinstance(operation, (StoreRun, RemoveBlocks))
            for block_hash in operation.block_hashes
        ]
        self._overlay.fetch(chain(keys, _parent_keys(operations)))
        self._apply(operations, keys)

    def _apply(self, operations: Sequence[Operation], keys: list[bytes]) -> None:
        """One after the other. What engines say most often, one new block of a chain, is stored right here."""
        rows = self._overlay.rows
        start = stored = 0
        last: StoreRun | None = None
        for run in operations:
            if (
                not isinstance(run, StoreRun)
                or len(run.block_hashes) != 1
                or not run.consecutive
                or rows[keys[start]] is not None
            ):
                start = self._apply_any(run, keys, start)
                last = last if isinstance(run, RemoveBlocks) else None
                continue
            if (
                last is None
                or run.scope is not last.scope
                or run.spec is not last.spec
                or run.worker_id is not last.worker_id
                or run.tier is not last.tier
                or run.group != last.group
            ):
                last, place, scope = run, *self._place_and_scope(run)
                counts = self._catalog.counting(place)
            key, parent = keys[start], run.parent
            start += 1
            own_scope, beside, flags = scope, None, PARENT_KNOWN
            if parent:
                parent_key = LENGTH[len(parent)] + parent + ROW
                beside = rows[parent_key]
                before = NOBODY if beside is None else sole_holder(beside)
                if before[0] == place and before[1] == scope and before[2] >= 0:
                    index = before[2] + 1
                else:
                    own_scope, index = self._chain_of(run, place)
            elif parent is None:
                parent, flags, index = ROOT, 0, told_index(run)
            else:
                index = 0
            if beside is not None and beside[0] == 0:
                rows[parent_key] = key[:-1] + beside[1:]
            elif flags:
                self._overlay.link(parent, run.block_hashes[0])
            size = run.bytes_per_block
            row = ROW_OF_ONE.pack(0, place, own_scope, 1, index, run.token_count, run.at_ms, size, flags, len(parent))
            rows[key] = row + parent
            stored += 1
            counts[0] += 1
            counts[1] += size
        self.result.stored += stored

    def _place_and_scope(self, run: StoreRun) -> tuple[int, int]:
        return self._catalog.place(self._txn, run), self._catalog.scope_number(self._txn, run.scope)

    def _apply_any(self, operation: Operation, keys: list[bytes], start: int) -> int:
        """Apply an operation whose first key is at `start`. Returns where the keys of the next one are."""
        if isinstance(operation, ClearBlocks):
            self.clear(operation)
            return start
        end = start + len(operation.block_hashes)
        if isinstance(operation, StoreRun):
            self._store(operation, keys[start:end])
        else:
            self._remove(operation, keys[start:end])
        return end

    def finish(self) -> None:
        """Write rows, links and counts."""
        self.bytes_written = self._overlay.write()
        self._catalog.flush(self._txn)

    def _live_entries(self, key: bytes) -> list[Entry]:
        row = self._overlay.row(key)
        if row is None:
            return []
        live = self._catalog.rows
        return [entry for entry in unpack_row(row)[1] if entry.place in live]

    def _store(self, run: StoreRun, keys: list[bytes]) -> None:
        place = self._catalog.place(self._txn, run)
        if not keys:
            return
        if not run.consecutive:
            for key, block_hash in zip(keys, run.block_hashes):
                self._store_block(key, block_hash, self._placed_by_sibling(run, key, place), run)
            return
        scope, index = self._chain_of(run, place)
        if any(map(self._overlay.rows.__getitem__, keys)) or len(set(keys)) < len(keys):
            self._store_mixed(run, keys, place, scope, index)
        else:
            self._store_new(run, keys, place, scope, index)

    def _store_new(self, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int) -> None:
        """Store a chain of blocks none of which has a row: rows are put together without an `Entry` in between."""
        head = _HEAD.pack(place, scope, 1)
        tail = _TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, PARENT_KNOWN)
        parent = run.parent
        if parent is None:
            first = _TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, 0) + b"\x00"
        else:
            first = tail + LENGTH[len(parent)] + parent
            self._overlay.link(parent, run.block_hashes[0])
        count = len(keys)
        names = [key[:-1] for key in keys]
        indexes = map(_INDEX.pack, range(index, index + count)) if index >= 0 else repeat(_INDEX.pack(-1))
        children = chain(names[1:], (b"\x00",))
        parents = chain((first,), map(tail.__add__, names))
        self._overlay.rows.update(zip(keys, map(b"".join, zip(children, repeat(head), indexes, parents))))
        self._catalog.count(place, count, count * run.bytes_per_block)
        self.result.stored += count

    def _store_mixed(self, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int) -> None:
        """Store a chain of blocks of which some have rows."""
        parent = run.parent
        for key, block_hash in zip(keys, run.block_hashes):
            entry = Entry(place, scope, 1, index, run.token_count, run.at_ms, run.bytes_per_block, False, parent)
            self._store_block(key, block_hash, entry, run)
            parent = block_hash
            if index >= 0:
                index += 1

    def _chain_of(self, run: StoreRun, place: int) -> tuple[int, int]:
        """The number of a run's scope and the index of its first block, from the worker's own record of the parent."""
        scope = self._catalog.scope_number(self._txn, run.scope)
        parent = run.parent
        if not parent:
            return scope, 0 if parent == ROOT else told_index(run)
        key = LENGTH[len(parent)] + parent + ROW
        row = self._overlay.rows[key]
        if row is None:
            return scope, told_index(run)
        sole_place, sole_scope, index = sole_holder(row)
        if sole_place == place and sole_scope == scope:
            return scope, index + 1 if index >= 0 else told_index(run)
        own = self._own_entry(run, key)
        if own is None:
            return scope, told_index(run)
        if run.tenant_from_parent and own.scope != scope:
            wanted, tenant = run.scope, self._catalog.scopes.scope(self._txn, own.scope).tenant_id
            wanted = IdentityScope(wanted.model_id, wanted.tokenizer_id, wanted.adapter_id, tenant)
            scope = self._catalog.scope_number(self._txn, wanted)
        same_group = self._catalog.rows[own.place].group == run.group
        return scope, own.block_index + 1 if same_group and own.block_index >= 0 else told_index(run)

    def _own_entry(self, run: StoreRun, key: bytes) -> Entry | None:
        """The worker's entry of a block that says most about a run: same group, then own tier, then the fastest."""
        own = self._catalog.places_of(run.worker_id)
        entries = [entry for entry in self._live_entries(key) if entry.place in own]
        if len(entries) < 2:
            return entries[0] if entries else None

        def order(entry: Entry) -> tuple[object, ...]:
            scope = self._catalog.scopes.scope(self._txn, entry.scope)
            return (*place_order(run, own[entry.place]), *scope_order(scope))

        return min(entries, key=order)

    def _placed_by_sibling(self, run: StoreRun, key: bytes, place: int) -> Entry:
        own = self._own_entry(run, key)
        scope = self._catalog.scope_number(self._txn, run.scope) if own is None else own.scope
        return beside_sibling(run, place, scope, own)

    def _store_block(self, key: bytes, block_hash: bytes, entry: Entry, run: StoreRun) -> None:
        """Store one block. An entry beside living ones of others is appended to the row as it is."""
        row = self._overlay.row(key)
        kept = b"\x00" if row is None else self._kept_beside(row, entry)
        if kept is not None:
            self._overlay.rows[key] = kept + pack_entry(entry)
            if entry.parent is not None:
                self._overlay.link(entry.parent, block_hash)
            self._catalog.count(entry.place, 1, entry.size)
            self.result.stored += 1
            return
        live = self._catalog.rows
        child, old = unpack_row(row or b"\x00")
        entries = [other for other in old if other.place in live]
        for at, same in enumerate(entries):
            if same.place == entry.place and same.scope == entry.scope:
                again = entries[at] = merged(same, entry, run.count_copies)
                self._catalog.count(entry.place, 0, again.copies * again.size - same.copies * same.size)
                if run.count_copies:
                    self.result.copies_added += 1
                else:
                    self.result.refreshed += 1
                break
        else:
            entries.append(entry)
            self._catalog.count(entry.place, 1, entry.size)
            self.result.stored += 1
        self._write_entries(key, block_hash, child, old, entries)

    def _kept_beside(self, row: bytes, entry: Entry) -> bytes | None:
        """What a new entry can be appended to, None when the row has to be taken apart."""
        live = self._catalog.rows
        sole = sole_entry(row)
        if sole is None:
            others = holders(row)
            return row if all(one[0] in live and one != entry[:2] for one in others) else None
        if sole.place in live:
            return row if sole[:2] != entry[:2] else None
        return row[: 1 + row[0]] if sole.parent == entry.parent else None

    def _write_entries(
        self, key: bytes, block_hash: bytes, child: bytes, old: list[Entry], entries: list[Entry]
    ) -> None:
        """Write a block's entries; keeps the links from its parents and, when the row goes, the one to its child."""
        overlay, live = self._overlay, self._catalog.rows
        if not entries:
            self._drop_row(key, block_hash, child, {entry.parent for entry in old})
            return
        overlay.rows[key] = pack_row(child, entries)
        parents = {entry.parent for entry in entries}
        for parent in {entry.parent for entry in old} - parents:
            if parent is not None:
                overlay.unlink(parent, block_hash)
        for parent in parents - {entry.parent for entry in old if entry.place in live}:
            if parent is not None:
                overlay.link(parent, block_hash)

    def _drop_row(self, key: bytes, block_hash: bytes, child: bytes, parents: Iterable[bytes | None]) -> None:
        overlay = self._overlay
        overlay.rows[key] = None
        for parent in parents:
            if parent is not None:
                overlay.unlink(parent, block_hash)
        if child:
            row = overlay.row(row_key(child))
            if row is not None and block_hash in row and self._has_parent(row, block_hash):
                overlay.link_by_key(block_hash, child)

    def _has_parent(self, row: bytes, parent: bytes) -> bool:
        live = self._catalog.rows
        sole = sole_entry(row)
        entries = unpack_row(row)[1] if sole is None else (sole,)
        return any(entry.parent == parent and entry.place in live for entry in entries)

    def _remove(self, removal: RemoveBlocks, keys: list[bytes]) -> None:
        places = {
            number for number, row in self._catalog.places_of(removal.worker_id).items() if _concerns(row, removal)
        }
        live = self._catalog.rows
        for key, block_hash in zip(keys, removal.block_hashes):
            row = self._overlay.row(key)
            sole = None if row is None else sole_entry(row)
            if row is not None and sole is not None and sole.place in places and sole.copies == 1:
                self._drop_row(key, block_hash, row[1 : 1 + row[0]], (sole.parent,))
                self._catalog.count(sole.place, -1, -sole.size)
                self.result.removed += 1
                self.result.copies_removed += 1
                continue
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
                self._catalog.count(entry.place, -gone, -entry.size)
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
        place = self._catalog.place_at(self._txn, residency.worker_id, residency.rank, residency.tier, block.group)
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

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        """Insert or replace records, looked up together."""
        hashes = {residency.key.block_hash for residency in residencies}
        parents = {residency.key.prefix_hash for residency in residencies}
        self._overlay.fetch(row_key(one) for one in hashes | parents if one)
        for residency in residencies:
            self.put(residency)

    def remove_scoped(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        """Remove a worker's records of a block in one scope, whatever their copies. Returns how many."""
        number = self._catalog.scopes.number(self._txn, scope)
        places = self._catalog.places_of(worker_id)
        return self._replace(block_hash, lambda entry: entry.scope != number or entry.place not in places, [])

    def purge(self, key: bytes, block_hash: bytes) -> None:
        """Rewrite a row without its dead entries."""
        row = self._overlay.row(key)
        if row is not None:
            child, old = unpack_row(row)
            self._write_entries(key, block_hash, child, old, self._live_entries(key))

    def purge_all(self, keys: Sequence[bytes]) -> None:
        """`purge` for many rows, fetched together. Called once, before anything else."""
        self._overlay.fetch(keys)
        for key in keys:
            self.purge(key, key[1:-1])

    def _replace(self, block_hash: bytes, keep: Callable[[Entry], bool], new: list[Entry]) -> int:
        key = row_key(block_hash)
        row = self._overlay.row(key)
        child, old = unpack_row(row) if row is not None else (b"", [])
        live = [entry for entry in old if entry.place in self._catalog.rows]
        kept = [entry for entry in live if keep(entry)]
        gone = [entry for entry in live if not keep(entry)]
        for entry in gone:
            self._catalog.count(entry.place, -1, -entry.size * entry.copies)
        for entry in new:
            self._catalog.count(entry.place, 1, entry.size * entry.copies)
        if gone or new:
            self._write_entries(key, block_hash, child, old, kept + new)
        return len(gone)


def _parent_keys(operations: Sequence[Operation]) -> list[bytes]:
    """Keys of the parents of runs, less those that are the last block of a run before."""
    keys = []
    ends = set()
    for operation in operations:
        if isinstance(operation, StoreRun):
            parent = operation.parent
            if parent and parent not in ends:
                keys.append(LENGTH[len(parent)] + parent + ROW)
            if operation.block_hashes:
                ends.add(operation.block_hashes[-1])
    return keys


def _concerns(row: PlaceRow, removal: RemoveBlocks) -> bool:
    return (removal.tier is None or row.tier is removal.tier) and (removal.group is None or row.group == removal.group)
