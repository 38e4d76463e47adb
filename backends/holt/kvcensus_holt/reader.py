"""Questions to a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcensus.backends.model import CacheResidency
from kvcensus.backends.placed_catalog import ScopeNames
from kvcensus.backends.placed_reader import PlacedReader, Row

from .rows import ROW, block_of, links_of, place_of, row_linked, rows_of, stream_of
from .store import Question, Store

_CHUNK = 32
"""Blocks that are asked for at a time: no more are asked for in vain where a chain ends."""


class Reader(PlacedReader[Question]):
    """Answers for a backend."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.asking, ScopeNames(store), place_of, stream_of)
        self._store = store

    def rows_of_each(self, question: Question, hashes: Sequence[bytes]) -> Iterator[list[Row]]:
        for at in range(0, len(hashes), _CHUNK):
            yield from question.under_each([rows_of(one) for one in hashes[at : at + _CHUNK]])

    def children(self, question: Question, parent: bytes) -> Iterator[tuple[bytes, list[Row]]]:
        links = question.keys_under(links_of(parent))
        keys = [row_linked(link) for link in links if place_of(link) in question.live.rows]
        for key, row in zip(keys, question.get_many(keys)):
            if row is not None:
                yield block_of(key), [(key, row)]

    def snapshot(self) -> Iterator[CacheResidency]:
        """Every record as of now. While it is read, Holt copies what is changed."""
        pinned = self._store.pin()
        try:
            for key, row in self._store.walk(pinned, ROW):
                yield from self.residencies(pinned.live.rows, block_of(key), [(key, row)])
        finally:
            pinned.release()
