"""The operations of one call as one atomic batch of the tree."""

from __future__ import annotations

from collections.abc import Sequence

from kvcensus.backends.placed_batch import PlacedBatch
from kvcensus.backends.placed_rows import NUMBER

from .rows import link_key, rows_of


class Batch(PlacedBatch):
    """What one call comes to."""

    @staticmethod
    def row_keys(place: int, hashes: Sequence[bytes]) -> list[bytes]:
        suffix = NUMBER.pack(place)
        return [rows_of(one) + suffix for one in hashes]

    @staticmethod
    def link_keys(place: int, parents: Sequence[bytes], hashes: Sequence[bytes], keys: Sequence[bytes]) -> list[bytes]:
        return list(map(link_key, parents, keys))
