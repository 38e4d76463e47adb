"""The operations of one call, applied in order, for stores that keep a row of its own for each (block, place).

What the keys of rows and links are is each store's own; that they are put together many at a time is for speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from struct import Struct

from .entries import Entry, PlaceRow, beside_sibling, merged, place_order, scope_order, told_index
from .model import (
    ROOT,
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from .placed_catalog import WriterCatalog
from .placed_rows import ENTRY, LENGTH, PARENT_KNOWN, PARENT_LEN_AT, SCOPE_AND_INDEX, is_sole, pack_entry, unpack_row

_LINKED = b""
"""The value of a link."""
_HEAD = Struct(">II")
_INDEX = Struct(">i")
_TAIL = Struct(">IQQB")
_SOLE = Struct(">4xI16xQ")
"""Copies and size of a row's first entry."""

_Step = tuple[StoreRun | RemoveBlocks, tuple[int, ...], list[bytes], bytes]
"""An operation, its places, the keys of its rows (by place and then by block for a removal), and that of the parent."""

Look = Callable[[list[bytes]], Sequence[bytes | None]]
"""Values by key, None for a key that is not there."""


class PlacedBatch(ABC):
    """What one call comes to. `changes` is what is to be written, all or nothing."""

    def __init__(self, look: Look, catalog: WriterCatalog) -> None:
        self._look = look
        self._catalog = catalog
        self._rows: dict[bytes, bytes | None] = {}
        """By key, as they will be; None for no row."""
        self._stored: dict[bytes, bytes] = {}
        self._links: dict[bytes, bytes | None] = {}
        """By key; None for a link that is to go."""
        self.result = ApplyResult()

    @staticmethod
    @abstractmethod
    def row_keys(place: int, hashes: Sequence[bytes]) -> list[bytes]:
        """The keys of the rows of blocks at a place."""

    @staticmethod
    @abstractmethod
    def link_keys(place: int, parents: Sequence[bytes], hashes: Sequence[bytes], keys: Sequence[bytes]) -> list[bytes]:
        """The keys of the links from each of the parents to the block beside it.

        Both `parents` and `keys` are what `row_keys` makes of a block, or of `ROOT`, at the place.
        """

    def run(self, operations: Sequence[Operation]) -> None:
        """Apply operations in order. What is between two clears is looked up together."""
        part: list[StoreRun | RemoveBlocks] = []
        for operation in operations:
            if isinstance(operation, ClearBlocks):
                self._run_part(part)
                part = []
                self.clear(operation)
            else:
                part.append(operation)
        self._run_part(part)

    def _run_part(self, operations: Sequence[StoreRun | RemoveBlocks]) -> None:
        steps: list[_Step] = []
        wanted: list[bytes] = []
        ends: set[bytes] = set()
        for operation in operations:
            if isinstance(operation, RemoveBlocks):
                steps.append(self._removed_from(operation))
                wanted += steps[-1][2]
                continue
            place = self._catalog.place(operation)
            keys = self.row_keys(place, (*operation.block_hashes, operation.parent or ROOT))
            parent_key = keys.pop()
            steps.append((operation, (place,), keys, parent_key))
            wanted += keys
            if not operation.consecutive:
                wanted += self._keys_of_siblings(operation, place)
            elif operation.parent and parent_key not in ends:
                wanted.append(parent_key)
            if keys:
                ends.add(keys[-1])
        self._fetch(wanted)
        for operation, places, keys, parent_key in steps:
            if isinstance(operation, StoreRun):
                self._store_run(operation, places[0], keys, parent_key)
            else:
                self._remove(operation, places, keys)

    def _removed_from(self, removal: RemoveBlocks) -> _Step:
        places = self._catalog.places_of(removal.worker_id)
        concerned = tuple(number for number, row in places.items() if _concerns(row, removal))
        keys = [key for number in concerned for key in self.row_keys(number, removal.block_hashes)]
        return removal, concerned, keys, b""

    def _keys_of_siblings(self, run: StoreRun, place: int) -> list[bytes]:
        others = (number for number in self._catalog.places_of(run.worker_id) if number != place)
        return [key for number in others for key in self.row_keys(number, run.block_hashes)]

    def _fetch(self, keys: list[bytes]) -> None:
        """Look up the rows that are not known yet."""
        if self._rows:
            keys = [key for key in keys if key not in self._rows]
        if not keys:
            return
        values = self._look(keys)
        self._rows.update(zip(keys, values))
        if any(values):
            self._stored.update((key, value) for key, value in zip(keys, values) if value is not None)

    def _row(self, key: bytes) -> bytes | None:
        if key not in self._rows:
            self._fetch([key])
        return self._rows[key]

    def changes(self) -> dict[bytes, bytes | None]:
        """Rows, links, counts and names by key, as they are to be; None for what is to go."""
        stored = self._stored
        changed: dict[bytes, bytes | None] = {
            key: row
            for key, row in self._rows.items()
            if (row is not stored.get(key) if row is not None else key in stored)
        }
        changed.update(self._links)
        self._catalog.flush(changed)
        return changed

    def _store_run(self, run: StoreRun, place: int, keys: list[bytes], parent_key: bytes) -> None:
        if not keys:
            return
        if not run.consecutive:
            for key, block_hash in zip(keys, run.block_hashes):
                own = self._own_entry(run, block_hash)
                scope = self._catalog.scope_number(run.scope) if own is None else own.scope
                self._store_block(key, block_hash, beside_sibling(run, place, scope, own), run)
            return
        scope, index = self._chain_of(run, place, parent_key)
        if len(keys) == 1 and self._rows[keys[0]] is None:
            self._store_one(run, keys, place, scope, index, parent_key)
        elif any(map(self._rows.__getitem__, keys)) or len(set(keys)) < len(keys):
            self._store_mixed(run, keys, place, scope, index)
        else:
            self._store_new(run, keys, place, scope, index, parent_key)

    def _store_one(
        self, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int, parent_key: bytes
    ) -> None:
        """Store a block that has no row here."""
        parent, size = run.parent, run.bytes_per_block
        if parent is None:
            row = ENTRY.pack(scope, 1, index, run.token_count, run.at_ms, size, 0, 0)
        else:
            row = ENTRY.pack(scope, 1, index, run.token_count, run.at_ms, size, PARENT_KNOWN, len(parent)) + parent
            self._links[self.link_keys(place, (parent_key,), run.block_hashes, keys)[0]] = _LINKED
        self._rows[keys[0]] = row
        self._catalog.count(place, 1, size)
        self.result.stored += 1

    def _store_new(
        self, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int, parent_key: bytes
    ) -> None:
        """Store a chain of blocks none of which has a row here: rows are put together without an `Entry` in between."""
        head = _HEAD.pack(scope, 1)
        tail = _TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, PARENT_KNOWN)
        hashes, parent, count = run.block_hashes, run.parent, len(keys)
        named = [tail + LENGTH[len(one)] + one for one in (parent or ROOT, *hashes[:-1])]
        links = self.link_keys(place, (parent_key, *keys[:-1]), hashes, keys)
        if parent is None:
            named[0] = _TAIL.pack(run.token_count, run.at_ms, run.bytes_per_block, 0) + LENGTH[0]
            del links[0]
        indexes = map(_INDEX.pack, range(index, index + count)) if index >= 0 else repeat(_INDEX.pack(-1))
        self._rows.update(zip(keys, map(b"".join, zip(repeat(head), indexes, named))))
        self._links.update(zip(links, repeat(_LINKED)))
        self._catalog.count(place, count, count * run.bytes_per_block)
        self.result.stored += count

    def _store_mixed(self, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int) -> None:
        """Store a chain of blocks of which some have rows here."""
        parent = run.parent
        for key, block_hash in zip(keys, run.block_hashes):
            entry = Entry(place, scope, 1, index, run.token_count, run.at_ms, run.bytes_per_block, False, parent)
            self._store_block(key, block_hash, entry, run)
            parent = block_hash
            if index >= 0:
                index += 1

    def _store_block(self, key: bytes, block_hash: bytes, entry: Entry, run: StoreRun) -> None:
        row = self._rows[key]
        entries = [] if row is None else unpack_row(entry.place, row)
        for at, same in enumerate(entries):
            if same.scope == entry.scope:
                stored = merged(same, entry, run.count_copies)
                self._catalog.count(entry.place, 0, stored.copies * stored.size - same.copies * same.size)
                if run.count_copies:
                    self.result.copies_added += 1
                else:
                    self.result.refreshed += 1
                self._write(entry.place, key, block_hash, entries, [*entries[:at], stored, *entries[at + 1 :]])
                return
        self._catalog.count(entry.place, 1, entry.size)
        self.result.stored += 1
        self._write(entry.place, key, block_hash, entries, [*entries, entry])

    def _chain_of(self, run: StoreRun, place: int, parent_key: bytes) -> tuple[int, int]:
        """The number of a run's scope and the index of its first block, from the worker's own record of the parent."""
        scope = self._catalog.scope_number(run.scope)
        parent = run.parent
        if not parent:
            return scope, 0 if parent == ROOT else told_index(run)
        row = self._rows[parent_key]
        if row is not None and is_sole(row):
            sole_scope, index = SCOPE_AND_INDEX.unpack_from(row)
            if sole_scope == scope:
                return scope, index + 1 if index >= 0 else told_index(run)
        own = self._own_entry(run, parent)
        if own is None:
            return scope, told_index(run)
        if run.tenant_from_parent and own.scope != scope:
            wanted, tenant = run.scope, self._catalog.scope(own.scope).tenant_id
            wanted = IdentityScope(wanted.model_id, wanted.tokenizer_id, wanted.adapter_id, tenant)
            scope = self._catalog.scope_number(wanted)
        same_group = self._catalog.rows[own.place].group == run.group
        return scope, own.block_index + 1 if same_group and own.block_index >= 0 else told_index(run)

    def _own_entry(self, run: StoreRun, block_hash: bytes) -> Entry | None:
        """The worker's entry of a block that says most about a run: same group, then own tier, then the fastest."""
        own = self._catalog.places_of(run.worker_id)
        keys = {number: self._row_key(number, block_hash) for number in own}
        self._fetch(list(keys.values()))
        held = [(number, row) for number, key in keys.items() if (row := self._rows[key]) is not None]
        if not held:
            return None
        number, row = min(held, key=lambda one: place_order(run, own[one[0]])) if len(held) > 1 else held[0]
        entries = unpack_row(number, row)
        if len(entries) == 1:
            return entries[0]
        return min(entries, key=lambda entry: scope_order(self._catalog.scope(entry.scope)))

    def _write(self, place: int, key: bytes, block_hash: bytes, old: Sequence[Entry], new: Sequence[Entry]) -> None:
        """Write the entries of a block at a place, and keep the links from its parents."""
        self._rows[key] = b"".join(map(pack_entry, new)) if new else None
        was = {entry.parent for entry in old}
        parents = {entry.parent for entry in new}
        for parent in was - parents:
            if parent is not None:
                self._link(place, parent, block_hash, key, None)
        for parent in parents - was:
            if parent is not None:
                self._link(place, parent, block_hash, key, _LINKED)

    def _link(self, place: int, parent: bytes, block_hash: bytes, key: bytes, value: bytes | None) -> None:
        parents = self.row_keys(place, (parent,))
        self._links.update(dict.fromkeys(self.link_keys(place, parents, (block_hash,), (key,)), value))

    def _row_key(self, place: int, block_hash: bytes) -> bytes:
        return self.row_keys(place, (block_hash,))[0]

    def _remove(self, removal: RemoveBlocks, places: tuple[int, ...], keys: list[bytes]) -> None:
        hashes = removal.block_hashes
        found = [0] * len(hashes)
        for number, place in enumerate(places):
            self._remove_at(place, keys[number * len(hashes) : (number + 1) * len(hashes)], hashes, found)
        self.result.copies_removed += sum(found)
        self.result.unknown_removals += found.count(0)

    def _remove_at(self, place: int, keys: Sequence[bytes], hashes: Sequence[bytes], found: list[int]) -> None:
        """Take a copy of every record of these blocks at one place."""
        rows = self._rows
        parents, children, unlinked = [], [], []
        removed = size = 0
        for at, key in enumerate(keys):
            row = rows[key]
            if row is None:
                continue
            copies, entry_size = _SOLE.unpack_from(row)
            if copies == 1 and is_sole(row):
                rows[key] = None
                if row[PARENT_LEN_AT - 1] & PARENT_KNOWN:
                    parents.append(row[PARENT_LEN_AT + 1 :])
                    children.append(hashes[at])
                    unlinked.append(key)
                found[at] += 1
                removed += 1
                size += entry_size
                continue
            old = unpack_row(place, row)
            kept = [entry._replace(copies=entry.copies - 1) for entry in old if entry.copies > 1]
            found[at] += len(old)
            removed += len(old) - len(kept)
            size += sum(entry.size for entry in old)
            self._write(place, key, hashes[at], old, kept)
        self._links.update(dict.fromkeys(self.link_keys(place, self.row_keys(place, parents), children, unlinked)))
        if removed or size:
            self._catalog.count(place, -removed, -size)
        self.result.removed += removed

    def clear(self, clear: ClearBlocks) -> None:
        """Make the places of a worker dead."""
        for number, row in list(self._catalog.places_of(clear.worker_id).items()):
            if clear.tier is None or row.tier is clear.tier:
                self.result.cleared += self._catalog.bury(number)

    def clear_everything(self) -> None:
        """Make every place dead."""
        for worker_id in self._catalog.workers():
            self.clear(ClearBlocks(worker_id))

    def put(self, residency: CacheResidency) -> None:
        """Insert or replace one record."""
        block = residency.key
        place = self._catalog.place_at(residency.worker_id, residency.rank, residency.tier, block.group)
        entry = Entry(
            place,
            self._catalog.scope_number(block.scope),
            residency.ref_count,
            -1 if block.block_index is None else block.block_index,
            block.token_count,
            residency.last_access_ms,
            residency.bytes,
            residency.pinned,
            block.prefix_hash,
        )
        self._replace(block.block_hash, place, lambda other: other.scope != entry.scope, [entry])

    def remove_scoped(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        """Remove a worker's records of a block in one scope, whatever their copies. Returns how many."""
        number = self._catalog.known_scope(scope)
        places = list(self._catalog.places_of(worker_id))
        return sum(self._replace(block_hash, place, lambda entry: entry.scope != number, []) for place in places)

    def _replace(self, block_hash: bytes, place: int, keep: Callable[[Entry], bool], new: list[Entry]) -> int:
        key = self._row_key(place, block_hash)
        row = self._row(key)
        old = [] if row is None else unpack_row(place, row)
        kept = [entry for entry in old if keep(entry)]
        gone = [entry for entry in old if not keep(entry)]
        records = len(new) - len(gone)
        size = sum(entry.size * entry.copies for entry in new) - sum(entry.size * entry.copies for entry in gone)
        if gone or new:
            self._catalog.count(place, records, size)
            self._write(place, key, block_hash, old, kept + new)
        return len(gone)

    def sweep(self, keys: Iterable[bytes]) -> None:
        """Delete rows and links of dead places."""
        self._links.update(dict.fromkeys(keys))


def _concerns(row: PlaceRow, removal: RemoveBlocks) -> bool:
    return (removal.tier is None or row.tier is removal.tier) and (removal.group is None or row.group == removal.group)
