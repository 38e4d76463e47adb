"""A question that takes its time leaves the event loop to others: the probes still answer."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheResidency, IdentityScope, WorkerMatch
from kvcensus.daemon.config import HttpConfig
from tests.valkey_servers import needs_server, running_server

from .served import Client, View, chain, name, serving, status

LONG_MATCH = {"block_hashes": [name(number) for number in range(1025)]}
CHILDREN = {"scope": {"model_id": "m"}, "prefix_hash": "root"}


def asking(client: Client, target: str, body: dict[str, Any] | None = None) -> socket.socket:
    """A connection on which a question was sent, and whose answer has not been read."""
    connection = client.socket()
    connection.settimeout(60)
    raw = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def answered(connection: socket.socket) -> bytes:
    """The status line of the answer."""
    with connection, connection.makefile("rb") as stream:
        return stream.readline().rstrip()


class Gated(MemoryBackend):
    """Answers what may take long once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.gate = threading.Event()

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        self._pass()
        return super().match(scope, block_hashes)

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        self._pass()
        return super().prefix_scan(scope, prefix_hash)

    def _pass(self) -> None:
        self.entered.set()
        assert self.gate.wait(60)


@pytest.mark.parametrize(("target", "body"), [("/v1/match", LONG_MATCH), ("/v1/children", CHILDREN)])
def test_a_long_question_leaves_the_probes_alone(target: str, body: dict[str, Any]) -> None:
    backend = Gated()
    with serving(View(backend), HttpConfig(max_hashes_per_query=3000)) as client:
        try:
            question = asking(client, target, body)
            assert backend.entered.wait(60)
            assert client.get("/livez").status == 200
        finally:
            backend.gate.set()
        assert answered(question) == b"HTTP/1.1 200 OK"


@needs_server
def test_a_backend_whose_server_hangs_leaves_the_probes_alone(tmp_path: Path) -> None:
    pytest.importorskip("valkey")
    from kvcensus.backends.valkey import ValkeyBackend
    from kvcensus.backends.valkey.server import ValkeyOptions

    questions: list[tuple[str, dict[str, Any] | None]] = [
        ("/v1/match", {"block_hashes": [name(0), name(1)]}),
        ("/v1/locate", {"block_hash": name(0)}),
        (f"/v1/locate?block_hash={name(0)}", None),
        ("/v1/children", CHILDREN),
        ("/v1/workers", None),
        ("/v1/daemon", None),
        ("/metrics", None),
    ]
    with running_server(tmp_path / "server") as server:
        backend = ValkeyBackend(tmp_path / "data", ValkeyOptions(servers=(server.address,), timeout_ms=60_000))
        backend.apply([chain(0, 2)])
        with serving(View(backend, [status("w")])) as client:
            server.pause()
            try:
                connections = [asking(client, *question) for question in questions]
                assert client.get("/livez").status == 200
                assert client.get("/v1/streams").status == 200
                assert select.select(connections, [], [], 0)[0] == []
            finally:
                server.resume()
            assert [answered(one) for one in connections] == [b"HTTP/1.1 200 OK"] * len(questions)
        backend.close()
