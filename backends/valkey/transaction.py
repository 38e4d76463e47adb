"""One change of an index on a server: what it needs is read under WATCH, what it comes to is written by one EXEC.

The state may change between the two only if somebody else writes, and then nothing is written. `meta` has a number of
the last commit, and of the attempt that made it: when the reply to EXEC is lost, they tell later whether it was done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from valkey import exceptions
from valkey.connection import Connection

from ..errors import BackendBusy, BackendCorrupt, BackendLost
from ..lmdb.overlay import Overlay
from ..lmdb.rows import LENGTH, ROW
from .layout import Command, Keys, by_bucket, found_rows, pairs
from .server import Disconnected, Server

_STATE = (b"instance", b"session", b"commit", b"attempt")
_LINKS_TOGETHER = 5_000


class Position(NamedTuple):
    """What `meta` has when nobody but us has written. `attempts` are those of `commit + 1` whose outcome is not known.

    `instance` is of the index from its first commit on, `session` of whoever opened it last. `attempt` is the one that
    made `commit`, 0 before the first one of the session: two servers may have made different ones.
    """

    instance: bytes
    session: bytes
    commit: int
    attempt: int = 0
    attempts: tuple[int, ...] = ()


class Committed(Exception):
    """An attempt whose reply was lost had been carried out."""

    def __init__(self, attempt: int) -> None:
        super().__init__(attempt)
        self.attempt = attempt


class Overtaken(Exception):
    """`meta` has changed since it was read. Nothing was written."""

    def __str__(self) -> str:
        return "valkey: somebody else writes the index, too"


class Uncertain(Exception):
    """The reply to EXEC was lost."""


class Transaction:
    """One change. It stands in for LMDB's transaction where `lmdb.catalog` asks for the small tables."""

    def __init__(self, server: Server, connection: Connection, keys: Keys, position: Position) -> None:
        self._server = server
        self._connection = connection
        self._keys = keys
        self._position = position
        self._begun = False
        self._changes: dict[str, dict[bytes, bytes | None]] = {}
        self.commands: list[Command] = []
        self.bytes_written = 0

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Replies to questions about the watched state. Raises BackendLost, BackendBusy, Committed or Disconnected."""
        if self._begun:
            return self._server.exchange(self._connection, commands)
        head: list[Command] = [("WATCH", self._keys.meta), ("HMGET", self._keys.meta, *_STATE)]
        replies = self._server.exchange(self._connection, [*head, *commands])
        self._check(*replies[1])
        self._begun = True
        return replies[2:]

    def _check(self, instance: bytes | None, session: bytes | None, commit: bytes | None, attempt: bytes) -> None:
        at = self._position
        if instance != at.instance or commit is None:
            raise BackendLost(
                f"valkey {self._server.address}: the index that this process had opened is gone: "
                "the server was emptied, or lost its data"
            )
        if session != at.session:
            raise BackendBusy(f"valkey {self._server.address}: another process has taken the index over")
        if (int(commit), int(attempt)) == (at.commit, at.attempt):
            return
        if int(commit) == at.commit + 1 and int(attempt) in at.attempts:
            raise Committed(int(attempt))
        raise BackendLost(
            f"valkey {self._server.address}: commit {at.commit} of the index is gone, it is at commit {int(commit)}: "
            "the server has gone back to an older state, or has one of another history"
        )

    def rows(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The rows that there are of these."""
        commands, groups = self._keys.fetch(keys)
        return found_rows(groups, self.ask(commands))

    def get(self, key: bytes, default: bytes | None = None, *, db: str) -> bytes | None:
        """A value of a small table."""
        changed = self._changes.get(db, {})
        value = changed[key] if key in changed else self.ask([("HGET", self._keys.tables[db], key)])[0]
        return default if value is None else value

    def put(self, key: bytes, value: bytes, *, db: str) -> None:
        """Change a small table."""
        self._changes.setdefault(db, {})[key] = value

    def delete(self, key: bytes, *, db: str) -> None:
        """Change a small table."""
        self._changes.setdefault(db, {})[key] = None

    def cursor(self, db: str) -> Iterator[tuple[bytes, bytes]]:
        """A small table as it was before this change."""
        return iter(sorted(pairs(self.ask([("HGETALL", self._keys.tables[db])])[0])))

    def adds_to(self, table: str) -> bool:
        """Whether something is written into a small table."""
        return any(value is not None for value in self._changes.get(table, {}).values())

    def commit(self, attempt: int, more: Iterable[Command] = ()) -> None:
        """Write everything. Raises Overtaken, Uncertain, BackendFull or BackendError; but for Uncertain nothing was."""
        if not self._begun:
            self.ask(())
        number = self._position.commit + 1
        commands = [
            ("MULTI",),
            *self.commands,
            *self._table_commands(),
            ("HSET", self._keys.meta, b"commit", number, b"attempt", attempt),
            *more,
            ("EXEC",),
        ]
        self._begun = False
        try:
            done = self._server.exchange(self._connection, commands)[-1]
        except Disconnected as error:
            raise Uncertain(str(error)) from error
        if done is None:
            raise Overtaken
        refusal = next((reply for reply in done if isinstance(reply, exceptions.ResponseError)), None)
        if refusal is not None:
            raise BackendCorrupt(f"valkey {self._server.address}: half of a commit was refused: {refusal}")

    def _table_commands(self) -> Iterator[Command]:
        for table, changes in self._changes.items():
            name = self._keys.tables[table]
            puts = [part for key, value in changes.items() if value is not None for part in (key, value)]
            gone = [key for key, value in changes.items() if value is None]
            if puts:
                yield ("HSET", name, *puts)
                self.bytes_written += sum(map(len, puts))
            if gone:
                yield ("HDEL", name, *gone)


class ServerOverlay(Overlay):
    """The rows and links of one change. `write` gives them to the transaction, and `changed` then names the rows."""

    def __init__(self, transaction: Transaction, keys: Keys) -> None:
        self._transaction = transaction
        self._keys = keys
        self.rows = {}
        self._stored = {}
        self._links = {}
        self.changed: list[bytes] = []

    def fetch(self, keys: Iterable[bytes]) -> None:
        """Look up rows together, and those of their children: a row that goes leaves a link to its child."""
        self.rows = dict.fromkeys(keys)
        if not self.rows:
            return
        self._stored = self._transaction.rows(list(self.rows))
        self.rows.update(self._stored)
        children = {LENGTH[row[0]] + row[1 : 1 + row[0]] + ROW for row in self._stored.values() if row[0]}
        missing = list(children - self.rows.keys())
        if missing:
            found = self._transaction.rows(missing)
            self.rows.update(dict.fromkeys(missing))
            self.rows.update(found)
            self._stored.update(found)

    def row(self, key: bytes) -> bytes | None:
        """One row, fetched if it was not yet."""
        if key not in self.rows:
            found = self._transaction.rows((key,))
            self._stored.update(found)
            self.rows[key] = found.get(key)
        return self.rows[key]

    def before(self, key: bytes) -> bytes | None:
        """A row as the server has it."""
        return self._stored.get(key)

    def write(self) -> int:
        """Give the transaction what has changed. Returns the bytes of the keys and values."""
        rows, stored, keys = self.rows, self._stored, self._keys
        commands = self._transaction.commands
        puts = [key for key, row in rows.items() if row is not None and row is not stored.get(key)]
        gone = [key for key in stored if rows[key] is None]
        self.changed = puts + gone
        for name, group in zip(keys.buckets, by_bucket(puts)):
            if group:
                parts: list[Any] = ["HSET", name] + [None] * (2 * len(group))
                parts[2::2] = group
                parts[3::2] = map(rows.__getitem__, group)
                commands.append(tuple(parts))
        for name, group in zip(keys.buckets, by_bucket(gone) if gone else ()):
            if group:
                commands.append(("HDEL", name, *group))
        wanted = [link for link, there in self._links.items() if there]
        unwanted = [link for link, there in self._links.items() if not there]
        for start in range(0, len(wanted), _LINKS_TOGETHER):
            scored = [part for link in wanted[start : start + _LINKS_TOGETHER] for part in (0, link)]
            commands.append(("ZADD", keys.links, *scored))
        for start in range(0, len(unwanted), _LINKS_TOGETHER):
            commands.append(("ZREM", keys.links, *unwanted[start : start + _LINKS_TOGETHER]))
        written = sum(map(len, puts)) + sum(map(len, wanted))
        return written + sum(len(row) for row in map(rows.__getitem__, puts) if row is not None)
