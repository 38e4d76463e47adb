"""ZMQ endpoints as an operator writes them, and the ports of data-parallel ranks."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import NamedTuple

_TCP = re.compile(r"tcp://(?P<host>\[[^\[\]]+\]|[^\s:/;\[\]]+):(?P<port>[0-9]{1,5})")
_IPC = re.compile(r"ipc://(?P<path>\S+)")
_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\s:/\[\]]*):(?P<port>[0-9]{1,5})")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._:/@-]")

HIGHEST_PORT = 65535
_WILDCARD_HOSTS = frozenset({"*", "[::]"})
ANY_IPV4 = "0.0.0.0"  # noqa: S104  (compared with, never bound by itself)


class Endpoint(NamedTuple):
    """`tcp://HOST:PORT` (`path` is empty) or `ipc://PATH` (`host` is empty, `port` is 0)."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Raises ValueError with a sentence for the operator."""
        if tcp := _TCP.fullmatch(text):
            return cls(tcp["host"], _port(tcp["port"]), "")
        if ipc := _IPC.fullmatch(text):
            return cls("", 0, ipc["path"])
        raise ValueError(f"{text!r} is not tcp://HOST:PORT and not ipc://PATH")

    @property
    def is_wildcard(self) -> bool:
        """Whether it names every address of this machine: something to bind, not to connect to."""
        return self.host in _WILDCARD_HOSTS

    def of_rank(self, rank: int) -> Endpoint:
        """Where the engine puts data-parallel rank `rank`: port + rank, as vLLM's `offset_endpoint_port`."""
        return self._replace(port=self.port + rank) if rank else self

    def __str__(self) -> str:
        return f"ipc://{self.path}" if self.path else f"tcp://{self.host}:{self.port}"

    def default_name(self) -> str:
        """A worker name from the address: `host:port`, or the path of the socket."""
        if self.path:
            name = self.path.lstrip("/")
        else:
            host = "bind" if self.is_wildcard or self.host == ANY_IPV4 else self.host.strip("[]")
            name = f"{host}:{self.port}"
        return _NOT_IN_A_NAME.sub("-", name)


def ports_overlap(one: Endpoint, other: Endpoint, ranks: int) -> bool:
    """Whether `ranks` successive ports of two endpoints of one engine meet, or the endpoints are the same."""
    if one.path or other.path:
        return one == other
    return one.host.lower() == other.host.lower() and abs(one.port - other.port) < max(ranks, 1)


def listen_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` as (host, port). Raises ValueError with a sentence for the operator."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or not match["host"]:
        raise ValueError(f"{text!r} is not HOST:PORT")
    host = match["host"].strip("[]")
    try:
        host.encode("idna")  # as the resolver does
    except UnicodeError as error:
        raise ValueError(f"{host!r} is no name of a host") from error
    return host, _port(match["port"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _port(digits: str) -> int:
    port = int(digits)
    if port > HIGHEST_PORT:
        raise ValueError(f"port {port} is above {HIGHEST_PORT}")
    return port
