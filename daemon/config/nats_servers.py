"""How to reach NATS: servers, who we are to them, TLS, and how long to wait. Secrets stand in files of their own."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from ..credentials import CredentialError, open_to_others
from ..nats_credentials import client_tls, read_nkey_seed, read_secret_line, read_user_credentials
from .errors import InvalidValue
from .section import Positive, Section

_URL = re.compile(r"(?P<scheme>nats|tls)://(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?")
_LOCAL = re.compile(r"nats://(127\.[0-9.]+|localhost|\[::1\])(:|/|$)")
_DOMAIN = re.compile(r"[^\s.*>]{1,255}")
_OTHER_SCHEME = re.compile(r"wss?://.*")
_HIGHEST_PORT = 65535
_MAX_SERVERS = 64
_SECRETS = ("credentials_file", "nkey_file", "password_file", "token_file")

DEFAULT_SERVER = "nats://127.0.0.1:4222"


class NatsServers(Section, frozen=True):
    """The servers of one NATS system."""

    servers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=_MAX_SERVERS)] = (DEFAULT_SERVER,)
    """`nats://HOST:PORT` or `tls://HOST:PORT`, any of a cluster; it names the others. Never a user or a secret."""
    credentials_file: str = ""
    """File with a user's JWT and seed, as `nsc generate creds` writes it. Read anew for each connection."""
    nkey_file: str = ""
    """File with the seed of a user's nkey. Read anew for each connection."""
    user: str = ""
    """A user of the server's configuration; its password is in `password_file`."""
    password_file: str = ""
    """File with the password of `user`, one line. Read anew for each connection."""
    token_file: str = ""
    """File with a token, one line. Read anew for each connection."""
    tls_ca_file: str = ""
    """PEM file of the authorities that may have signed the server's certificate. Default: those of the system."""
    tls_certificate_file: str = ""
    """PEM file of our own certificate and its chain, for servers that ask for one."""
    tls_key_file: str = ""
    """PEM file of its key, without a passphrase."""
    jetstream_domain: str = ""
    """The JetStream domain that has the stream, where it is not that of `servers`: a hub's, seen from its leaf."""
    tls_first: bool = False
    """Begin with the TLS handshake, before the server says anything: for servers with `handshake_first`."""
    reconnect_min_ms: Positive = 100
    """First wait before connecting again: a restarted server is back in as long."""
    reconnect_max_ms: Positive = 5000
    """Longest wait between attempts, which double: what it takes at most to notice that a server is back."""
    connect_timeout_ms: Positive = 5000
    """How long a server may take to let us in, and to answer a request. A far one takes a second."""
    ping_interval_ms: Positive = 10000
    """How often a silent server is pinged; after two without an answer it is lost. A dead link is silent, too."""

    def __post_init__(self) -> None:
        for number, server in enumerate(self.servers):
            _check_server(f"servers[{number}]", server)
        if self.jetstream_domain and not _DOMAIN.fullmatch(self.jetstream_domain):
            raise InvalidValue("jetstream_domain", f"{self.jetstream_domain!r} is no domain: no spaces, none of . * >")
        if self.reconnect_max_ms < self.reconnect_min_ms:
            raise InvalidValue("reconnect_max_ms", f"less than reconnect_min_ms ({self.reconnect_min_ms})")
        given = [key for key in _SECRETS if getattr(self, key)]
        if len(given) > 1:
            raise InvalidValue(given[1], f"{given[0]} is set too, and a client has one kind of credentials")
        if self.user and not self.password_file:
            raise InvalidValue("password_file", "is needed with user")
        if self.password_file and not self.user:
            raise InvalidValue("user", "is needed with password_file")
        if self.tls_certificate_file and not self.tls_key_file:
            raise InvalidValue("tls_key_file", "is needed with tls_certificate_file")
        if self.tls_key_file and not self.tls_certificate_file:
            raise InvalidValue("tls_certificate_file", "is needed with tls_key_file")
        self._check_files()

    def _check_files(self) -> None:
        try:
            if self.credentials_file:
                read_user_credentials(self.credentials_file)
            if self.nkey_file:
                read_nkey_seed(self.nkey_file)
            for path in filter(None, (self.password_file, self.token_file)):
                read_secret_line(path)
            if self.tls_ca_file or self.tls_certificate_file:
                client_tls(self.tls_ca_file, self.tls_certificate_file, self.tls_key_file)
        except CredentialError as error:
            keys = (*_SECRETS, "tls_ca_file", "tls_key_file", "tls_certificate_file")
            key = next((key for key in keys if getattr(self, key) == error.path), "tls_certificate_file")
            raise InvalidValue(key, str(error)) from error

    @property
    def needs_tls(self) -> bool:
        """Whether nothing may be sent without TLS."""
        return bool(
            self.tls_first
            or self.tls_ca_file
            or self.tls_certificate_file
            or any(server.startswith("tls://") for server in self.servers)
        )

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = [
            f"{key}: {path} can be read by others than its owner: chmod 600"
            for key in (*_SECRETS, "tls_key_file")
            if (path := getattr(self, key)) and open_to_others(path)
        ]
        is_readable = self.password_file or self.token_file
        if is_readable and not self.needs_tls and not all(map(_LOCAL.match, self.servers)):
            found.append("servers: the password or token crosses the network in the clear: use tls:// if they have TLS")
        return found


def _check_server(key: str, server: str) -> None:
    found = _URL.fullmatch(server)
    if found and int(found["port"] or 0) <= _HIGHEST_PORT:
        return
    if "@" in server:
        raise InvalidValue(
            key,
            "has a user, a password or a token in it: secrets stand in files, see user, password_file and token_file",
        )
    if _OTHER_SCHEME.fullmatch(server):
        raise InvalidValue(key, f"{server!r} is a WebSocket, which is not supported: give nats:// or tls://")
    raise InvalidValue(key, f"{server!r} is not nats://HOST:PORT and not tls://HOST:PORT")
