"""The Holt backend: what is its own beside what it shares with other stores of placed rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcensus.backends.model import StoreHealth
from kvcensus.backends.placed_backend import More, PlacedBackend

from . import rows
from .batch import Batch
from .options import Durability, OnCorrupt, Resources
from .reader import Reader
from .store import Store

DATABASE = "holt"
"""The folder of the tree in the data directory."""


class HoltBackend(PlacedBackend[Store, Batch]):
    """An index in `directory`, which this process owns until `close`."""

    schema = rows.SCHEMA
    meta_key = staticmethod(rows.meta_key)
    cursor_key = staticmethod(rows.cursor_key)
    place_of = staticmethod(rows.place_of)

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = Durability.MACHINE,
        resources: Resources | None = None,
        on_corrupt: OnCorrupt = OnCorrupt.REFUSE,
    ) -> None:
        def open_store(path: Path) -> Store:
            return Store(path, durability, resources or Resources())

        super().__init__(directory, open_store, Reader, rebuild=on_corrupt is OnCorrupt.REBUILD)

    def name(self) -> str:
        return DATABASE

    def _has_keys(self) -> bool:
        with self._store.asking() as question:
            return bool(question.keys_under(b"", limit=1))

    def _block_keys(self, after: bytes, limit: int) -> list[bytes]:
        with self._store.asking() as question:
            return question.block_keys(after, limit)

    def _batch(self) -> Batch:
        return Batch(self._store.get_many, self._catalog)

    def _commit(self, batch: Batch | None, more: More) -> None:
        if batch is None:
            self._store.write(dict(more), lambda: None)
        else:
            self._store.write(batch.changes() | dict(more), self._written)

    def health(self) -> StoreHealth:
        return StoreHealth(readers=self._store.readers())


def open_holt(directory: Path, options: Mapping[str, Any]) -> HoltBackend:
    """For the registry. `options` are `durability`, `on_corrupt` and the fields of Resources. Raises BackendError."""
    chosen = dict(options)
    durability = Durability(chosen.pop("durability", Durability.MACHINE))
    on_corrupt = OnCorrupt(chosen.pop("on_corrupt", OnCorrupt.REFUSE))
    return HoltBackend(directory, durability=durability, on_corrupt=on_corrupt, resources=Resources(**chosen))
