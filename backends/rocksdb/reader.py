"""Questions to the index, each answered from one moment, by any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..entries import Entry, LivePlaces, PlaceRow
from ..matching import Held, worker_matches
from ..model import CacheResidency, Cursor, Holding, IdentityScope, KvBlockKey, WorkerMatch
from ..placed_catalog import ScopeNames, read_counts, read_cursors
from ..placed_rows import NUMBER, scopes_in, unpack_row
from .rows import BLOCKS, LINK, ROW, name_of, place_of, row_suffix, stream_of
from .store import Question, Store

_LINK_AND_PLACE = 5
"""Bytes between the parent's name and the child's hash in the key of a link."""


class Reader:
    """Answers for a backend."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._scopes = ScopeNames(store)
        self.prefix_scans = 0

    def cursors(self) -> dict[str, Cursor]:
        with self._store.asking() as question:
            return read_cursors(question, stream_of)

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        with self._store.asking() as question:
            found = self._residencies(question.live.rows, block_hash, _rows(question, block_hash))
            return [one for one in found if scope is None or one.key.scope == scope]

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        self.prefix_scans += 1
        with self._store.asking() as question:
            places = question.live.rows
            number = self._scopes.number(scope)
            if number is None:
                return []
            name = name_of(prefix_hash)
            found: list[CacheResidency] = []
            for link, _ in question.under(name + LINK):
                place, child = place_of(link), link[len(name) + _LINK_AND_PLACE :]
                if place not in places:
                    continue
                for _, row in question.under(name_of(child) + row_suffix(place)):
                    found += [
                        self._residency(places[place], child, entry)
                        for entry in unpack_row(place, row)
                        if entry.scope == number and entry.parent == prefix_hash
                    ]
            return found

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        with self._store.asking() as question:
            live = question.live
            number = None
            if scope is not None and (number := self._scopes.number(scope)) is None:
                return []
            masks = _masks(question, live, number, block_hashes)
        held = [
            Held(row.worker_id, row.rank, row.tier, row.group, mask)
            for row, mask in ((live.rows[place], mask) for place, mask in masks.items())
        ]
        return worker_matches(held, live.specs)

    def holdings(self) -> list[Holding]:
        with self._store.asking() as question:
            counts = read_counts(question)
            return [
                Holding(row.worker_id, row.rank, row.tier, row.group, row.spec, *counts.get(number, (0, 0)))
                for number, row in question.live.rows.items()
            ]

    def snapshot(self) -> Iterator[CacheResidency]:
        """Every record as of now. While it is read, RocksDB keeps every file of that moment."""
        pinned = self._store.pin()
        try:
            for key, row in self._store.walk(pinned, *BLOCKS):
                if row:
                    yield from self._residencies(pinned.live.rows, key[1:-_LINK_AND_PLACE], [(key, row)])
        finally:
            pinned.release()

    def _residencies(
        self, places: dict[int, PlaceRow], block_hash: bytes, rows: Sequence[tuple[bytes, bytes]]
    ) -> Iterator[CacheResidency]:
        for key, row in rows:
            number = place_of(key)
            place = places.get(number)
            if place is not None:
                for entry in unpack_row(number, row):
                    yield self._residency(place, block_hash, entry)

    def _residency(self, place: PlaceRow, block_hash: bytes, entry: Entry) -> CacheResidency:
        key = KvBlockKey.within(
            self._scopes.scope(entry.scope),
            block_hash,
            prefix_hash=entry.parent,
            block_index=None if entry.block_index < 0 else entry.block_index,
            token_count=entry.tokens,
            group=place.group,
        )
        return CacheResidency(
            key, place.worker_id, place.tier, entry.size, entry.at_ms, entry.copies, entry.pinned, place.rank
        )


def _rows(question: Question, block_hash: bytes) -> list[tuple[bytes, bytes]]:
    return question.under(name_of(block_hash) + ROW)


def _masks(question: Question, live: LivePlaces, scope: int | None, block_hashes: Sequence[bytes]) -> dict[int, int]:
    """Which of the hashes each place holds, as bits. Stops where nobody has held any for too long."""
    masks: dict[bytes, int] = {}
    wanted = None if scope is None else NUMBER.pack(scope)
    bit, missed = 1, 0
    for block_hash in block_hashes:
        missed += 1
        for key, row in _rows(question, block_hash):
            place = key[-NUMBER.size :]
            held = masks.get(place)
            if held is None:
                if NUMBER.unpack(place)[0] not in live.rows:
                    continue
                held = 0
            if wanted is None or row.startswith(wanted) or wanted in scopes_in(row):
                masks[place] = held | bit
                missed = 0
        if missed >= live.patience:
            break
        bit <<= 1
    return {NUMBER.unpack(place)[0]: mask for place, mask in masks.items()}
