"""RocksDB with what the index needs of it: one batch a call, questions that see one moment, and errors with names.

`rocksdict` raises a plain Exception with RocksDB's text for all that goes wrong. An iterator or a snapshot keeps the
database open, and its lock held, after `close`: so every one of them is known here and ends before the database does.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named like one
from typing import Any, cast
from weakref import WeakSet

import msgspec
from rocksdict import (
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    RdictIter,
    ReadOptions,
    SliceTransform,
    WriteBatch,
    WriteOptions,
)

from ..entries import LivePlaces, live_places
from ..errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat, BackendFull
from .options import Durability, Resources
from .rows import PREFIX_SIZE, meta_key

NUMBER_64 = Struct(">Q")
_BATCH_KEY = meta_key("batch")
"""The number of the last batch."""

UNDECODABLE = (StructError, IndexError, KeyError, UnicodeDecodeError, msgspec.DecodeError)
"""What decoding raises when the bytes are not what was written."""

_BLOOM_BITS = 10
"""Bits a key: one look in a hundred for a key that is not there reads a file."""
_MEMTABLE_FILTER = 0.1
"""Share of the memory for new records that their filter takes. Without it most of a store is looking for its key."""
_WRITE_BUFFERS = 3
"""One that is filled while two are written to files."""
_TOMBSTONES = (1024, 512, 0.5)
"""Where 512 of 1,024 keys in a row are tombstones, or half of a file, the file is compacted without being asked."""
_INFO_LOG_BYTES = 4 << 20
_INFO_LOGS = 2
_CHUNK = 1024
"""Rows that a snapshot reads at a time: a close waits no longer than for these."""
_FULL = ("No space left", "NoSpace", "Space limit reached", "Disk quota exceeded", "Writer has previous error")
"""The last one is what the log says from the second time on."""
_STALL = "Write stall"
_STALL_POLL_S = 0.005
_STALL_S = 30.0
"""A disk that takes so long to write or merge some files is as good as full: the caller comes again."""
_OWN_RECOVERY_S = 8.0
_ROOM_TO_OPEN_BYTES = 4 << 20
"""For what an opening writes beside the records that only the log has: a manifest, an information log."""
_BUSY = ("lock hold by current process", "While lock file", "Resource temporarily unavailable")
_UNKNOWN_FORMAT = ("Unknown Footer version", "unsupported format", "Unsupported compression", "Could not load options")


class Question:
    """The index as of one moment. `near` finds keys by a whole prefix, `far` walks in order."""

    def __init__(self, near: RdictIter, far: RdictIter, live: LivePlaces) -> None:
        self.live = live
        self._near: RdictIter | None = near
        self._far: RdictIter | None = far

    def release(self) -> None:
        """Give the database free."""
        self._near = self._far = None

    def under(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """Every key that begins with `prefix`, and its value."""
        iterator = self._near if len(prefix) >= PREFIX_SIZE and prefix[0] >= PREFIX_SIZE - 1 else self._far
        try:
            assert iterator is not None
            iterator.seek(prefix)
            found: list[tuple[bytes, bytes]] = []
            while iterator.valid():
                key = iterator.key()
                if not key.startswith(prefix):
                    return found
                found.append((key, iterator.value()))
                iterator.next()
            iterator.status()
            return found
        finally:
            del iterator

    def keys(self, start: bytes, end: bytes, limit: int) -> list[bytes]:
        """The first keys from `start` to before `end`."""
        iterator = self._far
        try:
            assert iterator is not None
            iterator.seek(start)
            found: list[bytes] = []
            while len(found) < limit and iterator.valid() and (key := iterator.key()) < end:
                found.append(key)
                iterator.next()
            iterator.status()
            return found
        finally:
            del iterator


class Pinned:
    """The index as of one moment, read over a longer time, until `release`.

    It is an iterator that stays open: what a `rocksdict.Snapshot` gives to iterate over is not of its moment.
    """

    def __init__(self, iterator: RdictIter, live: LivePlaces) -> None:
        self.live = live
        self.iterator: RdictIter | None = iterator

    def release(self) -> None:
        """Give the database free."""
        self.iterator = None


class Store:
    """An open database. One thread writes, any thread asks."""

    def __init__(self, path: Path, durability: Durability, resources: Resources) -> None:
        """Open or create. Raises the errors of `backends.errors`."""
        self._path = path
        self._moment = threading.Condition(threading.Lock())
        self._asking = 0
        self._pinned: WeakSet[Pinned] = WeakSet()
        self.damage: BackendCorrupt | None = None
        self.bytes_written = 0
        self.live = live_places(0, {})
        """The places that go with what is stored: changed in the `then` of a write."""
        self._resources = resources
        self._sync = durability is Durability.MACHINE
        self._write_options = WriteOptions()
        self._write_options.no_slowdown = True
        self._room_since_s: float | None = None
        self._failures = 0
        self._near, self._far = ReadOptions(), ReadOptions()
        self._near.set_prefix_same_as_start(True)
        self._far.set_total_order_seek(True)
        self._db: Rdict | None = None
        with self._named():
            self._db = self._open()
        try:
            self._written = self.get(_BATCH_KEY) or b""
        except BackendError:
            self.close()
            raise
        self._number = int.from_bytes(self._written, "big")

    def _open(self) -> Rdict:
        options = options_for(self._resources)
        # Without the second mention the options of the last time are used, and a cache of 8 MiB.
        return Rdict(str(self._path), options, {"default": options})

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What RocksDB says, and bytes that cannot be decoded, as errors of `backends.errors`.

        They are kept by whoever catches them, with the variables on their way: no iterator is among them.
        """
        try:
            yield
        except UNDECODABLE as error:
            self.damage = self._corrupt(repr(error))
            raise self.damage from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            named = self._name(str(error))
            if isinstance(named, BackendCorrupt):
                self.damage = named
            raise named from error

    def _name(self, text: str) -> BackendError:
        if any(words in text for words in _FULL):
            return BackendFull(f"{self._path}: the disk is full ({text})")
        if any(words in text for words in _BUSY):
            return BackendBusy(f"{self._path} is in use ({text})")
        if any(words in text for words in _UNKNOWN_FORMAT):
            return BackendFormat(f"{self._path} was written by another version of RocksDB ({text})")
        if "Corruption" in text:
            return self._corrupt(text)
        return BackendError(f"{self._path}: {text}")

    def _corrupt(self, detail: str) -> BackendCorrupt:
        return BackendCorrupt(
            f"{self._path} is damaged ({detail}); it is not served. "
            f"To rebuild it from the engines: mv {self._path} {self._path}.corrupt"
        )

    def _opened(self) -> Rdict:
        if self._db is None:
            raise BackendError(f"{self._path} is closed")
        return self._db

    def get(self, key: bytes) -> bytes | None:
        """One value, None when there is none."""
        with self._moment, self._named():
            value: bytes | None = self._opened().get(key)
            return value

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, in their order, for the thread that writes."""
        with self._named():
            return cast("list[bytes | None]", self._opened().get(cast("Any", keys)))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the database open meanwhile. Begins with `_moment` held, which is free again within."""
        self._asking += 1
        self._moment.release()
        try:
            with self._named():
                yield
        finally:
            self._moment.acquire()
            self._asking -= 1
            self._moment.notify_all()

    @contextmanager
    def asking(self) -> Iterator[Question]:
        """A look at the index as it is between two calls that write."""
        with self._moment:
            with self._named():
                question = Question(self._opened().iter(self._near), self._opened().iter(self._far), self.live)
            with self._in_use():
                try:
                    yield question
                finally:
                    question.release()

    def pin(self) -> Pinned:
        """The index as it is now, for as long as it takes to read."""
        with self._moment, self._named():
            pinned = Pinned(self._opened().iter(self._far), self.live)
            self._pinned.add(pinned)
            return pinned

    def walk(self, pinned: Pinned, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The keys and values of a pinned index from `start` to before `end`, read some at a time."""
        seek: bytes | None = start
        while chunk := self._chunk(pinned, seek, end):
            yield from chunk
            seek = None

    def _chunk(self, pinned: Pinned, seek: bytes | None, end: bytes) -> list[tuple[bytes, bytes]]:
        """The next rows, from where the last ones ended when there is nothing to `seek`."""
        chunk: list[tuple[bytes, bytes]] = []
        with self._moment:
            iterator = pinned.iterator
            if iterator is None:
                raise BackendError(f"{self._path} was closed while a snapshot of it was read")
            with self._in_use():
                try:
                    if seek is not None:
                        iterator.seek(seek)
                    while len(chunk) < _CHUNK and iterator.valid() and (key := iterator.key()) < end:
                        chunk.append((key, iterator.value()))
                        iterator.next()
                    iterator.status()
                finally:
                    del iterator
        return chunk

    def write(self, fill: Callable[[WriteBatch], None], then: Callable[[], None]) -> None:
        """Write a batch, all or nothing: what `fill` puts in, perhaps more than once, for a batch is used up by a try.

        A question sees it together with the `live` that `then` sets. Raises BackendFull when nothing of it was written.
        A failed sync is a BackendError: whether the batch outlives the machine is not known, its cursors will tell.
        """
        self._number += 1
        number = NUMBER_64.pack(self._number)
        try:
            self._write(number, fill, then)
        except BackendFull:
            if not self._has_room():
                raise
            self.reopen()
            if not self._is_written(number):
                self._write(number, fill, then)
            else:
                with self._moment:
                    then()
        self._written = number
        self._room_since_s = None
        if self._sync:
            try:
                with self._named():
                    self._opened().flush_wal(sync=True)
            except BackendFull as error:
                raise BackendError(f"the last batch cannot be synced: {error}") from error

    def _write(self, number: bytes, fill: Callable[[WriteBatch], None], then: Callable[[], None]) -> None:
        """RocksDB is asked not to wait by itself: it may wait for ever once a disk was full, and nobody can read."""
        deadline_s = time.monotonic() + _STALL_S
        while True:
            batch = WriteBatch(raw_mode=True)
            fill(batch)
            batch.put(_BATCH_KEY, number)
            size = batch.size_in_bytes()
            with self._moment, self._named(), suppress(_Stalled):
                with _stalls():
                    self._opened().write(batch, self._write_options)
                self.bytes_written += size
                then()
                self._failures = self._opened().property_int_value("rocksdb.background-errors") or 0
                return
            self._wait_in_stall(deadline_s)

    def _wait_in_stall(self, deadline_s: float) -> None:
        """Wait until it may be worth another try. Raises BackendFull when it is not."""
        while True:
            time.sleep(_STALL_POLL_S)
            failed = self.number("background-errors") != self._failures
            if failed or time.monotonic() > deadline_s:
                what = "cannot write its files" if failed else "takes nothing more until files are merged"
                raise BackendFull(f"{self._path}: RocksDB {what}, the disk is full or fails: see {self._path}/LOG")
            if not self.number("is-write-stopped"):
                return

    def _is_written(self, number: bytes) -> bool:
        """Whether the batch that failed last is there after all, now that the log was read again."""
        last = self.get(_BATCH_KEY) or b""
        if last in (number, self._written):
            return last == number
        raise BackendError(f"{self._path} has a batch that could not be written, as it seemed: it has to be read anew")

    def _has_room(self) -> bool:
        """Whether there has been room for so long that RocksDB will not find it without being opened again.

        It does within some 5 s as a rule, but not always where only its log had no room.
        """
        now = time.monotonic()
        in_log_alone = self.number("cur-size-all-mem-tables")
        if shutil.disk_usage(self._path).free < 2 * in_log_alone + _ROOM_TO_OPEN_BYTES:
            self._room_since_s = None
            return False
        if self._room_since_s is None:
            self._room_since_s = now
        return now - self._room_since_s >= _OWN_RECOVERY_S

    def reopen(self) -> None:
        """Close and open. Snapshots that are being read end with an error, questions wait."""
        with self._moment:
            self._end_readers()
            if self._db is not None:
                let_go(self._db)
                self._db = None
            try:
                with self._named():
                    self._db = self._open()
                    self._failures = 0
            except BackendFull as error:
                raise BackendError(f"{self._path} cannot be opened again: {error}") from error

    def read_everything(self) -> None:
        """Every block of every file, against its checksum. Raises BackendCorrupt."""
        for _ in self.walk(self.pin(), b"", b"\xff\xff"):
            pass

    def checkpoint(self, path: Path) -> None:
        """A copy of the index as it is now at `path`, which must not exist; its large files are hard links."""
        with self._moment:
            checkpoint = Checkpoint(self._opened())
            with self._in_use():
                try:
                    checkpoint.create_checkpoint(str(path))
                finally:
                    del checkpoint

    def compact(self) -> None:
        """Rewrite everything without what was deleted or replaced."""
        with self._named():
            self._opened().compact_range(None, None)

    def number(self, name: str) -> int:
        """A figure that RocksDB keeps, 0 when it has none of that name."""
        with self._moment, self._named():
            return self._opened().property_int_value(f"rocksdb.{name}") or 0

    def file_bytes(self) -> int:
        """Bytes that the files occupy on disk."""
        total = 0
        for path in self._path.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    def close(self) -> None:
        """End every snapshot, wait for the questions that are being answered, and close."""
        with self._moment:
            db, self._db = self._db, None
            if db is None:
                return
            self._end_readers()
        let_go(db)

    def _end_readers(self) -> None:
        for pinned in list(self._pinned):
            pinned.release()
        self._moment.wait_for(lambda: not self._asking)


class _Stalled(Exception):
    """RocksDB wants no more before it has written or merged files."""


@contextmanager
def _stalls() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _STALL not in str(error):
            raise
        raise _Stalled from None


def let_go(db: Rdict) -> None:
    """Close a database, its log synced where that is possible, and leave what only the log has there.

    `Rdict.close` alone, or without it the end of the Rdict, writes that to files first. It is not needed, the log is
    read at the next opening; and on a full disk it may wait for ever.
    """
    db.cancel_all_background(wait=False)
    with suppress(Exception):  # it says that it could not write the files
        db.close()


def options_for(resources: Resources) -> Options:
    """What every instance of the database is opened with: the files depend on it."""
    tables = BlockBasedOptions()
    tables.set_bloom_filter(_BLOOM_BITS, False)
    tables.set_block_cache(Cache(resources.block_cache_bytes))
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(tables)
    options.set_prefix_extractor(SliceTransform.create_fixed_prefix(PREFIX_SIZE))
    options.set_memtable_prefix_bloom_ratio(_MEMTABLE_FILTER)
    options.set_memtable_whole_key_filtering(True)
    options.set_write_buffer_size(resources.write_buffer_bytes)
    options.set_max_write_buffer_number(_WRITE_BUFFERS)
    options.set_max_background_jobs(resources.background_jobs)
    options.set_compression_type(DBCompressionType.lz4())
    options.add_compact_on_deletion_collector_factory(*_TOMBSTONES)
    options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    options.set_max_log_file_size(_INFO_LOG_BYTES)
    options.set_keep_log_file_num(_INFO_LOGS)
    return options
