"""Connections to the server that has an index: any of the configured ones, or the node of a cluster that they name.

Nothing is repeated here but a question on a connection that had been idle: whether a change may be sent again is for
whoever sent it to say.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from valkey import exceptions
from valkey.connection import Connection, SSLConnection
from valkey.credentials import CredentialProvider

from ..errors import BackendCorrupt, BackendError, BackendFull, BackendUnavailable
from .layout import Command

_MOVES = 2
"""How often a question is asked again, beside once for each server: a cluster says where, an idle connection went."""
_IDLE_CONNECTIONS = 16

_NOT_NOW = ("ASK ", "BUSY ", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN")
"""What a server answers that will take the same commands later, or of which another one does now."""


class ValkeyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the server and what the index is called there; `daemon.config.valkey` describes each field."""

    servers: tuple[str, ...] = ("127.0.0.1:6379",)
    namespace: str = "kvcensus"
    part: str = "main"
    database: int = 0
    user: str = ""
    password_file: str = ""
    tls: bool = False
    tls_ca_file: str = ""
    tls_certificate_file: str = ""
    tls_key_file: str = ""
    timeout_ms: int = 5000
    lease_ms: int = 10_000


class Disconnected(BackendUnavailable):
    """The connection was lost or never made: whether what was sent took effect is not known."""


class Moved(BackendUnavailable):
    """Another node of the cluster has the index; it is the one that is asked from now on."""


class _FilePassword(CredentialProvider):
    """The password as the file has it now, so that a changed one is used from the next connection on."""

    def __init__(self, user: str, path: str) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = Path(self._path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise exceptions.AuthenticationError(f"password_file {self._path}: {error}") from error
        return (self._user, password) if self._user else (password,)


class Server:
    """Where the keys of one index are. Any thread may ask."""

    def __init__(self, options: ValkeyOptions) -> None:
        self._options = options
        self._known = [_address(server) for server in options.servers]
        self._turn = 0
        self._home: tuple[str, int] | None = None
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The server that is asked, for messages."""
        host, port = self._home or self._known[self._turn % len(self._known)]
        return f"{host}:{port}"

    def connect(self) -> Connection:
        """A new connection, to the server that is known to have the index or to the next one configured."""
        with self._lock:
            host, port = self._home or self._known[self._turn % len(self._known)]
        options = self._options
        timeout_s = options.timeout_ms / 1000
        settings: dict[str, Any] = {
            "host": host,
            "port": port,
            "db": options.database,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "socket_keepalive": True,
            "lib_name": None,
            "lib_version": None,
        }
        if options.password_file:
            settings["credential_provider"] = _FilePassword(options.user, options.password_file)
        if options.tls or options.tls_ca_file or options.tls_certificate_file:
            connection: Connection = SSLConnection(
                **settings,
                ssl_ca_certs=options.tls_ca_file or None,
                ssl_certfile=options.tls_certificate_file or None,
                ssl_keyfile=options.tls_key_file or None,
                ssl_check_hostname=True,
            )
        else:
            connection = Connection(**settings)
        try:
            connection.connect()
        except (exceptions.ValkeyError, OSError) as error:
            self._leave()
            raise Disconnected(f"valkey {host}:{port}: {error}") from error
        about = self.exchange(connection, [("INFO", "replication", "cluster")])[0]
        if b"role:slave" in about and b"cluster_enabled:0" in about:
            connection.disconnect()
            self._leave()
            raise Disconnected(f"valkey {host}:{port} is a replica, which may be behind")
        return connection

    def exchange(self, connection: Connection, commands: Sequence[Command]) -> list[Any]:
        """Send commands together and read every reply. Raises for the first error among them, as a BackendError."""
        try:
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            replies, refusal = _read(connection, len(commands))
        except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.InvalidResponse, OSError) as error:
            connection.disconnect()
            self._leave()
            raise Disconnected(f"valkey {connection.host}:{connection.port}: {error}") from error
        except BaseException:
            connection.disconnect()
            raise
        if refusal is not None:
            connection.disconnect()
            raise self._named(refusal, connection) from refusal
        return replies

    def ask_at_once(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to one transaction of questions, all of the same moment."""
        replies: list[Any] = self.ask([("MULTI",), *commands, ("EXEC",)])[-1]
        refusal = next((reply for reply in replies if isinstance(reply, exceptions.ResponseError)), None)
        if refusal is not None:
            raise BackendError(f"valkey {self.address}: {refusal}") from refusal
        return replies

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to questions, asked together on a connection of their own."""
        refused: Disconnected | None = None
        for _ in range(_MOVES + len(self._known)):
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            try:
                connection = connection or self.connect()
                replies = self.exchange(connection, commands)
            except Moved:
                continue
            except Disconnected as error:
                refused = error
                continue
            with self._lock:
                keep = len(self._idle) < _IDLE_CONNECTIONS
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.disconnect()
            return replies
        raise refused or BackendUnavailable(f"valkey {self.address}: no node of the cluster owns the index for long")

    def close(self) -> None:
        """Give up idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _leave(self) -> None:
        """Try the next configured server the next time."""
        with self._lock:
            self._home = None
            self._turn += 1
        self.close()

    def _named(self, error: exceptions.ResponseError, connection: Connection) -> BackendError:
        text = f"valkey {connection.host}:{connection.port}: {error}"
        said = str(error)
        if said.startswith("MOVED "):
            host, _, port = said.split()[2].rpartition(":")
            self.close()
            with self._lock:
                self._home = (host or connection.host, int(port))
            return Moved(text)
        if isinstance(error, exceptions.ReadOnlyError) or said.startswith(_NOT_NOW):
            self._leave()
            return BackendUnavailable(text)
        if isinstance(error, exceptions.OutOfMemoryError) or said.startswith("MISCONF"):
            return BackendFull(text)
        if said.startswith("WRONGTYPE"):
            return BackendCorrupt(f"{text}: somebody else has written keys of the index")
        return BackendError(text)


def _read(connection: Connection, count: int) -> tuple[list[Any], exceptions.ResponseError | None]:
    replies = []
    refusal = None
    for _ in range(count):
        try:
            replies.append(connection.read_response())
        except exceptions.ResponseError as error:
            replies.append(error)
            refusal = refusal or error
    return replies, refusal


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise BackendError(f"valkey: {server!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
