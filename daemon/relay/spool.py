"""The spool: what was received and is not acknowledged yet, in LMDB, with the cursors of the streams it came from.

    records    running number -> record, in the order in which it is published
    streams    stream -> cursor, in the same transaction as the records that advanced it
    published  stream -> epoch and sequence number of its last acknowledged record
    meta       schema, lineage

One thread writes; another may read. Beyond its bound the spool drops the oldest records, and puts one `fence` for each
worker in the place of the last record that it lost there: so whoever reads the bus is told, in the right place.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from kvcensus.backends.errors import BackendCorrupt, BackendError, BackendFormat, BackendFull
from kvcensus.backends.lmdb.checks import check_metas, check_state, corrupt
from kvcensus.backends.lmdb.files import (
    DAMAGE,
    Durability,
    allocate_lock_file,
    discard_if_machine_crashed,
    disk_is_full,
    named_errors,
)
from kvcensus.backends.model import Cursor
from kvcensus.backends.ownership import Owner, note_writer
from kvcensus.translators.translation import worker_id_of

from ..streams.delivery import Control
from .convention import Address
from .record import Position, Record

SPOOL_FILE = "spool.mdb"
SCHEMA = 1

_KEEP_EIGHTHS = 7
"""What is left when the bound was passed, in eighths of it: not every message then drops another."""
_SPARE_BYTES = 64 << 20
"""The file may hold twice the bound and this: pages of dropped records are free only after the next transaction.

One that is larger already, since the bound was lowered, may grow by this: dropping takes pages, too.
"""
_MAX_READERS = 16
_NODE_BYTES = 18
"""What LMDB adds to a value in a page: a head of 8 bytes, a pointer of 2, our key of 8."""
_PAGE_HEAD_BYTES = 16


class _Head(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A record without its payload."""

    address: Address
    epoch: int
    seq: int
    control: Control
    at_ms: int


class Loss(msgspec.Struct):
    """What was dropped of one stream: `messages` with a payload, `bytes` of them, up to number `seq` of `epoch`."""

    stream: str
    messages: int
    bytes: int
    epoch: int
    seq: int


class _Tables(NamedTuple):
    records: lmdb._Database
    streams: lmdb._Database
    published: lmdb._Database
    meta: lmdb._Database


class _Size(NamedTuple):
    records: int
    bytes: int


_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_cursor = msgspec.msgpack.Decoder(Cursor).decode
_decode_position = msgspec.msgpack.Decoder(Position).decode


class Spool:
    """The spool in `directory`, which this process owns until `close`. `max_bytes` bounds the records in it.

    `lineage` names this spool for as long as it lives: 16 random hexadecimal digits.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Open or create. Raises BackendBusy, BackendFormat, BackendCorrupt, BackendFull or BackendError."""
        self.drops = 0
        """Times that records were dropped. The reader has to read again what it read ahead."""
        self._directory = directory
        self._path = directory / SPOOL_FILE
        self._max_bytes = max_bytes
        self._owner = Owner(directory)
        try:
            self.discarded_after_crash = discard_if_machine_crashed(directory, SPOOL_FILE)
            self._env = self._open()
        except BaseException:
            self._owner.release()
            raise

    def _open(self) -> lmdb.Environment:
        with named_errors(self._path):
            file_bytes = 0
            if self._path.exists():
                check_metas(self._path)
                file_bytes = self._path.stat().st_size
            else:
                note_writer(self._directory, Durability.PROCESS, clean=False)
            allocate_lock_file(self._path.with_name(f"{SPOOL_FILE}-lock"))
            env = lmdb.open(
                str(self._path),
                subdir=False,
                map_size=max(2 * self._max_bytes, file_bytes) + _SPARE_BYTES,
                max_dbs=len(_Tables._fields),
                mode=0o600,
                max_readers=_MAX_READERS,
                sync=False,
            )
            try:
                check_state(self._path, env)
                self._page_bytes = int(env.stat()["psize"])
                self._inline_bytes = (self._page_bytes - _PAGE_HEAD_BYTES) // 2 - _NODE_BYTES
                self._prepare(env)
                note_writer(self._directory, Durability.PROCESS, clean=False)
            except BaseException:
                env.close()
                raise
        return env

    def _prepare(self, env: lmdb.Environment) -> None:
        """All tables in one transaction: a file has the whole schema or is empty."""
        if env.stat()["entries"]:
            self._check_schema(env)
        with env.begin(write=True) as txn:
            self._tables = _Tables(*(env.open_db(name.encode(), txn=txn) for name in _Tables._fields))
            lineage = txn.get(b"lineage", db=self._tables.meta)
            if lineage is None:
                lineage = secrets.token_hex(8).encode()
                txn.put(b"lineage", lineage, db=self._tables.meta)
                txn.put(b"schema", bytes((SCHEMA,)), db=self._tables.meta)
            self.lineage = lineage.decode()
            cursor = txn.cursor(self._tables.records)
            self.last_key = _number(cursor.key()) if cursor.last() else 0
            self._size = _Size(0, 0)
            for _, value in cursor.iternext() if cursor.first() else ():
                self._size = self._grown(self._size, len(value), 1)

    def _check_schema(self, env: lmdb.Environment) -> None:
        try:
            meta = env.open_db(b"meta", create=False)
        except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
            raise BackendFormat(f"{self._path} is an LMDB file, but not a spool of kvcensus") from error
        with env.begin() as txn:
            schema = txn.get(b"schema", db=meta)
        if schema != bytes((SCHEMA,)):
            raise BackendFormat(
                f"{self._path} has schema {schema!r}, this version knows {SCHEMA}; it was left as it is"
            )

    @property
    def waiting(self) -> int:
        """How many records wait for their acknowledgement."""
        return self._size.records

    @property
    def waiting_bytes(self) -> int:
        """What they take in the file."""
        return self._size.bytes

    def cursors(self) -> dict[str, Cursor]:
        """How far each stream was received, by its name. Raises BackendCorrupt."""
        with self._reading() as txn:
            return {key.decode(): _decode_cursor(value) for key, value in txn.cursor(self._tables.streams)}

    def published(self) -> dict[str, Position]:
        """The last record of each stream that was known to be acknowledged. Raises BackendCorrupt."""
        with self._reading() as txn:
            return {key.decode(): _decode_position(value) for key, value in txn.cursor(self._tables.published)}

    def read(self, after: int, most: int, most_bytes: int) -> list[tuple[int, Record]]:
        """Records with a running number beyond `after`, in order: at least one, if there is one."""
        found: list[tuple[int, Record]] = []
        with self._reading() as txn:
            cursor = txn.cursor(self._tables.records)
            more = cursor.set_range(_key(after + 1))
            while more and len(found) < most and most_bytes > 0:
                value = cursor.value()
                found.append((_number(cursor.key()), _decode_record(value)))
                most_bytes -= len(value)
                more = cursor.next()
        return found

    def oldest_at_ms(self) -> int:
        """When the oldest record was spooled, 0 when there is none."""
        with self._reading() as txn:
            cursor = txn.cursor(self._tables.records)
            return _decode_head(cursor.value()).at_ms if cursor.first() else 0

    def commit(
        self,
        records: Sequence[Record],
        cursors: Iterable[Cursor],
        through: int = 0,
        published: Iterable[tuple[str, Position]] = (),
    ) -> list[Loss]:
        """Append records with the cursors that they advance, and forget those up to number `through`.

        Returns what was dropped because the bound was passed. Nothing is changed when it raises: BackendFull,
        BackendCorrupt, BackendError.
        """
        with self._writing() as txn:
            size = self._trim(txn, self._size, through)
            last_key = self.last_key
            for record in records:
                last_key += 1
                value = _encode(record)
                txn.put(_key(last_key), value, append=True, db=self._tables.records)
                size = self._grown(size, len(value), 1)
            for cursor in cursors:
                txn.put(cursor.stream.encode(), _encode(cursor), db=self._tables.streams)
            for stream, position in published:
                txn.put(stream.encode(), _encode(position), db=self._tables.published)
            losses: list[Loss] = []
            if size.bytes > self._max_bytes:
                size, losses = self._drop(txn, size, self._max_bytes * _KEEP_EIGHTHS // 8)
        self._size, self.last_key = size, last_key
        self.drops += bool(losses)
        return losses

    def make_room(self, through: int = 0) -> list[Loss]:
        """Forget the records up to number `through`, or if there are none drop the oldest eighth.

        For a file or a disk that has no room. Raises as `commit`.
        """
        with self._writing() as txn:
            # What the transaction before this one freed can be used after it, if it changes anything at all.
            txn.put(b"schema", bytes((SCHEMA,)), db=self._tables.meta)
            losses: list[Loss] = []
            size = self._trim(txn, self._size, through)
            if size == self._size:
                size, losses = self._drop(txn, size, size.bytes * _KEEP_EIGHTHS // 8)
        self._size = size
        self.drops += bool(losses)
        return losses

    def _trim(self, txn: lmdb.Transaction[bytes], size: _Size, through: int) -> _Size:
        cursor = txn.cursor(self._tables.records)
        more = cursor.first()
        while more and _number(cursor.key()) <= through:
            size = self._grown(size, len(cursor.value()), -1)
            cursor.delete()
            more = cursor.key() != b""
        return size

    def _drop(self, txn: lmdb.Transaction[bytes], size: _Size, keep_bytes: int) -> tuple[_Size, list[Loss]]:
        """Drop the oldest records until `keep_bytes` are left, and put a fence for what each stream lost."""
        cursor = txn.cursor(self._tables.records)
        lost: dict[str, tuple[bytes, _Head]] = {}
        losses: dict[str, Loss] = {}
        more = cursor.first()
        while more and size.bytes > keep_bytes:
            value = cursor.value()
            head = _decode_head(value)
            stream = worker_id_of(head.address.worker, head.address.rank)
            lost[stream] = (cursor.key(), head)
            loss = losses.setdefault(stream, Loss(stream, 0, 0, 0, 0))
            loss.epoch, loss.seq = head.epoch, head.seq
            if head.control is Control.NONE:
                loss.messages += 1
                loss.bytes += len(value)
            size = self._grown(size, len(value), -1)
            cursor.delete()
            more = cursor.key() != b""
        for key, head in lost.values():
            size = self._put_trace(txn, size, key, head)
        return size, [loss for loss in losses.values() if loss.messages]

    def _put_trace(self, txn: lmdb.Transaction[bytes], size: _Size, key: bytes, last: _Head) -> _Size:
        """What stays of the records of a stream that were dropped: another life clears whatever went before it."""
        control = last.control if last.control is Control.LIFE else Control.FENCE
        value = _encode(Record(last.address, last.epoch, last.seq, control, last.at_ms))
        txn.put(key, value, db=self._tables.records)
        return self._grown(size, len(value), 1)

    def _grown(self, size: _Size, value_bytes: int, count: int) -> _Size:
        """The size with a value more or less: large ones have whole pages of their own."""
        taken = value_bytes + _NODE_BYTES
        if value_bytes > self._inline_bytes:
            taken += -(value_bytes + _PAGE_HEAD_BYTES) % self._page_bytes + _PAGE_HEAD_BYTES
        return _Size(size.records + count, size.bytes + count * taken)

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction[bytes]]:
        with self._errors_named(), self._env.begin(write=True) as txn:
            yield txn

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction[bytes]]:
        with self._errors_named(), self._env.begin() as txn:
            yield txn

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise BackendFull(f"{self._path}: the file has reached its limit") from error
        except (*DAMAGE, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._corrupt(error) from error
        except lmdb.Error as error:
            if disk_is_full(self._directory):
                raise BackendFull(f"{self._path}: the disk is full ({error})") from error
            raise BackendError(f"{self._path}: {error}") from error

    def _corrupt(self, error: Exception) -> BackendCorrupt:
        return corrupt(self._path, repr(error))

    def close(self) -> None:
        """Give the spool up. What is in it is sent by whoever opens it next."""
        try:
            self._env.sync(True)
            self._env.close()
            # On a full disk the note goes on saying that the writer runs: it is not believed after a machine crash.
            with suppress(OSError):
                note_writer(self._directory, Durability.PROCESS, clean=True)
        finally:
            self._owner.release()


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _number(key: bytes) -> int:
    return int.from_bytes(key, "big")
