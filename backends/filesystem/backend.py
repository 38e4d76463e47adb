"""The filesystem backend: every change is a record in a journal, then a change in memory. Reads never touch a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

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
from ..ownership import Owner, lost_in_machine_crash, note_writer
from .compaction import Compaction
from .index import Index
from .journal import FOLDER, FULL, Appender, drop_before, recover, segments, snapshots, sync_journal, write_snapshot
from .records import AllCleared, BlockRemoved, Change, Put, StreamForgotten, applied, encode

T = TypeVar("T")

MIB = 1 << 20
SEGMENT_BYTES = 64 * MIB
SNAPSHOT_AFTER_BYTES = 64 * MIB
_OVERDUE = 2
"""A snapshot is made before anything else when the journal is so many times what calls for one."""
_OWNER_WAIT_S = 2
"""A process killed while it starts the one that makes a snapshot leaves its lock there, until that has begun."""


class Durability(StrEnum):
    """What a commit survives. `process`: the end of the process. `machine`: a machine crash too."""

    PROCESS = "process"
    MACHINE = "machine"


class OnCorrupt(StrEnum):
    """What happens to a damaged index at opening. `rebuild`: it is moved aside for a new one."""

    REFUSE = "refuse"
    REBUILD = "rebuild"


class FilesystemBackend(IndexBackend):
    """An index in `directory`, which this process owns until `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        durability: Durability = Durability.PROCESS,
        segment_bytes: int = SEGMENT_BYTES,
        snapshot_after_bytes: int = SNAPSHOT_AFTER_BYTES,
        on_corrupt: OnCorrupt = OnCorrupt.REFUSE,
    ) -> None:
        """Open or create. A snapshot is made when the journal since the last one is larger than both it and the bound.

        Raises BackendBusy, BackendFormat, BackendCorrupt, BackendFull or BackendError.
        """
        self._directory = directory / FOLDER
        self._durability = durability
        self._snapshot_after = snapshot_after_bytes
        self._damage: BackendCorrupt | None = None
        self._compaction: Compaction | None = None
        self.snapshot_problem = ""
        """Why the last snapshot was not made. The journal grows until one is."""
        self._owner = Owner(directory, _OWNER_WAIT_S)
        try:
            with _named_errors(self._directory):
                self._directory.mkdir(mode=0o700, exist_ok=True)
                self.discarded_after_crash = self._discard_if_machine_crashed()
                try:
                    self._open(segment_bytes)
                except BackendCorrupt as error:
                    if on_corrupt is not OnCorrupt.REBUILD:
                        raise
                    self.moved_aside, self.moved_for = self._move_aside(), str(error)
                    self._open(segment_bytes)
        except BaseException:
            self._owner.release()
            raise

    def _open(self, segment_bytes: int) -> None:
        self._index = Index()
        found = recover(self._directory, self._index)
        self.torn_bytes = found.torn_bytes
        synced = self._durability is Durability.MACHINE
        if synced:
            sync_journal(self._directory)
        note_writer(self._directory, self._durability, clean=False)
        self._appender = Appender(self._directory, found, segment_bytes=segment_bytes, synced=synced)
        for path in self._directory.glob("snapshot-*.tmp"):
            path.unlink()
        drop_before(self._directory, found.base)
        self._base = found.base
        self._snapshot_bytes = found.snapshot_bytes
        self._journal_bytes = found.journal_bytes
        self._retry_above = 0
        self._written = 0
        if self._journal_bytes > _OVERDUE * max(self._snapshot_after, self._snapshot_bytes):
            self._compact_at_opening()

    def _compact_at_opening(self) -> None:
        """Processes that end before their snapshot is made must not leave ever more to be read."""
        try:
            self.compact()
        except BackendError as error:
            self.snapshot_problem = str(error)

    def _discard_if_machine_crashed(self) -> bool:
        if not lost_in_machine_crash(self._directory):
            return False
        for _, path in [*segments(self._directory), *snapshots(self._directory)]:
            path.unlink()
        return True

    def _move_aside(self) -> Path:
        aside = self._directory.with_name(f"{FOLDER}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        self._directory.rename(aside)
        self._directory.mkdir(mode=0o700)
        return aside

    def name(self) -> str:
        return "filesystem"

    def persistent(self) -> bool:
        return True

    def _write(self, record: Change, change: Callable[[], T]) -> T:
        """Write a record, then make the change. After an error neither is there."""
        size = self._appender.append(encode(record))
        try:
            outcome = change()
        except BaseException:
            self._appender.take_back(size)
            raise
        self._written += size
        self._journal_bytes += size
        self._tend()
        return outcome

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        if not operations and not cursors:
            return ApplyResult()
        return self._write(applied(operations, cursors), lambda: self._index.apply(operations, cursors))

    def forget_stream(self, stream: str) -> None:
        self._write(StreamForgotten(stream), lambda: self._index.forget_stream(stream))

    def put(self, residency: CacheResidency) -> None:
        self._write(Put(residency), lambda: self._index.put(residency))

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        record = BlockRemoved(scope, worker_id, block_hash)
        return self._write(record, lambda: self._index.remove_block(scope, worker_id, block_hash))

    def clear_worker(self, worker_id: str) -> int:
        return self.apply([ClearBlocks(worker_id)]).cleared

    def clear(self) -> None:
        self._write(AllCleared(), self._index.clear)

    def reclaim(self, rows: int) -> bool:
        """See to the snapshot. There is nothing else to reclaim, and nothing to wait for."""
        self._tend()
        return False

    def _tend(self) -> None:
        """Take over a snapshot that is ready, begin one that is due."""
        try:
            if self._compaction is not None:
                if not self._compaction.done():
                    return
                sequence, self._compaction = self._compaction.sequence, None
                self._take_over(sequence)
            if self._journal_bytes > max(self._snapshot_after, self._snapshot_bytes, self._retry_above):
                self._appender.rotate()
                self._compaction = Compaction(self._directory, self._appender.next)
        except (BackendError, OSError) as error:
            # The change that was made stands. Without a snapshot the journal grows and opening takes longer: try later.
            self._compaction = None
            self.snapshot_problem = str(error)
            self._retry_above = self._journal_bytes + self._snapshot_after
            if isinstance(error, BackendCorrupt):
                self._damage = error

    def _take_over(self, sequence: int) -> None:
        drop_before(self._directory, sequence)
        self._base = sequence
        self._snapshot_bytes = snapshots(self._directory)[-1][1].stat().st_size
        self._written += self._snapshot_bytes
        self._journal_bytes = sum(path.stat().st_size for _, path in segments(self._directory))
        self._retry_above = 0
        self.snapshot_problem = ""

    def compact(self) -> None:
        """Write a snapshot here and now, so that the next opening reads nothing else. Raises BackendError."""
        if self._compaction is not None:
            self._compaction.stop()
            self._compaction = None
        with _named_errors(self._directory):
            self._appender.rotate()
            sequence = self._appender.next
            if sequence != self._base:
                write_snapshot(self._directory, self._appender.history, sequence, self._index.dump())
                self._take_over(sequence)

    def cursors(self) -> dict[str, Cursor]:
        return self._index.cursors()

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        return self._index.find(block_hash, scope)

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        return self._index.prefix_scan(scope, prefix_hash)

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        return self._index.match(scope, block_hashes)

    def holdings(self) -> list[Holding]:
        return self._index.holdings()

    def snapshot(self) -> Iterator[CacheResidency]:
        return self._index.snapshot()

    def __len__(self) -> int:
        return len(self._index)

    def metrics(self) -> IndexMetrics:
        figures = self._index.metrics()
        return IndexMetrics(
            figures.resident_blocks,
            figures.resident_bytes,
            figures.puts,
            figures.removes,
            figures.prefix_scans,
            self._written,
        )

    def health(self) -> StoreHealth:
        return StoreHealth(problem=self.snapshot_problem)

    def stored_bytes(self) -> int:
        total = 0
        for path in self._directory.glob("*-*.*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    def damage(self) -> BackendCorrupt | None:
        return self._damage

    def close(self) -> None:
        try:
            if self._compaction is not None:
                self._compaction.stop()
            # On a full disk the note goes on saying that the writer runs: it is not believed after a machine crash.
            with suppress(OSError):
                self._appender.close()
                note_writer(self._directory, self._durability, clean=True)
        finally:
            self._owner.release()


@contextmanager
def _named_errors(directory: Path) -> Iterator[None]:
    """What the system says of files, as errors of `backends.errors`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise BackendFull(f"{directory}: the disk is full ({error})") from error
        raise BackendError(f"{directory}: {error}") from error


def open_filesystem(directory: Path, options: Mapping[str, Any]) -> FilesystemBackend:
    """For the registry. `options` are the keyword arguments of FilesystemBackend. Raises BackendError."""
    chosen = dict(options)
    if "durability" in chosen:
        chosen["durability"] = Durability(chosen["durability"])
    if "on_corrupt" in chosen:
        chosen["on_corrupt"] = OnCorrupt(chosen["on_corrupt"])
    return FilesystemBackend(directory, **chosen)
