"""The right to write an index on a server: who has it, and for how long nobody else may take it.

On a machine the directory's lock decides, and a process that finds it free goes on at once. Between machines a lease
decides, which the writer renews. Neither is what keeps the index whole: each opening writes a new session into `meta`,
and a commit of an older session is not carried out.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from valkey.connection import Connection

from ..errors import BackendBusy, BackendError, BackendFormat
from .layout import SCHEMA, Command, Keys
from .server import Server
from .transaction import Overtaken, Position

_IDENTITY_FILE = "valkey-owner"
_RENEWALS = 3
"""A lease is renewed when a third of it has passed."""


class Lease:
    """What the writer says of itself on the server."""

    def __init__(self, directory: Path, keys: Keys, lease_ms: int) -> None:
        """Raises BackendError when the directory cannot be written."""
        self._key = keys.lease
        self._lease_ms = lease_ms
        self._renewed_s = 0.0
        self.identity = _identity(directory)

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew it."""
        return time.monotonic() - self._renewed_s > self._lease_ms / 1000 / _RENEWALS

    def renewal(self) -> Command:
        """The command that renews it, within a commit or an opening."""
        return ("SET", self._key, self.identity, "PX", self._lease_ms)

    def renewed(self) -> None:
        """Note that the command was carried out."""
        self._renewed_s = time.monotonic()


def _identity(directory: Path) -> bytes:
    """What whoever opens this directory is called, the same after a restart."""
    path = directory / _IDENTITY_FILE
    try:
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        return path.read_bytes()
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from error


def begin(server: Server, connection: Connection, keys: Keys, lease: Lease) -> Position:
    """Take an index over, or make a new one. Raises BackendBusy, BackendFormat, or Overtaken: try again.

    Nobody who opened it before can commit from now on.
    """
    fields = (b"schema", b"instance", b"commit")
    _, [schema, instance, commit], owner = server.exchange(
        connection, [("WATCH", keys.meta, keys.lease), ("HMGET", keys.meta, *fields), ("GET", keys.lease)]
    )
    if schema not in (None, SCHEMA):
        raise BackendFormat(
            f"valkey {server.address}: the index has schema {schema!r}, this version knows {SCHEMA!r}; "
            "it was left as it is"
        )
    if owner not in (None, lease.identity):
        raise BackendBusy(f"valkey {server.address}: the index is written by another process, from another directory")
    session = secrets.token_bytes(8)
    instance = instance or secrets.token_bytes(8)
    commit = commit or b"0"
    fresh = (b"schema", SCHEMA, b"instance", instance, b"commit", commit, b"attempt", b"0", b"session", session)
    done = server.exchange(connection, [("MULTI",), ("HSET", keys.meta, *fresh), lease.renewal(), ("EXEC",)])[-1]
    if done is None:
        raise Overtaken
    lease.renewed()
    return Position(instance, session, int(commit))
