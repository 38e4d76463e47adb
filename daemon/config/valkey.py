"""What there is to set of the valkey backend: where the server is, who we are to it, and what the index is called."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from ..credentials import CredentialError, open_to_others
from ..nats_credentials import client_tls, read_secret_line
from .errors import InvalidValue
from .section import NotNegative, Positive, Section

_SERVER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_HIGHEST_PORT = 65535
_MAX_SERVERS = 64
_LOCAL = re.compile(r"(127\.[0-9.]+|localhost|\[::1\]):")

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,100}$")]


class ValkeyConfig(Section, frozen=True):
    """An index on a Valkey or Redis server, or in a cluster of them."""

    servers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=_MAX_SERVERS)] = ("127.0.0.1:6379",)
    """`HOST:PORT`: a server and those that may take its place, or any nodes of a cluster. Never a user or a secret."""
    namespace: Name = "kvcensus"
    """What the index is called on the server, so that one server can have several."""
    part: Name = "main"
    """Which part of the index this daemon writes and answers for. Daemons that share an index have a part each."""
    database: NotNegative = 0
    """The number of the database. A cluster has 0 alone."""
    user: str = ""
    """A user of the server's ACL. Without one, `password_file` is for the default user."""
    password_file: str = ""
    """File with the password, one line. Read anew for each connection, so it can be changed while the daemon runs."""
    tls: bool = False
    """Speak TLS, with the system's authorities. The keys below imply it."""
    tls_ca_file: str = ""
    """PEM file of the authorities that may have signed the server's certificate. Default: those of the system."""
    tls_certificate_file: str = ""
    """PEM file of our own certificate and its chain, for servers that ask for one."""
    tls_key_file: str = ""
    """PEM file of its key, without a passphrase."""
    timeout_ms: Positive = 5000
    """How long a connection or an answer may take. A commit takes some 20 ms, and nothing is lost by waiting."""
    lease_ms: Annotated[int, msgspec.Meta(ge=1000, le=3_600_000)] = 10_000
    """For how long a daemon that has vanished keeps its part from one on another machine. One in its place goes on."""

    def __post_init__(self) -> None:
        for number, server in enumerate(self.servers):
            _check_server(f"servers[{number}]", server)
        if self.user and not self.password_file:
            raise InvalidValue("password_file", "is needed with user")
        if self.tls_certificate_file and not self.tls_key_file:
            raise InvalidValue("tls_key_file", "is needed with tls_certificate_file")
        if self.tls_key_file and not self.tls_certificate_file:
            raise InvalidValue("tls_certificate_file", "is needed with tls_key_file")
        try:
            if self.password_file:
                read_secret_line(self.password_file)
            if self.tls_ca_file or self.tls_certificate_file:
                client_tls(self.tls_ca_file, self.tls_certificate_file, self.tls_key_file)
        except CredentialError as error:
            keys = ("password_file", "tls_ca_file", "tls_key_file", "tls_certificate_file")
            key = next((key for key in keys if getattr(self, key) == error.path), "tls_certificate_file")
            raise InvalidValue(key, str(error)) from error

    @property
    def has_tls(self) -> bool:
        """Whether nothing is sent without TLS."""
        return bool(self.tls or self.tls_ca_file or self.tls_certificate_file)

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = [
            f"{key}: {path} can be read by others than its owner: chmod 600"
            for key in ("password_file", "tls_key_file")
            if (path := getattr(self, key)) and open_to_others(path)
        ]
        if self.password_file and not self.has_tls and not all(map(_LOCAL.match, self.servers)):
            found.append("servers: the password crosses the network in the clear: use tls if they have it")
        return found


def _check_server(key: str, server: str) -> None:
    found = _SERVER.fullmatch(server)
    if found and int(found["port"]) <= _HIGHEST_PORT:
        return
    if "@" in server:
        raise InvalidValue(key, "has a user or a password in it: secrets stand in files, see user and password_file")
    raise InvalidValue(key, f"{server!r} is not HOST:PORT")
