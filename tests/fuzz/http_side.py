"""The HTTP side: mutated requests over real sockets to a real server in this process."""

from __future__ import annotations

import itertools
import re
import select
import socket
from contextlib import ExitStack

import msgspec

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.config import HttpConfig

from ..daemon.served import View, chain, name, serving, status
from .campaign import Hang
from .decoders import Target
from .mutation import HTTP_LIES

_SILENCE_S = 0.004
"""After so long without an answer the request is taken for one that has no end, and its connection is half closed."""
_HANG_S = 20.0
_STATUS_LINE = re.compile(rb"HTTP/[0-9]\.[0-9] [1-5][0-9][0-9] ")
_BROKE = re.compile(rb"HTTP/[0-9]\.[0-9] 500 ")
_LENGTH = re.compile(rb"Content-Length: *[0-9]+")


def http() -> Target:
    """Every request gets an answer that is HTTP and no 500, or a closed connection, in time."""
    backend = MemoryBackend()
    backend.apply([chain(0, 100), chain(0, 50, "v")])
    stack = ExitStack()
    client = stack.enter_context(serving(View(backend, [status("w")]), HttpConfig(max_body_bytes=100_000)))
    sources = itertools.cycle(f"127.0.1.{number}" for number in range(1, 255))

    def run(data: bytes) -> None:
        data = _with_true_length(data)
        with socket.create_connection((client.host, client.port), _HANG_S, (next(sources), 0)) as connection:
            answer = _answer(connection, data)
        assert not answer or _STATUS_LINE.match(answer), answer[:100]
        assert not _BROKE.search(answer), answer[:300]

    return Target(_requests(), HTTP_LIES, run, stack.close)


def _with_true_length(data: bytes) -> bytes:
    """Three in four requests with a body, but for its length, are as the mutations left them: else few are read."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not body or body[-1] % 4 == 0:
        return data
    return _LENGTH.sub(b"Content-Length: %d" % len(body), head, count=1) + end + body


def _answer(connection: socket.socket, data: bytes) -> bytes:
    received = bytearray()
    try:
        connection.sendall(data)
        if select.select([connection], [], [], _SILENCE_S)[0]:
            received += connection.recv(1 << 16)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            received += part
    except TimeoutError:
        raise Hang from None
    except OSError:
        return bytes(received)
    return bytes(received)


def _requests() -> list[bytes]:
    hashes = [name(number) for number in range(6)]
    scope = {"model_id": "m", "tokenizer_id": "m", "adapter_id": None, "tenant_id": ""}
    bodies: list[tuple[str, object]] = [
        ("/v1/match", {"block_hashes": hashes, "scope": scope, "trusted_only": True}),
        ("/v1/match", {"block_hashes": [1, 2**64 - 1, -1], "scope": None}),
        ("/v1/locate", {"block_hash": hashes[0], "scope": scope, "group": 0}),
        ("/v1/children", {"scope": scope, "prefix_hash": "root"}),
    ]
    found = [
        f"GET {target} HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\nConnection: close\r\n\r\n".encode()
        for target in (
            "/", "/v1/workers", "/v1/streams", "/v1/snapshot", "/livez", "/readyz", "/metrics", "/openapi.json",
            f"/v1/locate?block_hash={hashes[0]}&model_id=m&tenant_id=&group=0",
            "/v1/children?model_id=m&prefix_hash=root&adapter_id=%C3%A9",
        )
        for accept in ("*/*", "application/msgpack, application/json;q=0.5")
    ]  # fmt: skip
    for path, body in bodies:
        for kind, raw in (
            ("application/json", msgspec.json.encode(body)),
            ("application/msgpack", msgspec.msgpack.encode(body)),
        ):
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
            found.append(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (raw[:20], raw[20:]))
            found.append(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n")
    pipelined = found[0].replace(b"Connection: close\r\n", b"") + found[-2] + found[4]
    return [*found, pipelined]
