"""The RocksDB backend: what is its own beside what it shares with other stores of placed rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rocksdict import WriteBatch

from ..model import StoreHealth
from ..placed_backend import More, PlacedBackend
from . import rows
from .batch import Batch
from .options import Durability, OnCorrupt, Resources
from .reader import Reader
from .rows import BLOCKS
from .store import Store

DATABASE = "rocksdb"
"""The folder of the database in the data directory."""


class RocksdbBackend(PlacedBackend[Store, Batch]):
    """An index in `directory`, which this process owns until `close`."""

    schema = rows.SCHEMA
    meta_key = staticmethod(rows.meta_key)
    cursor_key = staticmethod(rows.cursor_key)
    place_of = staticmethod(rows.place_of)

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = Durability.PROCESS,
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
            return bool(question.keys(b"", b"\xff\xff", 1))

    def _block_keys(self, after: bytes, limit: int) -> list[bytes]:
        with self._store.asking() as question:
            return question.keys(after + b"\x00" if after else BLOCKS[0], BLOCKS[1], limit)

    def _batch(self) -> Batch:
        return Batch(self._store, self._catalog)

    def _commit(self, batch: Batch | None, more: More) -> None:
        def fill(writes: WriteBatch) -> None:
            if batch is not None:
                batch.fill(writes)
            for key, value in more.items():
                if value is None:
                    writes.delete(key)
                else:
                    writes.put(key, value)

        self._store.write(fill, self._written if batch is not None else lambda: None)

    def health(self) -> StoreHealth:
        return StoreHealth(
            live_bytes=self._store.number("estimate-live-data-size"), readers=self._store.number("num-snapshots")
        )

    def checkpoint(self, directory: Path) -> None:
        """Make a data directory of the index as it is now, from any thread. Large files are shared as hard links.

        `directory` must not have an index. Raises BackendError.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store.checkpoint(directory / DATABASE)


def open_rocksdb(directory: Path, options: Mapping[str, Any]) -> RocksdbBackend:
    """For the registry. `options` are `durability`, `on_corrupt` and the fields of Resources. Raises BackendError."""
    chosen = dict(options)
    durability = Durability(chosen.pop("durability", Durability.PROCESS))
    on_corrupt = OnCorrupt(chosen.pop("on_corrupt", OnCorrupt.REFUSE))
    return RocksdbBackend(directory, durability=durability, on_corrupt=on_corrupt, resources=Resources(**chosen))
