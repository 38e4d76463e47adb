"""The operations of one call as one batch for RocksDB."""

from __future__ import annotations

from collections.abc import Sequence

from rocksdict import WriteBatch

from ..placed_batch import PlacedBatch
from ..placed_catalog import WriterCatalog
from ..placed_rows import LENGTH
from .rows import BLOCKS, SUFFIX_SIZE, link_infix, row_suffix
from .store import Store


class Batch(PlacedBatch):
    """What one call comes to. `fill` puts it into a batch to be written."""

    def __init__(self, store: Store, catalog: WriterCatalog) -> None:
        super().__init__(store.get_many, catalog)
        self._everything = False

    @staticmethod
    def row_keys(place: int, hashes: Sequence[bytes]) -> list[bytes]:
        suffix = row_suffix(place)
        return [LENGTH[len(one)] + one + suffix for one in hashes]

    @staticmethod
    def link_keys(place: int, parents: Sequence[bytes], hashes: Sequence[bytes], keys: Sequence[bytes]) -> list[bytes]:
        infix = link_infix(place)
        return [parent[:-SUFFIX_SIZE] + infix + one for parent, one in zip(parents, hashes)]

    def clear_everything(self) -> None:
        """Drop every row and link at once. Nothing else may be in the batch."""
        super().clear_everything()
        self._catalog.sweep_everything()
        self._everything = True

    def fill(self, batch: WriteBatch) -> None:
        """Put rows, links, counts and names into an empty batch.

        In key order: RocksDB then finds its way among the new records with what the last key left in the caches of the
        processor, which makes large batches several times cheaper.
        """
        put, delete = batch.put, batch.delete
        if self._everything:
            batch.delete_range(*BLOCKS)
        changes = self.changes()
        for key in sorted(changes):
            value = changes[key]
            if value is None:
                delete(key)
            else:
                put(key, value)
