"""The LMDB backend: one write transaction a call, made by one thread; reads are left to `LmdbReader`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import lmdb

from ..errors import BackendCorrupt, BackendError, BackendFull
from ..interface import IndexBackend
from ..model import (
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    Cursor,
    Holding,
    IdentityScope,
    IndexMetrics,
    Operation,
    StoreHealth,
    WorkerMatch,
)
from ..ownership import Owner, note_writer, sync_directory, sync_file
from .batch import Batch
from .catalog import WriterCatalog
from .checks import corrupt
from .files import (
    DAMAGE,
    INDEX_FILE,
    MAP_SIZE,
    SUSPECT_FILE,
    Durability,
    discard_if_machine_crashed,
    disk_is_full,
    move_aside,
    named_errors,
    open_writer,
    remove_stale_snapshots,
    sole_user,
    suspect,
)
from .reader import LmdbReader
from .sweep import sweep
from .verify import refuse_if_damaged

T = TypeVar("T")

_encode = msgspec.msgpack.encode


class LmdbBackend(IndexBackend):
    """An index in `directory`, which this process owns until `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = Durability.PROCESS,
        map_size: int = MAP_SIZE,
        rebuild: bool = False,
    ) -> None:
        """Open or create. `map_size` in bytes is the limit of the file.

        A damaged index is refused, or with `rebuild` moved aside (`moved_aside`) for a new one. What `suspected` names
        is a reason to look at the whole index first. Raises BackendBusy, BackendFormat, BackendCorrupt or BackendError.
        """
        self._directory = directory
        self._durability = durability
        self._map_size = map_size
        self._damage: BackendCorrupt | None = None
        self._owner = Owner(directory)
        try:
            self.discarded_after_crash = discard_if_machine_crashed(directory)
            remove_stale_snapshots(directory)
            self.suspected = suspect(directory)
            try:
                self._open()
            except BackendCorrupt as error:
                if not rebuild:
                    raise
                self.moved_aside, self.moved_for = move_aside(directory), str(error)
                self._open()
        except BaseException:
            self._owner.release()
            raise
        self._totals = self._catalog.totals()
        self._page_size = int(self._env.stat()["psize"])
        self._puts = self._removes = self._bytes_written = 0

    def _open(self) -> None:
        if self.suspected:
            refuse_if_damaged(self._directory / INDEX_FILE)
            (self._directory / SUSPECT_FILE).unlink(missing_ok=True)
        self._env, self._tables = open_writer(self._directory, self._durability, self._map_size)
        self._reader = LmdbReader(self._env, self._tables)
        try:
            self._catalog = self._load_catalog()
        except BaseException:
            self._env.close()
            raise

    def _load_catalog(self) -> WriterCatalog:
        with self._reader.reading() as txn:
            return WriterCatalog(txn, self._tables)

    def name(self) -> str:
        return "lmdb"

    def persistent(self) -> bool:
        return True

    def _write(self, change: Callable[[lmdb.Transaction[bytes], Batch], T]) -> T:
        """Run one change in one transaction. On an error nothing of it is kept, here or in the file."""
        try:
            with self._env.begin(write=True) as txn:
                batch = Batch(txn, self._tables, self._catalog)
                outcome = change(txn, batch)
                batch.finish()
        except BaseException as error:
            self._catalog = self._load_catalog()
            if isinstance(error, lmdb.MapFullError):
                raise BackendFull(f"{self._directory}: the index has reached its map size") from error
            if isinstance(error, DAMAGE):
                self._damage = corrupt(self._directory / INDEX_FILE, repr(error))
                raise self._damage from error
            if isinstance(error, lmdb.Error) and disk_is_full(self._directory):
                raise BackendFull(f"{self._directory}: the disk is full ({error})") from error
            if isinstance(error, lmdb.Error):
                raise BackendError(f"{self._directory}: {error}") from error
            raise
        self._totals = self._catalog.totals()
        result = batch.result
        self._puts += result.stored + result.copies_added + result.refreshed
        self._removes += result.copies_removed
        self._bytes_written += batch.bytes_written
        return outcome

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        def change(txn: lmdb.Transaction[bytes], batch: Batch) -> ApplyResult:
            batch.run(operations)
            for cursor in cursors:
                txn.put(cursor.stream.encode(), _encode(cursor), db=self._tables.streams)
            return batch.result

        return self._write(change)

    def forget_stream(self, stream: str) -> None:
        self._write(lambda txn, batch: txn.delete(stream.encode(), db=self._tables.streams))

    def put(self, residency: CacheResidency) -> None:
        self._write(lambda txn, batch: batch.put(residency))
        self._puts += 1

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        def change(txn: lmdb.Transaction[bytes], batch: Batch) -> None:
            batch.put_all(residencies)

        self._write(change)
        self._puts += len(residencies)

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        removed = self._write(lambda txn, batch: batch.remove_scoped(scope, worker_id, block_hash))
        self._removes += removed
        return removed

    def clear_worker(self, worker_id: str) -> int:
        return self.apply([ClearBlocks(worker_id)]).cleared

    def clear(self) -> None:
        def change(txn: lmdb.Transaction[bytes], batch: Batch) -> None:
            for worker_id in self._catalog.workers():
                batch.clear(ClearBlocks(worker_id))
            for table in (self._tables.blocks, self._tables.dead):
                txn.drop(table, delete=False)

        self._write(change)

    def reclaim(self, rows: int) -> bool:
        self._env.reader_check()
        if not self._has_dead():
            return False
        return self._write(lambda txn, batch: sweep(txn, self._tables, batch, rows))

    def _has_dead(self) -> bool:
        with self._env.begin() as txn:
            return bool(txn.stat(self._tables.dead)["entries"])

    def compact(self) -> None:
        """Replace the file by a compacted copy. Needs as much disk as is live, and that nobody reads meanwhile."""
        path = self._directory / INDEX_FILE
        with tempfile.TemporaryDirectory(prefix="snapshot-", dir=self._directory) as folder:
            copy = Path(folder, INDEX_FILE)
            self._reader.copy_to(copy)
            with named_errors(path):
                copy.chmod(0o600)
                sync_file(copy)
            self._env.close()
            try:
                with named_errors(path), sole_user(path):
                    copy.replace(path)
                    path.with_name(f"{INDEX_FILE}-lock").unlink()
                    sync_directory(self._directory)
            finally:
                self._open()

    def cursors(self) -> dict[str, Cursor]:
        return self._reader.cursors()

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        return self._reader.find(block_hash, scope)

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        return self._reader.prefix_scan(scope, prefix_hash)

    def first_children(self, scope: IdentityScope, prefix_hash: bytes, limit: int) -> tuple[list[CacheResidency], bool]:
        return self._reader.first_children(scope, prefix_hash, limit)

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        return self._reader.match(scope, block_hashes)

    def holdings(self) -> list[Holding]:
        return self._reader.holdings()

    def snapshot(self) -> Iterator[CacheResidency]:
        return self._reader.snapshot(self._directory)

    def __len__(self) -> int:
        return self._totals[0]

    def metrics(self) -> IndexMetrics:
        records, size = self._totals
        return IndexMetrics(records, size, self._puts, self._removes, self._reader.prefix_scans, self._bytes_written)

    def stored_bytes(self) -> int:
        return (self._directory / INDEX_FILE).stat().st_blocks * 512

    def health(self) -> StoreHealth:
        with self._reader.reading() as txn:
            stats = [txn.stat(table) for table in self._tables]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        last = self._env.info()["last_txnid"]
        rows = [line.split() for line in self._env.readers().splitlines()[1:]]
        reading = [(int(row[2]), int(row[0])) for row in rows if len(row) == 3 and row[2].isdigit()]
        oldest, pid = min(reading, default=(last, 0))
        return StoreHealth(pages * self._page_size, self._map_size, len(rows), max(0, last - oldest), pid)

    def damage(self) -> BackendCorrupt | None:
        return self._damage or self._reader.damage

    def close(self) -> None:
        if damage := self.damage():
            with suppress(OSError):
                (self._directory / SUSPECT_FILE).write_text(f"{damage}\n")
        try:
            self._env.sync(True)
            self._env.close()
            # On a full disk the note goes on saying that the writer runs: it is not believed after a machine crash.
            with suppress(OSError):
                note_writer(self._directory, self._durability, clean=True)
        finally:
            self._owner.release()


def open_lmdb(directory: Path, options: Mapping[str, Any]) -> LmdbBackend:
    """For the registry. `options` are the keyword arguments of LmdbBackend. Raises BackendError."""
    chosen = dict(options)
    if "durability" in chosen:
        chosen["durability"] = Durability(chosen["durability"])
    return LmdbBackend(directory, **chosen)
