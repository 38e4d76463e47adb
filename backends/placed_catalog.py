"""The numbers that stand for places and scopes in the keys and rows, and the counts kept for each place.

Of stores that keep a row for each (block, place). `WriterCatalog` belongs to the writer thread and to one batch at a
time; when a batch is given up the catalog is loaded again. `ScopeNames` of its own serves the readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Protocol

import msgspec

from .entries import LivePlaces, PlaceRow, live_places
from .model import CacheTier, Cursor, GroupSpec, IdentityScope, StoreRun
from .placed_rows import COUNT, COUNT_KEY, CURSOR_KEY, DEAD_KEY, DIGEST_KEY, META_KEY, NUMBER, PLACE_KEY, SCOPE_KEY

_encode = msgspec.msgpack.encode
_decode_place = msgspec.msgpack.Decoder(PlaceRow).decode
_decode_scope = msgspec.msgpack.Decoder(IdentityScope).decode
_decode_cursor = msgspec.msgpack.Decoder(Cursor).decode

_SCOPE_CACHE_MAX = 100_000


class Question(Protocol):
    """A look at a store as of one moment."""

    def under(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """Every key that begins with `prefix`, and its value."""


class Store(Protocol):
    """What keeps the tables."""

    live: LivePlaces
    """The places that go with what is stored."""

    def get(self, key: bytes) -> bytes | None:
        """One value, None when there is none."""

    def asking(self) -> AbstractContextManager[Question]:
        """A look at what is stored."""


def numbered(question: Question, prefix: bytes) -> list[tuple[int, bytes]]:
    """The numbers and values under a prefix of the small tables."""
    return [(NUMBER.unpack(key[len(prefix) :])[0], value) for key, value in question.under(prefix)]


def read_places(question: Question) -> dict[int, PlaceRow]:
    """Every live place."""
    return {number: _decode_place(value) for number, value in numbered(question, PLACE_KEY)}


def read_counts(question: Question) -> dict[int, tuple[int, int]]:
    """Records and bytes of every live place."""
    return {number: COUNT.unpack(value) for number, value in numbered(question, COUNT_KEY)}


def read_cursors(question: Question, stream_of: Callable[[bytes], str]) -> dict[str, Cursor]:
    """Every cursor by its stream's name, which the store reads from its key."""
    return {stream_of(key): _decode_cursor(value) for key, value in question.under(CURSOR_KEY)}


class ScopeNames:
    """Numbers of scopes, looked up as needed. A number never changes its meaning, so a cached one is never stale."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_number: dict[int, IdentityScope] = {}
        self._by_scope: dict[IdentityScope, int] = {}

    def scope(self, number: int) -> IdentityScope:
        """The scope behind a number that some row uses."""
        scope = self._by_number.get(number)
        if scope is None:
            scope = _decode_scope(self._store.get(SCOPE_KEY + NUMBER.pack(number)) or b"")
            self.remember(scope, number)
        return scope

    def number(self, scope: IdentityScope) -> int | None:
        """The number of a scope, None when no row uses it."""
        number = self._by_scope.get(scope)
        if number is None:
            stored = self._store.get(digest_key(scope))
            if stored is None:
                return None
            number = int(NUMBER.unpack(stored)[0])
            self.remember(scope, number)
        return number

    def remember(self, scope: IdentityScope, number: int) -> None:
        """Keep a pair at hand."""
        if len(self._by_scope) >= _SCOPE_CACHE_MAX:
            self._by_scope.clear()
            self._by_number.clear()
        self._by_scope[scope] = number
        self._by_number[number] = scope


def digest_key(scope: IdentityScope) -> bytes:
    """The key under which a scope's number is found."""
    return DIGEST_KEY + blake2b(_encode(scope), digest_size=16).digest()


class WriterCatalog:
    """Places, scopes and counts as the writer knows them, and what of them the current batch must write."""

    def __init__(self, store: Store, meta_key: Callable[[str], bytes]) -> None:
        """`meta_key` gives the store's keys of numbers that belong to the whole index, by their names."""
        self._scopes = ScopeNames(store)
        self._next_place_key, self._next_scope_key = meta_key("next_place"), meta_key("next_scope")
        with store.asking() as question:
            self.rows = read_places(question)
            self.counts = read_counts(question)
            self.dead = {number for number, _ in numbered(question, DEAD_KEY)}
            meta = dict(question.under(META_KEY))
        self._numbers = {(row.worker_id, row.tier, row.group): number for number, row in self.rows.items()}
        self._by_worker: dict[str, dict[int, PlaceRow]] = {}
        for number, row in self.rows.items():
            self._by_worker.setdefault(row.worker_id, {})[number] = row
        self.next_place = int.from_bytes(meta.get(self._next_place_key, b""), "big")
        self._next_scope = int.from_bytes(meta.get(self._next_scope_key, b""), "big")
        self._stored_next_place = self.next_place
        self._new_scopes: dict[IdentityScope, int] = {}
        self._new_numbers: dict[int, IdentityScope] = {}
        self._changed_places: set[int] = set()
        self._changed_counts: set[int] = set()
        self._buried: dict[int, int] = {}
        self._swept: set[int] = set()
        self._store = store
        store.live = live_places(store.live.version + 1, dict(self.rows))

    def place(self, run: StoreRun) -> int:
        """The number of the place of a run; notes what the run says of its group."""
        number = self._numbers.get((run.worker_id, run.tier, run.group))
        if number is None:
            number = self.place_at(run.worker_id, run.rank, run.tier, run.group)
        spec = run.spec
        if spec is None or spec is (known := self.rows[number].spec):
            return number
        if spec != known and (spec := known.after(spec)) != known:
            self._change(number, msgspec.structs.replace(self.rows[number], spec=spec))
        return number

    def place_at(self, worker_id: str, rank: int | None, tier: CacheTier, group: int) -> int:
        """The number of a place, a new one if the worker has no such place."""
        number = self._numbers.get((worker_id, tier, group))
        if number is None:
            number = self.next_place
            self.next_place += 1
            self.counts[number] = (0, 0)
            self._changed_counts.add(number)
            self._numbers[worker_id, tier, group] = number
            self._change(number, PlaceRow(worker_id, rank, tier, group, GroupSpec()))
        return number

    def _change(self, number: int, row: PlaceRow) -> None:
        self.rows[number] = row
        self._by_worker.setdefault(row.worker_id, {})[number] = row
        self._changed_places.add(number)

    def workers(self) -> list[str]:
        """Every worker that has a live place."""
        return list(self._by_worker)

    def places_of(self, worker_id: str) -> dict[int, PlaceRow]:
        """The live places of a worker."""
        return self._by_worker.get(worker_id, {})

    def scope(self, number: int) -> IdentityScope:
        """The scope behind a number."""
        return self._new_numbers.get(number) or self._scopes.scope(number)

    def known_scope(self, scope: IdentityScope) -> int | None:
        """The number of a scope, None when no row uses it."""
        return self._scopes.number(scope)

    def scope_number(self, scope: IdentityScope) -> int:
        """The number of a scope, a new one if it is new."""
        number = self._new_scopes.get(scope)
        if number is None:
            number = self._scopes.number(scope)
        if number is None:
            number = self._new_scopes[scope] = self._next_scope
            self._new_numbers[number] = scope
            self._next_scope += 1
        return number

    def count(self, number: int, records: int, size: int) -> None:
        """Add to the records and bytes of a place."""
        counts = self.counts[number]
        self.counts[number] = (counts[0] + records, counts[1] + size)
        self._changed_counts.add(number)

    def bury(self, number: int) -> int:
        """Make a place dead: its rows no longer count. Returns how many records there were."""
        row = self.rows.pop(number)
        records = self.counts.pop(number)[0]
        del self._numbers[row.worker_id, row.tier, row.group]
        del self._by_worker[row.worker_id][number]
        if not self._by_worker[row.worker_id]:
            del self._by_worker[row.worker_id]
        self._changed_counts.discard(number)
        self._changed_places.discard(number)
        self._buried[number] = records
        return records

    def sweep_everything(self) -> None:
        """Nothing stands under the number of any dead place, once the batch is written."""
        self._swept.update(self.dead, self._buried)

    def swept(self, places: Iterable[int]) -> None:
        """Nothing stands under the numbers of these dead places any more."""
        self._swept.update(places)

    def flush(self, writes: dict[bytes, bytes | None]) -> None:
        """Add what has changed to what is to be written: values by key, None for a key that is to go."""
        for number in self._changed_places:
            writes[PLACE_KEY + NUMBER.pack(number)] = _encode(self.rows[number])
        if self.next_place != self._stored_next_place:
            writes[self._next_place_key] = NUMBER.pack(self.next_place)
        for number in self._changed_counts:
            writes[COUNT_KEY + NUMBER.pack(number)] = COUNT.pack(*self.counts[number])
        for scope, number in self._new_scopes.items():
            writes[SCOPE_KEY + NUMBER.pack(number)] = _encode(scope)
            writes[digest_key(scope)] = NUMBER.pack(number)
        if self._new_scopes:
            writes[self._next_scope_key] = NUMBER.pack(self._next_scope)
        for number, records in self._buried.items():
            key = NUMBER.pack(number)
            writes[PLACE_KEY + key] = writes[COUNT_KEY + key] = None
            if records:
                writes[DEAD_KEY + key] = b""
        for number in self._swept:
            writes[DEAD_KEY + NUMBER.pack(number)] = None

    def written(self) -> None:
        """The batch was written: what it changed is now what there is."""
        if self._changed_places or self._buried:
            self._store.live = live_places(self._store.live.version + 1, dict(self.rows))
        for scope, number in self._new_scopes.items():
            self._scopes.remember(scope, number)
        self._stored_next_place = self.next_place
        self.dead.update(number for number, records in self._buried.items() if records)
        self.dead -= self._swept
        for changes in (self._changed_places, self._changed_counts, self._swept):
            changes.clear()
        for news in (self._new_scopes, self._new_numbers, self._buried):
            news.clear()

    def totals(self) -> tuple[int, int]:
        """Records and bytes over all live places."""
        counts = self.counts.values()
        return sum(records for records, _ in counts), sum(size for _, size in counts)
