"""The numbers that stand for places and scopes in the rows, and the counts kept for each place.

`WriterCatalog` belongs to the writer thread and to one write transaction at a time; when a transaction is aborted the
catalog is loaded again. `PlaceCache` and `ScopeNames` serve readers, of any thread or process.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import msgspec

import lmdb

from ..entries import LivePlaces, PlaceRow, live_places
from ..model import CacheTier, GroupSpec, IdentityScope, StoreRun
from .rows import COUNT, PLACE

_encode = msgspec.msgpack.encode
_decode_place = msgspec.msgpack.Decoder(PlaceRow).decode
_decode_scope = msgspec.msgpack.Decoder(IdentityScope).decode

_VERSION_KEY = b"places_version"
_NEXT_PLACE_KEY = b"next_place"
_NEXT_SCOPE_KEY = b"next_scope"
_SCOPE_CACHE_MAX = 100_000


class Tables(NamedTuple):
    """The named databases of one environment."""

    blocks: lmdb._Database
    places: lmdb._Database
    counts: lmdb._Database
    dead: lmdb._Database
    scopes: lmdb._Database
    streams: lmdb._Database
    meta: lmdb._Database


def number_of(txn: lmdb.Transaction[bytes], table: lmdb._Database, key: bytes) -> int:
    """A stored number, 0 when absent."""
    return int.from_bytes(txn.get(key, b"", db=table), "big")


class ScopeNames:
    """Numbers of scopes, looked up as needed. A number never changes its meaning, so a cached one is never stale."""

    def __init__(self, table: lmdb._Database) -> None:
        self._table = table
        self._by_number: dict[int, IdentityScope] = {}
        self._by_scope: dict[IdentityScope, int] = {}

    def scope(self, txn: lmdb.Transaction[bytes], number: int) -> IdentityScope:
        """The scope behind a number that some row uses."""
        scope = self._by_number.get(number)
        if scope is None:
            scope = _decode_scope(txn.get(PLACE.pack(number), b"", db=self._table))
            self._remember(scope, number)
        return scope

    def number(self, txn: lmdb.Transaction[bytes], scope: IdentityScope) -> int | None:
        """The number of a scope, None when no row uses it."""
        number = self._by_scope.get(scope)
        if number is None:
            stored = txn.get(_digest(scope), db=self._table)
            if stored is None:
                return None
            number = PLACE.unpack(stored)[0]
            self._remember(scope, number)
        return number

    def add(self, txn: lmdb.Transaction[bytes], scope: IdentityScope, number: int) -> None:
        """Name a scope, in a write transaction."""
        txn.put(PLACE.pack(number), _encode(scope), db=self._table)
        txn.put(_digest(scope), PLACE.pack(number), db=self._table)
        self._remember(scope, number)

    def _remember(self, scope: IdentityScope, number: int) -> None:
        if len(self._by_scope) >= _SCOPE_CACHE_MAX:
            self._by_scope.clear()
            self._by_number.clear()
        self._by_scope[scope] = number
        self._by_number[number] = scope


def _digest(scope: IdentityScope) -> bytes:
    return blake2b(_encode(scope), digest_size=16).digest()


def read_places(txn: lmdb.Transaction[bytes], tables: Tables) -> dict[int, PlaceRow]:
    """Every live place."""
    return decode_places(txn.cursor(tables.places))


def decode_places(stored: Iterable[tuple[bytes, bytes]]) -> dict[int, PlaceRow]:
    """Places by number, from the rows of their table."""
    return {PLACE.unpack(key)[0]: _decode_place(value) for key, value in stored}


class PlaceCache:
    """The live places as of a read transaction, decoded again only when their version has changed."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._cached = LivePlaces(-1, {}, {}, 1)

    def places(self, txn: lmdb.Transaction[bytes]) -> LivePlaces:
        """The places of the state that `txn` reads."""
        version = number_of(txn, self._tables.meta, _VERSION_KEY)
        cached = self._cached
        if cached.version != version:
            cached = self._cached = live_places(version, read_places(txn, self._tables))
        return cached


class WriterCatalog:
    """Places, scopes and counts as the writer knows them, and what of them the current transaction must write."""

    def __init__(self, txn: lmdb.Transaction[bytes], tables: Tables) -> None:
        self._tables = tables
        self.scopes = ScopeNames(tables.scopes)
        self.rows = read_places(txn, tables)
        self.counts = {PLACE.unpack(key)[0]: list(COUNT.unpack(value)) for key, value in txn.cursor(tables.counts)}
        self._numbers = {(row.worker_id, row.tier, row.group): number for number, row in self.rows.items()}
        self._by_worker: dict[str, dict[int, PlaceRow]] = {}
        for number, row in self.rows.items():
            self._by_worker.setdefault(row.worker_id, {})[number] = row
        self._next_place = number_of(txn, tables.meta, _NEXT_PLACE_KEY)
        self._next_scope = number_of(txn, tables.meta, _NEXT_SCOPE_KEY)
        self._changed_counts: set[int] = set()
        self._places_changed = False
        self._last_scope: tuple[IdentityScope | None, int] = (None, -1)

    def place(self, txn: lmdb.Transaction[bytes], run: StoreRun) -> int:
        """The number of the place of a run; notes what the run says of its group."""
        number = self._numbers.get((run.worker_id, run.tier, run.group))
        if number is None:
            number = self.place_at(txn, run.worker_id, run.rank, run.tier, run.group)
        spec = run.spec
        if spec is None or spec is (known := self.rows[number].spec):
            return number
        if spec != known and (spec := known.after(spec)) != known:
            self._write(txn, number, msgspec.structs.replace(self.rows[number], spec=spec))
        return number

    def place_at(
        self, txn: lmdb.Transaction[bytes], worker_id: str, rank: int | None, tier: CacheTier, group: int
    ) -> int:
        """The number of a place, a new one if the worker has no such place."""
        number = self._numbers.get((worker_id, tier, group))
        if number is None:
            number = self._next_place
            self._next_place += 1
            txn.put(_NEXT_PLACE_KEY, PLACE.pack(self._next_place), db=self._tables.meta)
            self.counts[number] = [0, 0]
            self._changed_counts.add(number)
            self._numbers[worker_id, tier, group] = number
            self._write(txn, number, PlaceRow(worker_id, rank, tier, group, GroupSpec()))
        return number

    def _write(self, txn: lmdb.Transaction[bytes], number: int, row: PlaceRow) -> None:
        self.rows[number] = row
        self._by_worker.setdefault(row.worker_id, {})[number] = row
        txn.put(PLACE.pack(number), _encode(row), db=self._tables.places)
        self._places_changed = True

    def workers(self) -> list[str]:
        """Every worker that has a live place."""
        return list(self._by_worker)

    def places_of(self, worker_id: str) -> dict[int, PlaceRow]:
        """The live places of a worker."""
        return self._by_worker.get(worker_id, {})

    def scope_number(self, txn: lmdb.Transaction[bytes], scope: IdentityScope) -> int:
        """The number of a scope, a new one if it is new."""
        known = self._last_scope
        if scope is known[0]:
            return known[1]
        number = self.scopes.number(txn, scope)
        if number is None:
            number = self._next_scope
            self._next_scope += 1
            txn.put(_NEXT_SCOPE_KEY, PLACE.pack(self._next_scope), db=self._tables.meta)
            self.scopes.add(txn, scope, number)
        self._last_scope = (scope, number)
        return number

    def count(self, number: int, records: int, size: int) -> None:
        """Add to the records and bytes of a place."""
        counts = self.counting(number)
        counts[0] += records
        counts[1] += size

    def counting(self, number: int) -> list[int]:
        """The records and bytes of a place, to be added to."""
        self._changed_counts.add(number)
        return self.counts[number]

    def bury(self, txn: lmdb.Transaction[bytes], number: int) -> int:
        """Make a place dead: its entries no longer count. Returns how many there were."""
        row = self.rows.pop(number)
        records: int = self.counts.pop(number)[0]
        del self._numbers[row.worker_id, row.tier, row.group]
        del self._by_worker[row.worker_id][number]
        if not self._by_worker[row.worker_id]:
            del self._by_worker[row.worker_id]
        self._changed_counts.discard(number)
        key = PLACE.pack(number)
        txn.delete(key, db=self._tables.places)
        txn.delete(key, db=self._tables.counts)
        if records:
            txn.put(key, b"", db=self._tables.dead)
        self._places_changed = True
        return records

    def flush(self, txn: lmdb.Transaction[bytes]) -> None:
        """Write the changed counts, and a new version when a place appeared, changed or went."""
        for number in self._changed_counts:
            txn.put(PLACE.pack(number), COUNT.pack(*self.counts[number]), db=self._tables.counts)
        self._changed_counts.clear()
        if self._places_changed:
            version = number_of(txn, self._tables.meta, _VERSION_KEY) + 1
            txn.put(_VERSION_KEY, version.to_bytes(8, "big"), db=self._tables.meta)
            self._places_changed = False

    def totals(self) -> tuple[int, int]:
        """Records and bytes over all live places."""
        counts = list(self.counts.values())
        return sum(records for records, _ in counts), sum(size for _, size in counts)
