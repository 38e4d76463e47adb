"""The RocksDB backend: one write batch a call, made by one thread; reads are left to `Reader`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rocksdict import WriteBatch

from ..errors import BackendCorrupt, BackendFormat
from ..interface import IndexBackend
from ..model import (
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    Cursor,
    Holding,
    IdentityScope,
    IndexMetrics,
    KvBlockKey,
    Operation,
    StoreHealth,
    WorkerMatch,
)
from ..ownership import Owner
from ..placed_catalog import WriterCatalog
from ..placed_rows import NUMBER
from .batch import Batch
from .options import Durability, OnCorrupt, Resources
from .reader import Reader
from .rows import BLOCKS, SCHEMA, cursor_key, meta_key, place_of
from .store import Store

T = TypeVar("T")

DATABASE = "rocksdb"
"""The folder of the database in the data directory."""

SUSPECT_FILE = "suspect.txt"
"""Why the whole index is to be read before it is used, if it is."""

_SCHEMA_KEY = meta_key("schema")
_encode = msgspec.msgpack.encode


class RocksdbBackend(IndexBackend):
    """An index in `directory`, which this process owns until `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = Durability.PROCESS,
        resources: Resources | None = None,
        on_corrupt: OnCorrupt = OnCorrupt.REFUSE,
    ) -> None:
        """Open or create. Raises BackendBusy, BackendFormat, BackendCorrupt or BackendError.

        A damaged index is refused, or with `on_corrupt` moved aside (`moved_aside`) for a new one. Where damage was
        found the last time, the whole of it is read first.
        """
        self._path = directory / DATABASE
        self._suspect = directory / SUSPECT_FILE
        self._owner = Owner(directory)
        try:
            try:
                self._open(durability, resources or Resources())
            except BackendCorrupt as error:
                if on_corrupt is not OnCorrupt.REBUILD:
                    raise
                self.moved_aside, self.moved_for = self._move_aside(), str(error)
                self._open(durability, resources or Resources())
        except BaseException:
            self._owner.release()
            raise
        self._reader = Reader(self._store)
        self._totals = self._catalog.totals()
        self._puts = self._removes = 0
        self._sweep_at = BLOCKS[0]
        self._sweeping: frozenset[int] = frozenset()

    def _open(self, durability: Durability, resources: Resources) -> None:
        self._store = Store(self._path, durability, resources)
        try:
            if self._suspect.exists():
                self._store.read_everything()
                self._suspect.unlink()
            self._check_schema()
            self._catalog = WriterCatalog(self._store, meta_key)
        except BaseException:
            self._store.close()
            raise

    def _move_aside(self) -> Path:
        """Move the database out of the way, and drop what was moved there before. Returns where it is now."""
        for path in self._path.parent.glob(f"{DATABASE}.corrupt-*"):
            shutil.rmtree(path)
        aside = self._path.with_name(f"{DATABASE}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        self._path.rename(aside)
        self._suspect.unlink(missing_ok=True)
        return aside

    def _check_schema(self) -> None:
        stored = self._store.get(_SCHEMA_KEY)
        if stored is None:
            with self._store.asking() as question:
                if question.keys(b"", b"\xff\xff", 1):
                    raise BackendFormat(f"{self._path} is a RocksDB database, but not an index of kvcensus")
            self._store.write(lambda batch: batch.put(_SCHEMA_KEY, NUMBER.pack(SCHEMA)), lambda: None)
        elif stored != NUMBER.pack(SCHEMA):
            schema = int.from_bytes(stored, "big")
            raise BackendFormat(f"{self._path} has schema {schema}, this version knows {SCHEMA}; it was left as it is")

    def name(self) -> str:
        return "rocksdb"

    def persistent(self) -> bool:
        return True

    def _write(self, change: Callable[[Batch], T], more: Callable[[WriteBatch], None] | None = None) -> T:
        """Make one change with one batch. On an error nothing of it is kept, here or in the database."""
        batch = Batch(self._store, self._catalog)

        def fill(writes: WriteBatch) -> None:
            batch.fill(writes)
            if more is not None:
                more(writes)

        try:
            outcome = change(batch)
            self._store.write(fill, self._written)
        except BaseException:
            self._reload()
            raise
        result = batch.result
        self._puts += result.stored + result.copies_added + result.refreshed
        self._removes += result.copies_removed
        return outcome

    def _written(self) -> None:
        self._catalog.written()
        self._totals = self._catalog.totals()

    def _reload(self) -> None:
        self._catalog = WriterCatalog(self._store, meta_key)
        self._totals = self._catalog.totals()

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        def change(batch: Batch) -> ApplyResult:
            batch.run(operations)
            return batch.result

        def place(writes: WriteBatch) -> None:
            for cursor in cursors:
                writes.put(cursor_key(cursor.stream), _encode(cursor))

        return self._write(change, place)

    def forget_stream(self, stream: str) -> None:
        self._write(lambda batch: None, lambda writes: writes.delete(cursor_key(stream)))

    def put(self, residency: CacheResidency) -> None:
        self._write(lambda batch: batch.put(residency))
        self._puts += 1

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        def change(batch: Batch) -> None:
            for residency in residencies:
                batch.put(residency)

        self._write(change)
        self._puts += len(residencies)

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        removed = self._write(lambda batch: batch.remove_scoped(scope, worker_id, block_hash))
        self._removes += removed
        return removed

    def clear_worker(self, worker_id: str) -> int:
        return self.apply([ClearBlocks(worker_id)]).cleared

    def clear(self) -> None:
        self._write(lambda batch: batch.clear_everything())
        self._sweep_at = BLOCKS[0]

    def reclaim(self, rows: int) -> bool:
        """Look at the next `rows` keys for those of places that were dead when the pass began."""
        if not self._catalog.dead:
            return False
        if self._sweep_at == BLOCKS[0]:
            self._sweeping = frozenset(self._catalog.dead)
        with self._store.asking() as question:
            keys = question.keys(self._sweep_at, BLOCKS[1], rows)
        gone = [key for key in keys if place_of(key) in self._sweeping]

        def change(batch: Batch) -> None:
            batch.sweep(gone)
            if not keys:
                self._catalog.swept(self._sweeping)

        self._write(change)
        self._sweep_at = keys[-1] + b"\x00" if keys else BLOCKS[0]
        return bool(self._catalog.dead)

    def cursors(self) -> dict[str, Cursor]:
        return self._reader.cursors()

    def locate(self, key: KvBlockKey) -> list[CacheResidency]:
        return [one for one in self.find(key.block_hash, key.scope) if one.key.group == key.group]

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        return self._reader.find(block_hash, scope)

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        return self._reader.prefix_scan(scope, prefix_hash)

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        return self._reader.match(scope, block_hashes)

    def holdings(self) -> list[Holding]:
        return self._reader.holdings()

    def snapshot(self) -> Iterator[CacheResidency]:
        return self._reader.snapshot()

    def __len__(self) -> int:
        return self._totals[0]

    def metrics(self) -> IndexMetrics:
        records, size = self._totals
        written = self._store.bytes_written
        return IndexMetrics(records, size, self._puts, self._removes, self._reader.prefix_scans, written)

    def stored_bytes(self) -> int:
        return self._store.file_bytes()

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

    def damage(self) -> BackendCorrupt | None:
        return self._store.damage

    def compact(self) -> None:
        self._store.compact()

    def close(self) -> None:
        if damage := self.damage():
            with suppress(OSError):
                self._suspect.write_text(f"{damage}\n")
        try:
            self._store.close()
        finally:
            self._owner.release()


def open_rocksdb(directory: Path, options: Mapping[str, Any]) -> RocksdbBackend:
    """For the registry. `options` are `durability`, `on_corrupt` and the fields of Resources. Raises BackendError."""
    chosen = dict(options)
    durability = Durability(chosen.pop("durability", Durability.PROCESS))
    on_corrupt = OnCorrupt(chosen.pop("on_corrupt", OnCorrupt.REFUSE))
    return RocksdbBackend(directory, durability=durability, on_corrupt=on_corrupt, resources=Resources(**chosen))
