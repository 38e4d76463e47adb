"""Files of records: a head that says what the file is, then records with checksums.

head     magic (4 bytes), schema (u32), history (16 bytes), sequence (u64), CRC-32 of these (u32)
record   length of the payload (u32), CRC-32 of the payload (u32), CRC-32 of both and of the record's number (u32),
         payload

Numbers are little-endian. `history` is the same random number in all files of one index. `sequence` is, in a segment of
the journal, the number of its first record; in a snapshot, that of the first change which it does not have.

A process that is killed leaves a beginning of what it was writing, so only the end of a file may be incomplete: `torn`.
A machine that goes down may also leave zeros there, or a last record with some of its pages. Everything else that does
not fit its checksum is damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from ..errors import BackendCorrupt, BackendFormat

SCHEMA = 1
JOURNAL, SNAPSHOT = b"KVCJ", b"KVCS"

_FILE_HEAD = struct.Struct("<4sI16sQ")
_CHECK = struct.Struct("<I")
_RECORD = struct.Struct("<II")
_NUMBER = struct.Struct("<Q")
FILE_HEAD_BYTES = _FILE_HEAD.size + _CHECK.size
RECORD_HEAD_BYTES = _RECORD.size + _CHECK.size
MAX_PAYLOAD = (1 << 32) - 1
_BUFFER = 1 << 20


def file_head(magic: bytes, history: bytes, sequence: int) -> bytes:
    """The first bytes of a file."""
    head = _FILE_HEAD.pack(magic, SCHEMA, history, sequence)
    return head + _CHECK.pack(crc32(head))


def framed(payload: bytes, number: int) -> bytes:
    """A record. `number` counts from the first one of the index, or in a snapshot from 0."""
    head = _RECORD.pack(len(payload), crc32(payload))
    return b"".join((head, _CHECK.pack(_head_check(head, number)), payload))


def _head_check(head: bytes, number: int) -> int:
    return crc32(head, crc32(_NUMBER.pack(number)))


class RecordFile:
    """A file being read. `sound_bytes` is the length of what was read and fits, `torn_bytes` what follows at the end.

    Raises BackendFormat for a schema or file that is not ours, BackendCorrupt, OSError.
    """

    def __init__(self, path: Path, magic: bytes) -> None:
        self.path = path
        self.history, self.sequence = b"", 0
        self.sound_bytes = self.torn_bytes = 0
        self._file: BinaryIO = path.open("rb", _BUFFER)
        try:
            self._size = path.stat().st_size
            self._read_head(magic)
        except BaseException:
            self._file.close()
            raise

    @property
    def has_head(self) -> bool:
        """Whether the head was written as a whole."""
        return self.sound_bytes > 0

    def close(self) -> None:
        """Stop reading."""
        self._file.close()

    def _read_head(self, magic: bytes) -> None:
        head = self._file.read(FILE_HEAD_BYTES)
        if len(head) < FILE_HEAD_BYTES or (not any(head) and self._only_zeros_follow()):
            self._torn(0)
            return
        if not any(head):
            raise corrupt(self.path, "its head is gone")
        found, schema, history, sequence = _FILE_HEAD.unpack_from(head)
        if found != magic:
            raise BackendFormat(f"{self.path} is not of kvcensus: it begins with {found!r}; it was left as it is")
        if schema != SCHEMA:
            raise BackendFormat(
                f"{self.path} has schema {schema}, this version knows schema {SCHEMA}; it was left as it is"
            )
        if _CHECK.unpack_from(head, _FILE_HEAD.size)[0] != crc32(head[: _FILE_HEAD.size]):
            raise corrupt(self.path, "the checksum of its head is wrong")
        self.history, self.sequence, self.sound_bytes = history, sequence, FILE_HEAD_BYTES

    def records(self, first: int) -> Iterator[bytes]:
        """The payloads, from the record of number `first`."""
        number = first
        while not self.torn_bytes and self.sound_bytes < self._size:
            payload = self._next(number)
            if payload is None:
                return
            number += 1
            self.sound_bytes += RECORD_HEAD_BYTES + len(payload)
            yield payload

    def _next(self, number: int) -> bytes | None:
        """The next payload, None at a torn end."""
        at = self.sound_bytes
        head = self._file.read(RECORD_HEAD_BYTES)
        if len(head) < RECORD_HEAD_BYTES:
            return self._torn(at)
        length, check = _RECORD.unpack_from(head)
        if _CHECK.unpack_from(head, _RECORD.size)[0] != _head_check(head[: _RECORD.size], number):
            if self._only_zeros_follow():
                return self._torn(at)
            raise corrupt(self.path, f"the head of record {number} at byte {at} does not fit its checksum")
        end = at + RECORD_HEAD_BYTES + length
        if end > self._size:
            return self._torn(at)
        payload = self._file.read(length)
        if crc32(payload) != check:
            if end == self._size or self._only_zeros_follow():
                return self._torn(at)
            raise corrupt(self.path, f"record {number} at byte {at} does not fit its checksum")
        return payload

    def _torn(self, at: int) -> bytes | None:
        self.torn_bytes = self._size - at
        return None

    def _only_zeros_follow(self) -> bool:
        while rest := self._file.read(_BUFFER):
            if any(rest):
                return False
        return True


def corrupt(path: Path, detail: str) -> BackendCorrupt:
    """The error of a damaged file. It says the one command that makes room for a new index."""
    place = path.parent
    return BackendCorrupt(
        f"{path} is damaged ({detail}); the index is not served. To rebuild it from the engines: "
        f"mv {place} {place}.corrupt"
    )
