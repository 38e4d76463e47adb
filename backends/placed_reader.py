"""Questions to stores that keep a row of its own for each (block, place): each answered from one moment, by any thread.

What the keys are, and how many rows a store looks up at a time, is its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from . import placed_catalog
from .entries import Entry, LivePlaces, PlaceRow, residency
from .matching import Held, worker_matches
from .model import CacheResidency, Cursor, Holding, IdentityScope, WorkerMatch
from .placed_catalog import ScopeNames, read_counts, read_cursors
from .placed_rows import NUMBER, scopes_in, unpack_row

Row = tuple[bytes, bytes]
"""The key of a row, and the row."""


class Question(placed_catalog.Question, Protocol):
    """A look at a store, and the places that were live at that moment."""

    @property
    def live(self) -> LivePlaces:
        """Those places."""


QuestionT = TypeVar("QuestionT", bound=Question)


class PlacedReader(ABC, Generic[QuestionT]):
    """Answers for a backend."""

    def __init__(
        self,
        asking: Callable[[], AbstractContextManager[QuestionT]],
        scopes: ScopeNames,
        place_of: Callable[[bytes], int],
        stream_of: Callable[[bytes], str],
    ) -> None:
        """`place_of` reads the place from the key of a row, `stream_of` the name of a stream from that of a cursor."""
        self._asking = asking
        self._scopes = scopes
        self._place_of = place_of
        self._stream_of = stream_of
        self.prefix_scans = 0

    @abstractmethod
    def rows_of_each(self, question: QuestionT, hashes: Sequence[bytes]) -> Iterable[list[Row]]:
        """The rows of each of the blocks, looked up no further ahead than is cheap: the caller may stop."""

    @abstractmethod
    def children(self, question: QuestionT, parent: bytes) -> Iterable[tuple[bytes, list[Row]]]:
        """The blocks that links of live places lead to from a block, each with the row of that place."""

    @abstractmethod
    def snapshot(self) -> Iterator[CacheResidency]:
        """Every record as of the first `next`."""

    def cursors(self) -> dict[str, Cursor]:
        with self._asking() as question:
            return read_cursors(question, self._stream_of)

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        with self._asking() as question:
            (rows,) = self.rows_of_each(question, (block_hash,))
            found = self.residencies(question.live.rows, block_hash, rows)
            return [one for one in found if scope is None or one.key.scope == scope]

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        self.prefix_scans += 1
        with self._asking() as question:
            number = self._scopes.number(scope)
            if number is None:
                return []
            places = question.live.rows
            return [
                self._residency(places[entry.place], child, entry)
                for child, rows in self.children(question, prefix_hash)
                for key, row in rows
                for entry in unpack_row(self._place_of(key), row)
                if entry.scope == number and entry.parent == prefix_hash
            ]

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        with self._asking() as question:
            live = question.live
            number = None
            if scope is not None and (number := self._scopes.number(scope)) is None:
                return []
            masks = _masks(self.rows_of_each(question, block_hashes), live, number)
        held = [
            Held(row.worker_id, row.rank, row.tier, row.group, mask)
            for row, mask in ((live.rows[place], mask) for place, mask in masks.items())
        ]
        return worker_matches(held, live.specs)

    def holdings(self) -> list[Holding]:
        with self._asking() as question:
            counts = read_counts(question)
            return [
                Holding(row.worker_id, row.rank, row.tier, row.group, row.spec, *counts.get(number, (0, 0)))
                for number, row in question.live.rows.items()
            ]

    def residencies(
        self, places: dict[int, PlaceRow], block_hash: bytes, rows: Sequence[Row]
    ) -> Iterator[CacheResidency]:
        """What the rows of a block say of places that are live."""
        for key, row in rows:
            number = self._place_of(key)
            place = places.get(number)
            if place is not None:
                for entry in unpack_row(number, row):
                    yield self._residency(place, block_hash, entry)

    def _residency(self, place: PlaceRow, block_hash: bytes, entry: Entry) -> CacheResidency:
        return residency(place, self._scopes.scope(entry.scope), block_hash, entry)


def _masks(rows_of_each: Iterable[list[Row]], live: LivePlaces, scope: int | None) -> dict[int, int]:
    """Which of the blocks each place holds, as bits. Stops where nobody has held any for too long."""
    masks: dict[bytes, int] = {}
    wanted = None if scope is None else NUMBER.pack(scope)
    bit, missed = 1, 0
    for rows in rows_of_each:
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
