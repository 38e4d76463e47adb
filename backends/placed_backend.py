"""What backends do alike whose stores keep a row of its own for each (block, place).

One batch a call, made by one thread; reads are left to a `PlacedReader`. What a store is and how it is written is each
backend's own.
"""

from __future__ import annotations

import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from . import placed_catalog
from .errors import BackendCorrupt, BackendFormat
from .interface import IndexBackend
from .model import (
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    Cursor,
    Holding,
    IdentityScope,
    IndexMetrics,
    Operation,
    WorkerMatch,
)
from .ownership import Owner
from .placed_batch import PlacedBatch
from .placed_catalog import WriterCatalog
from .placed_reader import PlacedReader
from .placed_rows import NUMBER

T = TypeVar("T")
More = Mapping[bytes, bytes | None]
"""Values by key that are written with a batch, None for a key that is to go."""

SUSPECT_FILE = "suspect.txt"
"""Why the whole index is to be read before it is used, if it is."""

_PUTS = 10_000
"""Records that `put_all` writes at a time: a batch has its limit in some stores."""

_encode = msgspec.msgpack.encode


class Store(placed_catalog.Store, Protocol):
    """What is opened, looked at and closed. A question sees each batch together with the `live` that goes with it."""

    bytes_written: int
    damage: BackendCorrupt | None

    def read_everything(self) -> None:
        """Raises BackendCorrupt."""

    def file_bytes(self) -> int:
        """Bytes that the files occupy on disk."""

    def compact(self) -> None:
        """Give back what is not used."""

    def close(self) -> None:
        """End every look, and close."""


StoreT = TypeVar("StoreT", bound=Store)
BatchT = TypeVar("BatchT", bound=PlacedBatch)


class PlacedBackend(IndexBackend, Generic[StoreT, BatchT]):
    """An index in `directory`, which this process owns until `close`."""

    schema: int
    """Version of what is stored. An index of another version is refused."""

    def __init__(
        self,
        directory: Path,
        open_store: Callable[[Path], StoreT],
        reader: Callable[[StoreT], PlacedReader[Any]],
        *,
        rebuild: bool,
    ) -> None:
        """Open or create. Raises BackendBusy, BackendFormat, BackendCorrupt or BackendError.

        A damaged index is refused, or to `rebuild` it moved aside (`moved_aside`) for a new one. Where damage was found
        the last time, the whole of it is read first.
        """
        self._path = directory / self.name()
        self._suspect = directory / SUSPECT_FILE
        self._owner = Owner(directory)
        try:
            try:
                self._open(open_store)
            except BackendCorrupt as error:
                if not rebuild:
                    raise
                self.moved_aside, self.moved_for = self._move_aside(), str(error)
                self._open(open_store)
        except BaseException:
            self._owner.release()
            raise
        self._reader = reader(self._store)
        self._totals = self._catalog.totals()
        self._puts = self._removes = 0
        self._sweep_at = b""
        self._sweeping: frozenset[int] = frozenset()

    @staticmethod
    @abstractmethod
    def meta_key(name: str) -> bytes:
        """The key of one of the few values that belong to the whole index."""

    @staticmethod
    @abstractmethod
    def cursor_key(stream: str) -> bytes:
        """The key of a stream's cursor."""

    @staticmethod
    @abstractmethod
    def place_of(key: bytes) -> int:
        """The place of a row or a link, by its key."""

    @abstractmethod
    def _has_keys(self) -> bool:
        """Whether anything is stored."""

    @abstractmethod
    def _block_keys(self, after: bytes, limit: int) -> list[bytes]:
        """The next keys of rows and links; `after` is "" for the first ones."""

    @abstractmethod
    def _batch(self) -> BatchT:
        """A batch with nothing in it."""

    @abstractmethod
    def _commit(self, batch: BatchT | None, more: More) -> None:
        """Write a batch and `more`, all or nothing; `_written` goes with it, unless there is no batch."""

    def _open(self, open_store: Callable[[Path], StoreT]) -> None:
        self._store = open_store(self._path)
        try:
            if self._suspect.exists():
                self._store.read_everything()
                self._suspect.unlink()
            self._check_schema()
            self._catalog = WriterCatalog(self._store, self.meta_key)
        except BaseException:
            self._store.close()
            raise

    def _move_aside(self) -> Path:
        """Move the database out of the way, and drop what was moved there before. Returns where it is now."""
        for path in self._path.parent.glob(f"{self._path.name}.corrupt-*"):
            shutil.rmtree(path)
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self._path.with_name(f"{self._path.name}.corrupt-{at}")
        self._path.rename(aside)
        self._suspect.unlink(missing_ok=True)
        return aside

    def _check_schema(self) -> None:
        key, wanted = self.meta_key("schema"), NUMBER.pack(self.schema)
        stored = self._store.get(key)
        if stored is None:
            if self._has_keys():
                raise BackendFormat(f"{self._path} is a {self.name()} store, but not an index of kvcensus")
            self._commit(None, {key: wanted})
        elif stored != wanted:
            schema = int.from_bytes(stored, "big")
            known = f"this version knows {self.schema}"
            raise BackendFormat(f"{self._path} has schema {schema}, {known}; it was left as it is")

    def persistent(self) -> bool:
        return True

    def _write(self, change: Callable[[BatchT], T], more: More | None = None) -> T:
        """Make one change with one batch. On an error nothing of it is kept, here or in the store."""
        batch = self._batch()
        try:
            outcome = change(batch)
            self._commit(batch, more or {})
        except BaseException:
            self._catalog = WriterCatalog(self._store, self.meta_key)
            self._totals = self._catalog.totals()
            raise
        result = batch.result
        self._puts += result.stored + result.copies_added + result.refreshed
        self._removes += result.copies_removed
        return outcome

    def _written(self) -> None:
        self._catalog.written()
        self._totals = self._catalog.totals()

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        def change(batch: BatchT) -> ApplyResult:
            batch.run(operations)
            return batch.result

        return self._write(change, {self.cursor_key(cursor.stream): _encode(cursor) for cursor in cursors})

    def forget_stream(self, stream: str) -> None:
        self._write(lambda batch: None, {self.cursor_key(stream): None})

    def put(self, residency: CacheResidency) -> None:
        self.put_all((residency,))

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        for at in range(0, len(residencies), _PUTS):
            part = residencies[at : at + _PUTS]

            def change(batch: BatchT, part: Sequence[CacheResidency] = part) -> None:
                for residency in part:
                    batch.put(residency)

            self._write(change)
            self._puts += len(part)

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        removed = self._write(lambda batch: batch.remove_scoped(scope, worker_id, block_hash))
        self._removes += removed
        return removed

    def clear_worker(self, worker_id: str) -> int:
        return self.apply([ClearBlocks(worker_id)]).cleared

    def clear(self) -> None:
        self._write(lambda batch: batch.clear_everything())
        self._sweep_at = b""

    def reclaim(self, rows: int) -> bool:
        """Look at the next `rows` keys for those of places that were dead when the pass began."""
        if not self._catalog.dead:
            return False
        if not self._sweep_at:
            self._sweeping = frozenset(self._catalog.dead)
        keys = self._block_keys(self._sweep_at, rows)
        gone = [key for key in keys if self.place_of(key) in self._sweeping]

        def change(batch: BatchT) -> None:
            batch.sweep(gone)
            if not keys:
                self._catalog.swept(self._sweeping)

        self._write(change)
        self._sweep_at = keys[-1] if keys else b""
        return bool(self._catalog.dead)

    def cursors(self) -> dict[str, Cursor]:
        return self._reader.cursors()

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
