"""Snapshots over real HTTP: every record once, one moment, never half of it taken for the whole."""

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcensus.backends.errors import BackendError
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheResidency, CacheTier, IdentityScope, KvBlockKey, RemoveBlocks
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.http import snapshot

from .served import SCOPE, Client, View, block, chain, many_chains, name, record, serving

MANY = 40_000
"""Records whose snapshot fills every buffer between the daemon and a client that does not read."""


@pytest.fixture(params=["memory", "lmdb"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexBackend]:
    opened: IndexBackend = MemoryBackend() if request.param == "memory" else LmdbBackend(tmp_path / "data")
    yield opened
    opened.close()


def _lines(client: Client) -> list[dict[str, Any]]:
    answer = client.get("/v1/snapshot", Accept="application/x-ndjson")
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.raw.splitlines()]


def _get_snapshot(client: Client) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(client.host, client.port, timeout=10)
    connection.request("GET", "/v1/snapshot")
    return connection


def _eventually_whole(client: Client, records: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        answer = client.get("/v1/snapshot")
        if answer.status == 200:
            assert answer.raw.count(b"\n") == records
            return
        assert answer.error == (429, "too_many_snapshots", None)
        time.sleep(0.02)
    pytest.fail("no snapshot was to be had any more")


def test_every_record_is_a_line_with_all_its_fields(backend: IndexBackend) -> None:
    adapted = IdentityScope("m", "t", "", "acme")
    backend.apply([chain(0, 2), chain(7, 1, "dp/1", rank=1, scope=adapted, parent=None, group=2)])
    backend.put(CacheResidency(KvBlockKey.within(SCOPE, b"\xab" * 32), "p", CacheTier.LOCAL_SSD, pinned=True))

    with serving(View(backend)) as client:
        lines = sorted(_lines(client), key=lambda line: line["block_hash"])

    assert lines == [
        record(0),
        record(1),
        record(
            7,
            tokenizer_id="t",
            adapter_id="",
            tenant_id="acme",
            prefix_hash=None,
            block_index=None,
            worker_id="dp/1",
            rank=1,
            group=2,
        ),
        record(
            0,
            block_hash="ab" * 32,
            prefix_hash=None,
            block_index=None,
            token_count=0,
            worker_id="p",
            tier="local_ssd",
            bytes=0,
            last_access_ms=0,
            pinned=True,
        ),
    ]
    assert list(lines[0]) == list(record(0))


def test_an_empty_index_is_an_empty_answer(backend: IndexBackend) -> None:
    with serving(View(backend)) as client:
        assert _lines(client) == []


def test_a_large_index_comes_in_chunks_each_record_once(backend: IndexBackend) -> None:
    backend.apply(many_chains(MANY))

    with serving(View(backend)) as client:
        answer = client.get("/v1/snapshot")

    assert answer.headers["transfer-encoding"] == "chunked"
    hashes = [json.loads(line)["block_hash"] for line in answer.raw.splitlines()]
    assert len(hashes) == MANY
    assert set(hashes) == {name(number) for number in range(MANY)}


def test_a_snapshot_is_one_moment_while_writes_go_on(backend: IndexBackend) -> None:
    """Each write replaces a generation of 100 blocks by the next: a moment has exactly one, whole."""

    def generation(number: int) -> tuple[bytes, ...]:
        return tuple(block((number << 32) + at) for at in range(100))

    backend.apply([*many_chains(2000, "still"), chain(1 << 32, 100)])
    written = 1
    enough = threading.Event()

    def write() -> None:
        nonlocal written
        while not enough.is_set():
            backend.apply([chain((written + 1) << 32, 100), RemoveBlocks("w", generation(written))])
            written += 1

    writer = threading.Thread(target=write)
    seen = set()
    with serving(View(backend)) as client:
        writer.start()
        try:
            for _ in range(20):
                changing = {line["block_hash"] for line in _lines(client) if line["worker_id"] == "w"}
                (number,) = {int(hash_, 16) >> 32 for hash_ in changing}
                assert changing == {hash_.hex() for hash_ in generation(number)}
                seen.add(number)
        finally:
            enough.set()
            writer.join()
    assert len(seen) > 5


def test_no_more_snapshots_at_a_time_than_configured(backend: IndexBackend) -> None:
    backend.apply(many_chains(MANY))
    with serving(View(backend), HttpConfig(max_snapshots=2)) as client:
        reading = [_get_snapshot(client) for _ in range(2)]
        for connection in reading:
            connection.getresponse()
        assert client.get("/v1/snapshot").error == (429, "too_many_snapshots", None)
        assert client.get("/livez").status == 200
        for connection in reading:
            connection.close()
        _eventually_whole(client, MANY)


def _hang_up(client: Client) -> None:
    """Go away in the middle of a snapshot. The one before may be about to end."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with client.socket() as connection:
            connection.sendall(b"GET /v1/snapshot HTTP/1.1\r\nHost: x\r\n\r\n")
            head = connection.recv(1000)
        if head.startswith(b"HTTP/1.1 200 OK"):
            return
        assert head.startswith(b"HTTP/1.1 429 ")
    raise AssertionError("no snapshot could be begun")


def test_a_client_that_hangs_up_frees_its_thread_and_its_copy(backend: IndexBackend, tmp_path: Path) -> None:
    backend.apply(many_chains(MANY))
    with serving(View(backend), HttpConfig(max_snapshots=1)) as client:
        for _ in range(5):
            _hang_up(client)
            _eventually_whole(client, MANY)
        deadline = time.monotonic() + 5
        while list(tmp_path.glob("data/snapshot-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not list(tmp_path.glob("data/snapshot-*"))


def test_a_stopping_server_cuts_snapshots_off(backend: IndexBackend, tmp_path: Path) -> None:
    backend.apply(many_chains(MANY))
    with serving(View(backend)) as client:
        response = _get_snapshot(client).getresponse()
        began = time.monotonic()
    assert time.monotonic() - began < 1.5

    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    assert not list(tmp_path.glob("data/snapshot-*"))


class _BreakingSnapshot(MemoryBackend):
    """A backend whose snapshot yields some records and then fails."""

    def __init__(self, records: int, error: Exception) -> None:
        super().__init__()
        self._after, self._error = records, error
        self.threads: list[threading.Thread] = []

    def snapshot(self) -> Iterator[CacheResidency]:
        self.threads.append(threading.current_thread())
        try:
            key = KvBlockKey.within(SCOPE, block(1))
            yield from [CacheResidency(key, "w", CacheTier.HBM)] * self._after
            raise self._error
        finally:
            self.threads.append(threading.current_thread())


@pytest.mark.parametrize("error", [BackendError("unreadable page"), ZeroDivisionError("unforeseen")])
def test_a_snapshot_that_breaks_half_way_does_not_look_complete(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(View(_BreakingSnapshot(30_000, error))) as client:
        response = _get_snapshot(client).getresponse()
        assert response.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        assert client.get("/livez").status == 200
    assert "snapshot_broke" in caplog.text


def test_a_snapshot_that_cannot_begin_is_an_error_answer() -> None:
    with serving(View(_BreakingSnapshot(0, BackendError("no room for a copy")))) as client:
        answer = client.get("/v1/snapshot")
    assert answer.error == (503, "backend", None)
    assert answer.json["error"]["message"] == "no room for a copy"


def test_one_thread_creates_reads_and_closes_a_snapshot() -> None:
    backend = _BreakingSnapshot(30_000, BackendError("end"))
    with serving(View(backend)) as client:
        with client.socket() as connection:
            connection.sendall(b"GET /v1/snapshot HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.recv(1000)
        assert client.get("/livez").status == 200
    began, ended = backend.threads
    assert began is ended
    assert began is not threading.main_thread()


class _Waiting(MemoryBackend):
    """A backend whose snapshot waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def snapshot(self) -> Iterator[CacheResidency]:
        assert self.go.wait(10)
        yield from super().snapshot()


def test_the_server_answers_while_a_snapshot_is_being_prepared() -> None:
    backend = _Waiting()
    backend.apply([chain(0, 3)])
    with serving(View(backend)) as client:
        connection = _get_snapshot(client)
        assert client.post("/v1/match", {"block_hashes": [name(0)]}).json["workers"][0]["blocks"] == 1
        backend.go.set()
        assert len(connection.getresponse().read().splitlines()) == 3
        connection.close()


def test_files_that_are_gone_are_no_fault_of_the_daemon(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    with serving(View(backend)) as client:
        assert client.get("/v1/snapshot").error == (503, "backend", None)
        assert client.get("/v1/daemon").error == (503, "backend", None)
        assert client.get("/metrics").status == 200
    backend.close()


def test_a_client_that_reads_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_STALL_S", 3.0)
    backend = MemoryBackend()
    backend.apply(many_chains(MANY))
    with serving(View(backend)) as client, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.settimeout(10)
        slow.connect((client.host, client.port))
        slow.sendall(b"GET /v1/snapshot HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer, began = bytearray(), time.monotonic()
        while (passed := time.monotonic() - began) < 9:
            if len(answer) < 220_000 * passed:
                answer += slow.recv(32768)
            else:
                time.sleep(0.05)
        answer += b"".join(iter(lambda: slow.recv(1 << 20), b""))
    assert answer.count(b'"model_id"') == MANY
