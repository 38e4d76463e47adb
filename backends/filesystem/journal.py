"""The journal on disk: which files there are, what they hold together, and appending to the last segment.

journal-N.kvj     records N and following, up to the next segment
snapshot-N.kvs    the index after records 0 to N - 1: segments before N are not needed any more
snapshot-N.P.tmp  one that process P is writing
boot.json         how the last writer ran
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from ..errors import BackendError, BackendFull
from ..ownership import sync_directory
from .framing import (
    FILE_HEAD_BYTES,
    JOURNAL,
    MAX_PAYLOAD,
    SNAPSHOT,
    RecordFile,
    corrupt,
    file_head,
    framed,
)
from .index import Index
from .records import Content, decode_change, decode_content, encode

FOLDER = "journal"
"""Where these files are in a data directory."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG = (msgspec.DecodeError, IndexError, OverflowError)
"""What records raise that fit their checksum and are none of ours."""
_WRITE_BYTES = 1 << 20


def segment_path(directory: Path, first: int) -> Path:
    """The segment that begins with record `first`."""
    return directory / f"journal-{first:016d}.kvj"


def snapshot_path(directory: Path, sequence: int) -> Path:
    """The snapshot of the records before `sequence`."""
    return directory / f"snapshot-{sequence:016d}.kvs"


def draft_path(directory: Path, sequence: int, process: int) -> Path:
    """The snapshot that a process is writing."""
    return snapshot_path(directory, sequence).with_suffix(f".{process}.tmp")


def numbered(directory: Path, pattern: str) -> list[tuple[int, Path]]:
    """The files of a kind by their number, lowest first."""
    names = [(path.stem.rpartition("-")[2], path) for path in directory.glob(pattern)]
    return sorted((int(number), path) for number, path in names if number.isdecimal())


def segments(directory: Path) -> list[tuple[int, Path]]:
    """Every segment by its first record."""
    return numbered(directory, "journal-*.kvj")


def snapshots(directory: Path) -> list[tuple[int, Path]]:
    """Every snapshot by its sequence number."""
    return numbered(directory, "snapshot-*.kvs")


def nothing() -> None:
    """What is done between records when there is nothing to do."""


class Recovered(msgspec.Struct):
    """What was read into an index. `next` is the number of the next record, `base` the one after the snapshot.

    `last` is the last segment, None when there is none, and `sound_bytes` its length up to which it is whole.
    """

    history: bytes = b""
    base: int = 0
    next: int = 0
    last: Path | None = None
    sound_bytes: int = 0
    torn_bytes: int = 0
    journal_bytes: int = 0
    snapshot_bytes: int = 0


def recover(
    directory: Path, index: Index, until: int | None = None, between: Callable[[], None] = nothing
) -> Recovered:
    """Read the newest snapshot and the journal after it, or only the segments before record `until`. Changes no file.

    `between` is called between records. Raises BackendFormat, BackendCorrupt, OSError.
    """
    found = Recovered()
    if snapshot := snapshots(directory):
        _load_snapshot(*snapshot[-1], index, found, between)
    journal = [one for one in segments(directory) if until is None or one[0] < until]
    followers = [first for first, _ in journal[1:]]
    while followers and followers[0] <= found.base:
        del journal[0], followers[0]
    for at, (first, path) in enumerate(journal):
        if first > found.next:
            raise corrupt(path, f"records {found.next} to {first - 1}, which come before it, are missing")
        number = _replay(path, first, index, found, between)
        last = at + 1 == len(journal)
        if number < found.next:
            raise corrupt(path, f"it ends before record {number}, and the snapshot has those before {found.next}")
        found.next = number
        if found.torn_bytes and (not last or until is not None):
            raise corrupt(path, f"it ends within a record, {found.torn_bytes} bytes, and is not the last")
        if not last and found.next > followers[at]:
            raise corrupt(path, f"it has record {followers[at]}, with which the next one begins")
    index.recovered()
    return found


def _load_snapshot(sequence: int, path: Path, index: Index, found: Recovered, between: Callable[[], None]) -> None:
    file = RecordFile(path, SNAPSHOT)
    try:
        if not file.has_head or file.sequence != sequence:
            raise corrupt(path, "its head is that of another file")

        def contents() -> Iterator[Content]:
            for payload in file.records(0):
                between()
                yield decode_content(payload)

        try:
            complete = index.load(contents())
        except _WRONG as error:
            raise corrupt(path, repr(error)) from error
        if not complete:
            raise corrupt(path, "it is not complete")
    finally:
        file.close()
    found.history, found.base, found.next = file.history, sequence, sequence
    found.snapshot_bytes = file.sound_bytes


def _replay(path: Path, first: int, index: Index, found: Recovered, between: Callable[[], None]) -> int:
    """Returns the number of the record after the last one."""
    file = RecordFile(path, JOURNAL)
    try:
        if file.has_head and (file.sequence != first or file.history != (found.history or file.history)):
            raise corrupt(path, "its head is that of another file")
        number = first
        for payload in file.records(first):
            between()
            if number >= found.base:
                try:
                    index.change(decode_change(payload))
                except _WRONG as error:
                    raise corrupt(path, f"record {number}: {error!r}") from error
            number += 1
    finally:
        file.close()
    if file.has_head:
        found.history = file.history
    found.last, found.sound_bytes, found.torn_bytes = path, file.sound_bytes, file.torn_bytes
    found.journal_bytes += file.sound_bytes
    return number


def sync_journal(directory: Path) -> None:
    """Make durable what was not synced when it was written. Raises OSError."""
    for _, path in segments(directory):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    sync_directory(directory)
    sync_directory(directory.parent)


class Appender:
    """The end of the journal. After an error of `append` the record is not there, or nothing more can be written."""

    def __init__(self, directory: Path, found: Recovered, *, segment_bytes: int, synced: bool) -> None:
        """Goes on where the last record ended, and cuts what is torn. Raises OSError."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._synced = synced
        self._failed = ""
        self.history = found.history or os.urandom(16)
        self.next = found.next
        if found.last is None or not found.sound_bytes:
            self._begin_segment()
            return
        self._file = os.open(found.last, os.O_WRONLY | os.O_CLOEXEC)
        self._size = found.sound_bytes
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
        self._sync()

    def append(self, payload: bytes) -> int:
        """Write a record; synced, if that is what was chosen. Returns its bytes. Raises BackendFull or BackendError."""
        if self._failed:
            raise BackendError(f"{self._directory}: {self._failed}; open the index again")
        if len(payload) > MAX_PAYLOAD:
            raise BackendError(f"{self._directory}: one call of {len(payload)} bytes is more than a record holds")
        if self._size > self._segment_bytes:
            self.rotate()
        record = framed(payload, self.next)
        try:
            _write(self._file, record)
        except OSError as error:
            self._cut(self._size)
            raise self._error(error) from error
        try:
            self._sync()
        except OSError as error:
            # What of the file has reached the disk is not known any more, and a second fsync would not tell.
            self._failed = f"a sync failed ({error})"
            self._cut(self._size)
            raise self._error(error) from error
        self._size += len(record)
        self.next += 1
        return len(record)

    def take_back(self, size: int) -> None:
        """Undo the last `append`, of `size` bytes, and write nothing more: the caller could not follow it."""
        self._cut(self._size - size)
        self._failed = self._failed or "a change that was written could not be made"

    def rotate(self) -> None:
        """Begin a new segment, unless the last one is empty. Raises BackendFull or BackendError."""
        if self._size == FILE_HEAD_BYTES:
            return
        old = self._file
        try:
            self._begin_segment()
        except OSError as error:
            raise self._error(error) from error
        os.close(old)

    def close(self) -> None:
        """Make all durable, also what was not synced when it was written. Raises OSError."""
        os.close(self._file)
        sync_journal(self._directory)

    def _begin_segment(self) -> None:
        path = segment_path(self._directory, self.next)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(file, file_head(JOURNAL, self.history, self.next))
            if self._synced:
                os.fsync(file)
                sync_directory(self._directory)
        except BaseException:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        self._file, self._size = file, FILE_HEAD_BYTES

    def _sync(self) -> None:
        if self._synced:
            os.fdatasync(self._file)

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
            os.lseek(self._file, size, os.SEEK_SET)
        except OSError as error:
            self._failed = f"what was written of a failed change could not be taken back ({error})"

    def _error(self, error: OSError) -> BackendError:
        if error.errno in FULL:
            return BackendFull(f"{self._directory}: no room for the journal ({error})")
        return BackendError(f"{self._directory}: the journal cannot be written: {error}")


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_snapshot(
    directory: Path, history: bytes, sequence: int, contents: Iterable[Content], between: Callable[[], None] = nothing
) -> int:
    """Write the index as it is before record `sequence`. It is there as a whole or not at all. Returns its bytes.

    Raises OSError, and whatever `between`, which is called between records.
    """
    path = snapshot_path(directory, sequence)
    draft = draft_path(directory, sequence, os.getpid())
    size = 0
    try:
        with open(draft, "wb", _WRITE_BYTES, opener=_private) as file:
            size += file.write(file_head(SNAPSHOT, history, sequence))
            for number, content in enumerate(contents):
                between()
                size += file.write(framed(encode(content), number))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    return size


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def drop_before(directory: Path, sequence: int) -> None:
    """Delete what the snapshot of `sequence` makes superfluous, and what a killed process left."""
    for number, path in snapshots(directory):
        if number < sequence:
            path.unlink()
    journal = segments(directory)
    for (_, path), (following, _) in pairwise(journal):
        if following <= sequence:
            path.unlink()
