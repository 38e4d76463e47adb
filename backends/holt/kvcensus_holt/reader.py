"""Questions to the index, each answered from one moment, by any thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcensus.backends.entries import Entry, LivePlaces, PlaceRow
from kvcensus.backends.matching import Held, worker_matches
from kvcensus.backends.model import CacheResidency, Cursor, Holding, IdentityScope, KvBlockKey, WorkerMatch
from kvcensus.backends.placed_catalog import ScopeNames, read_counts, read_cursors
from kvcensus.backends.placed_rows import NUMBER, scopes_in, unpack_row

from .rows import ROW, block_of, links_of, place_of, row_linked, rows_of, stream_of
from .store import Question, Store

_CHUNK = 32
"""Blocks that `match` asks for at a time: no more are asked for in vain where the chain ends."""


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
            found = self._residencies(question.live.rows, block_hash, question.under(rows_of(block_hash)))
            return [one for one in found if scope is None or one.key.scope == scope]

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        self.prefix_scans += 1
        with self._store.asking() as question:
            places = question.live.rows
            number = self._scopes.number(scope)
            if number is None:
                return []
            keys = [row_linked(link) for link in question.keys_under(links_of(prefix_hash)) if place_of(link) in places]
            found: list[CacheResidency] = []
            for key, row in zip(keys, question.get_many(keys)):
                place, child = place_of(key), block_of(key)
                found += [
                    self._residency(places[place], child, entry)
                    for entry in unpack_row(place, row or b"")
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
        """Every record as of now. While it is read, Holt copies what is changed."""
        pinned = self._store.pin()
        try:
            for key, row in self._store.walk(pinned, ROW):
                yield from self._residencies(pinned.live.rows, block_of(key), [(key, row)])
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


def _masks(question: Question, live: LivePlaces, scope: int | None, block_hashes: Sequence[bytes]) -> dict[int, int]:
    """Which of the hashes each place holds, as bits. Stops where nobody has held any for too long."""
    masks: dict[bytes, int] = {}
    wanted = None if scope is None else NUMBER.pack(scope)
    bit, missed = 1, 0
    for rows in _rows_of_each(question, block_hashes):
        missed += 1
        for key, row in rows:
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


def _rows_of_each(question: Question, block_hashes: Sequence[bytes]) -> Iterator[list[tuple[bytes, bytes]]]:
    for at in range(0, len(block_hashes), _CHUNK):
        yield from question.under_each([rows_of(one) for one in block_hashes[at : at + _CHUNK]])
