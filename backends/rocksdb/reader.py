"""Questions to a RocksDB index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..model import CacheResidency
from ..placed_catalog import ScopeNames
from ..placed_reader import PlacedReader, Row
from .rows import BLOCKS, LINK, ROW, name_of, place_of, row_suffix, stream_of
from .store import Question, Store

_LINK_AND_PLACE = 5
"""Bytes between the parent's name and the child's hash in the key of a link; the row's key ends with as many."""


class Reader(PlacedReader[Question]):
    """Answers for a backend."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.asking, ScopeNames(store), place_of, stream_of)
        self._store = store

    def rows_of_each(self, question: Question, hashes: Sequence[bytes]) -> Iterator[list[Row]]:
        return (question.under(name_of(one) + ROW) for one in hashes)

    def children(self, question: Question, parent: bytes) -> Iterator[tuple[bytes, list[Row]]]:
        name = name_of(parent)
        for link, _ in question.under(name + LINK):
            place, child = place_of(link), link[len(name) + _LINK_AND_PLACE :]
            if place in question.live.rows:
                yield child, question.under(name_of(child) + row_suffix(place))

    def snapshot(self) -> Iterator[CacheResidency]:
        """Every record as of now. While it is read, RocksDB keeps every file of that moment."""
        pinned = self._store.pin()
        try:
            for key, row in self._store.walk(pinned, *BLOCKS):
                if row:
                    yield from self.residencies(pinned.live.rows, key[1:-_LINK_AND_PLACE], [(key, row)])
        finally:
            pinned.release()
