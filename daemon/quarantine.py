"""What could not be translated, kept as it came, so that it can be looked at and tried again later.

One SQLite file in the data directory, in WAL mode: the command line reads it, and drops from it, while the daemon
writes. It is made when there is first something to keep. The writer puts a batch's refused frames here before it
commits the batch to the index, so a crash in between brings them again, to the same rows.

    entry   id | where it came from: source stream engine rank epoch seq event | why: reason field detail | raw …
            one row for the same bytes refused for the same reason at the same place of a stream
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvcensus.translators.translation import Rejection

from .counters import DropCause, QuarantineCounters
from .logs import get_logger
from .printable import printable

if TYPE_CHECKING:
    from .followed import Followed

QUARANTINE_FILE = "quarantine.sqlite"
SCHEMA = 1
WHOLE_PAYLOAD = -1
"""`event` of an entry that is a whole payload."""

_OVERHEAD_BYTES = 512
"""What a row costs besides its bytes, generously: a flood of empty frames is bounded as well."""
_TEXT_MAX = 1000
_LOCKED_WAIT_S = 0.05
_ASKER_WAIT_S = 10.0
_AGAIN_S = 1.0
_TRIM_EVERY_S = 10.0
_LOG_EVERY_S = 60.0
_WAL_BYTES_KEPT = 4 << 20

_CREATE = (
    "CREATE TABLE entry (id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, source TEXT NOT NULL, "
    "stream TEXT NOT NULL, engine TEXT NOT NULL, rank INTEGER, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, "
    "event INTEGER NOT NULL, reason TEXT NOT NULL, field TEXT NOT NULL, detail TEXT NOT NULL, "
    "raw_bytes INTEGER NOT NULL, cost INTEGER NOT NULL, digest BLOB NOT NULL, raw BLOB NOT NULL, "
    "UNIQUE (stream, epoch, seq, event, digest))",
    "CREATE INDEX entry_by_age ON entry (at_ms)",
    f"PRAGMA user_version = {SCHEMA}",
)
_INSERT = (
    "INSERT INTO entry (at_ms, source, stream, engine, rank, epoch, seq, event, reason, field, detail, raw_bytes, "
    "cost, digest, raw) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
_SELECT = (
    "SELECT id, at_ms, source, stream, engine, rank, epoch, seq, event, reason, field, detail, raw_bytes, length(raw)"
)

log = get_logger("quarantine")


class QuarantineError(Exception):
    """The file cannot be used. The message names it and says why."""


class QuarantineLimits(msgspec.Struct, frozen=True):
    """How much is kept, in bytes with every row's overhead, for how many hours, and how many bytes of one frame."""

    max_bytes: int
    max_age_hours: int
    max_payload_bytes: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One refused frame or event.

    `at_ms` is when it was refused, in ms since the Unix epoch. `engine` is the type of its source, `rank` the
    data-parallel rank of its stream, None for none. `event` is the position in the batch, WHOLE_PAYLOAD for a payload.
    `raw_bytes` is the size of what was refused, `kept_bytes` that of `raw`: less when it was cut. `raw` is empty in a
    listing.
    """

    id: int = 0
    at_ms: int
    source: str
    stream: str
    engine: str
    rank: int | None
    epoch: int
    seq: int
    event: int
    reason: str
    field: str
    detail: str
    raw_bytes: int
    kept_bytes: int
    raw: bytes = b""

    @property
    def cut(self) -> bool:
        """Whether only its beginning was kept."""
        return self.kept_bytes < self.raw_bytes

    @property
    def cost(self) -> int:
        """Bytes that it counts for."""
        return self.kept_bytes + len(self.field) + len(self.detail) + _OVERHEAD_BYTES


class Quarantine:
    """The writing side. The writer's thread owns it, and whoever has joined that thread may close it.

    It never raises for a file that cannot be written: what waits is kept in memory, within `max_bytes`, and tried
    again; the index goes on meanwhile.
    """

    def __init__(self, directory: Path, limits: QuarantineLimits) -> None:
        self.counters = QuarantineCounters()
        self._path = directory / QUARANTINE_FILE
        self._limits = limits
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._version = -1
        self._pending: deque[tuple[Entry, bytes]] = deque()
        self._pending_bytes = 0
        self._quiet: dict[str, tuple[float, int]] = {}
        self._again_s = self._trim_s = 0.0
        self.flush()

    def add(
        self, stream: Followed, rank: int | None, epoch: int, seq: int, payload: bytes, rejection: Rejection
    ) -> None:
        """Take what was refused of a message; `flush` writes it. Over the limit of a frame it is cut."""
        raw = payload if rejection.event is None else rejection.raw
        field, detail = (printable(words[:_TEXT_MAX]) for words in (rejection.field, rejection.detail))
        entry = Entry(
            at_ms=time.time_ns() // 1_000_000,
            source=stream.source,
            stream=stream.stream,
            engine=stream.engine,
            rank=stream.rank if rank is None else rank,
            epoch=epoch,
            seq=seq,
            event=WHOLE_PAYLOAD if rejection.event is None else rejection.event,
            reason=rejection.reason,
            field=field,
            detail=detail,
            raw_bytes=len(raw),
            kept_bytes=min(len(raw), self._limits.max_payload_bytes),
            raw=raw[: self._limits.max_payload_bytes],
        )
        digest = blake2b(b"\0".join((rejection.reason.encode(), field.encode(), raw)), digest_size=16).digest()
        self._pending.append((entry, digest))
        self._pending_bytes += entry.cost
        while self._pending_bytes > self._limits.max_bytes:
            self._pending_bytes -= self._pending.popleft()[0].cost
            self._dropped(DropCause.SIZE, 1)

    def flush(self) -> None:
        """Write what was added, and now and then drop what is too old. Returns at once when there is nothing to do."""
        now = time.monotonic()
        if now < (self._again_s if self._pending else self._trim_s):
            return
        self._trim_s = now + _TRIM_EVERY_S
        self._try_to_write()

    def close(self) -> None:
        """Write what is left, whatever happened before, and close the file."""
        if self._pending:
            self._try_to_write()
            self._dropped(DropCause.UNWRITTEN, len(self._pending))
            self._pending.clear()
            self._pending_bytes = 0
        self._disconnect()

    def _try_to_write(self) -> None:
        try:
            if self._connection is not None and _identity(self._path) != self._file:
                self._disconnect()
            if not self._pending and not self._path.exists():
                self.counters.entries = self.counters.bytes = 0
                return
            if self._connection is None:
                self._connection = _open_writing(self._path)
                self._file = _identity(self._path)
            self._write(self._connection)
        except (sqlite3.Error, OSError, QuarantineError) as error:
            self._disconnect()
            self._again_s = time.monotonic() + _AGAIN_S
            self.counters.errors += 1
            self._say("quarantine_not_written", file=str(self._path), detail=str(error), waiting=len(self._pending))

    def _write(self, connection: sqlite3.Connection) -> None:
        counters = self.counters
        oldest_ms = time.time_ns() // 1_000_000 - self._limits.max_age_hours * 3_600_000
        with _transaction(connection):
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            entries, used = counters.entries, counters.bytes
            if version != self._version:
                entries, used = connection.execute("SELECT count(*), coalesce(sum(cost), 0) FROM entry").fetchone()
            added = 0
            for entry, digest in self._pending:
                if connection.execute(_INSERT, _row(entry, digest)).rowcount:
                    added += 1
                    used += entry.cost
            old, old_bytes = _delete(
                connection, connection.execute("SELECT id, cost FROM entry WHERE at_ms < ?", (oldest_ms,))
            )
            excess = used - old_bytes - self._limits.max_bytes
            over, over_bytes = _delete(connection, _oldest(connection, excess))
        self._version = version
        counters.entries = entries + added - old - over
        counters.bytes = used - old_bytes - over_bytes
        counters.added += added
        self._pending.clear()
        self._pending_bytes = 0
        self._dropped(DropCause.AGE, old)
        self._dropped(DropCause.SIZE, over)

    def _dropped(self, cause: DropCause, count: int) -> None:
        if count:
            self.counters.dropped[cause] += count
            self._say(f"quarantine_dropped_by_{cause}", dropped=count, dropped_total=self.counters.dropped[cause])

    def _say(self, event: str, **facts: object) -> None:
        now = time.monotonic()
        quiet_until, muffled = self._quiet.get(event, (0.0, 0))
        if now < quiet_until:
            self._quiet[event] = (quiet_until, muffled + 1)
            return
        self._quiet[event] = (now + _LOG_EVERY_S, 0)
        log.warning(event, **facts, not_logged=muffled)

    def _disconnect(self) -> None:
        self._version = -1
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class KeptEntries:
    """The entries of a data directory, for whoever asks, while the daemon writes or does not run.

    Every method raises QuarantineError. A directory without the file has no entries.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / QUARANTINE_FILE
        if not directory.is_dir():
            raise QuarantineError(f"{directory}: there is no data directory here")

    def listed(self) -> list[Entry]:
        """Every entry without its bytes, the oldest first."""
        with self._reading() as connection:
            return [_entry(row) for row in connection.execute(f"{_SELECT}, x'' FROM entry ORDER BY id")]

    def whole(self, ids: Iterable[int]) -> Iterator[Entry]:
        """These entries, in this order. One that is not there is left out."""
        with self._reading() as connection:
            for one in ids:
                for row in connection.execute(f"{_SELECT}, raw FROM entry WHERE id = ?", (one,)):
                    yield _entry(row)

    def drop(self, ids: Iterable[int]) -> list[int]:
        """Drop these entries. Returns those that were there."""
        if not self._path.exists():
            return []
        with _named(self._path):
            connection = sqlite3.connect(self._path, timeout=_ASKER_WAIT_S, isolation_level=None)
            with closing(connection):
                _check_schema(connection, self._path)
                with _transaction(connection):
                    return [one for one in ids if connection.execute("DELETE FROM entry WHERE id = ?", (one,)).rowcount]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The file to read from; without one, an empty table."""
        with _named(self._path), closing(_open_reading(self._path)) as connection:
            yield connection


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise QuarantineError(f"{path}: {error}") from error


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _open_writing(path: Path) -> sqlite3.Connection:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=_LOCKED_WAIT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA auto_vacuum = FULL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
        _create(connection)
        _check_schema(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another of its name; None without one. Who has it open would not notice."""
    try:
        seen = path.stat()
    except FileNotFoundError:
        return None
    return seen.st_dev, seen.st_ino


def _open_reading(path: Path) -> sqlite3.Connection:
    """A file that nobody writes has no log beside it, and can be read where nothing may be created."""
    if not path.exists():
        nothing = sqlite3.connect(":memory:", isolation_level=None)
        _create(nothing)
        return nothing
    uri = f"{path.absolute().as_uri()}?mode=ro"
    if not path.with_name(f"{path.name}-wal").exists() and not os.access(path.parent, os.W_OK):
        uri += "&immutable=1"
    connection = sqlite3.connect(uri, uri=True, timeout=_ASKER_WAIT_S, isolation_level=None)
    try:
        _check_schema(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """The whole schema, or what another process made of it meanwhile."""
    with _transaction(connection):
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _CREATE:
                connection.execute(statement)


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    schema = connection.execute("PRAGMA user_version").fetchone()[0]
    if schema != SCHEMA:
        raise QuarantineError(f"{path} has schema {schema}, this version knows schema {SCHEMA}; it was left as it is")


def _row(entry: Entry, digest: bytes) -> tuple[object, ...]:
    return (
        *(entry.at_ms, entry.source, entry.stream, entry.engine, entry.rank, entry.epoch, _signed(entry.seq)),
        *(entry.event, entry.reason, entry.field, entry.detail, entry.raw_bytes, entry.cost, digest, entry.raw),
    )


def _entry(row: tuple[Any, ...]) -> Entry:
    values = dict(zip(Entry.__struct_fields__, row, strict=True))
    return Entry(**{**values, "seq": values["seq"] % (1 << 64)})


def _signed(seq: int) -> int:
    """SQLite has no unsigned 64-bit numbers, and a publisher may send any."""
    return seq - (1 << 64) if seq >= 1 << 63 else seq


def _oldest(connection: sqlite3.Connection, excess: int) -> Iterator[tuple[int, int]]:
    """The ids and costs of the oldest entries that together make up the excess."""
    if excess > 0:
        for one, cost in connection.execute("SELECT id, cost FROM entry ORDER BY id"):
            yield one, cost
            excess -= cost
            if excess <= 0:
                return


def _delete(connection: sqlite3.Connection, found: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Delete entries by id. Returns their number and their cost."""
    doomed = list(found)
    connection.executemany("DELETE FROM entry WHERE id = ?", [(one,) for one, _ in doomed])
    return len(doomed), sum(cost for _, cost in doomed)
