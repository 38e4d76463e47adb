"""Probes, streams, workers, the index page and metrics over real HTTP; and the life of the server itself."""

import asyncio
import base64
import hashlib
import re
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheTier, GroupKind, GroupSpec
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.http.server import HttpServer
from kvcensus.daemon.status import Readiness, StreamState, Trust

from .served import Client, View, chain, serving, status


@pytest.fixture
def view() -> View:
    backend = MemoryBackend()
    window = GroupSpec(GroupKind.WINDOW, 512, 16)
    backend.apply(
        [
            chain(0, 3, "a/0", rank=0),
            chain(0, 2, "a/0", rank=0, tier=CacheTier.CPU_DRAM),
            chain(0, 1, "a/0", rank=0, group=1, spec=window),
            chain(0, 5, "ghost"),
        ]
    )
    idle = status(
        "idle",
        last_seq=-1,
        state=StreamState.CONNECTING,
        trust=Trust.STALE,
        reason="no connection to the engine",
        committed_ms=0,
        engine_ms=0,
    )
    return View(backend, [status("a/0", rank=0), idle])


@pytest.fixture
def client(view: View) -> Iterator[Client]:
    with serving(view) as client:
        yield client


def test_livez_follows_the_threads(client: Client, view: View) -> None:
    assert (client.get("/livez").status, client.get("/livez").json) == (200, {"alive": True})
    view.running = False
    assert (client.get("/livez").status, client.get("/livez").json) == (503, {"alive": False})


def test_readyz_lists_the_problems(client: Client, view: View) -> None:
    assert (client.get("/readyz").status, client.get("/readyz").json) == (200, {"ready": True, "problems": []})
    view.ready = Readiness(False, ["nothing can be written: full"])
    answer = client.get("/readyz")
    assert (answer.status, answer.json) == (503, {"ready": False, "problems": ["nothing can be written: full"]})


def test_streams_tell_all_of_their_status_with_age_and_lag(client: Client, view: View) -> None:
    view.counters[0].intake.gaps, view.counters[0].intake.unrecovered = 2, 1
    before_ms = time.time() * 1000
    followed, idle = client.get("/v1/streams").json["streams"]

    age_ms, lag_s = followed.pop("age_ms"), followed.pop("lag_s")
    assert followed == {
        "stream": "a/0",
        "source": "a",
        "endpoint": "tcp://engine:5557",
        "worker_id": "a/0",
        "rank": 0,
        "epoch": 1,
        "last_seq": 41,
        "state": "live",
        "trust": "fresh",
        "reason": "",
        "since_ms": 1000,
        "engine_ms": 1_700_000_000_000,
        "committed_ms": 1_700_000_000_100,
        "messages": 42,
        "blocks_stored": 7,
        "blocks_removed": 3,
        "silent": False,
        "gaps": 2,
        "unrecovered_messages": 1,
    }
    assert age_ms == pytest.approx(before_ms - 1_700_000_000_100, abs=5000)
    assert lag_s == pytest.approx(age_ms / 1000 + 0.1, abs=0.01)
    assert (idle["last_seq"], idle["state"], idle["age_ms"], idle["lag_s"]) == (-1, "connecting", None, None)


def test_workers_have_their_holdings_and_every_stream_has_a_worker(client: Client) -> None:
    holder, ghost, idle = client.get("/v1/workers").json["workers"]

    assert holder.pop("age_ms") > 0
    full = {"kind": "full", "window": 0, "block_size": 0}
    assert sorted(holder.pop("holdings"), key=lambda one: (one["group"], one["tier"])) == [
        {"tier": "cpu_dram", "group": 0, "spec": full, "blocks": 2, "bytes": 200},
        {"tier": "hbm", "group": 0, "spec": full, "blocks": 3, "bytes": 300},
        {
            "tier": "hbm",
            "group": 1,
            "spec": {"kind": "window", "window": 512, "block_size": 16},
            "blocks": 1,
            "bytes": 100,
        },
    ]
    assert holder == {
        "worker_id": "a/0",
        "rank": 0,
        "trust": "fresh",
        "reason": "",
        "since_ms": 1000,
        "last_seq": 41,
        "blocks": 6,
        "bytes": 600,
    }
    assert (ghost["worker_id"], ghost["trust"], ghost["blocks"], ghost["age_ms"]) == ("ghost", "untrusted", 5, None)
    assert ghost["reason"] == "no stream is configured for this worker"
    assert (idle["worker_id"], idle["trust"], idle["blocks"], idle["holdings"]) == ("idle", "stale", 0, [])


def test_the_daemon_tells_of_itself_also_when_it_is_not_ready(client: Client, view: View) -> None:
    view.ready = Readiness(False, ["nothing can be written: full"])
    answer = client.get("/v1/daemon")

    assert answer.status == 200
    told = answer.json
    assert told.pop("uptime_s") >= 0
    assert told == {
        "version": version("kvcensus"),
        "ready": False,
        "problems": ["nothing can be written: full"],
        "backend": "memory",
        "index": {"records": 11, "stored_bytes": 0, "live_bytes": 0, "limit_bytes": 0},
        "queued_messages": 3,
        "queued_bytes": 4096,
    }


def test_the_status_page_is_one_answer_that_runs_nothing_but_its_own_scripts(client: Client) -> None:
    answer = client.get("/")
    page, policy = answer.raw.decode(), answer.headers["content-security-policy"]

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("#", "data:"))] == []
    for tag in ("script", "style"):
        for content in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
            assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


@pytest.mark.parametrize("target", ["/", "/v1/workers", "/v1/snapshot", "/metrics", "/nowhere"])
def test_no_answer_is_cached_or_taken_for_another_type(client: Client, target: str) -> None:
    headers = client.get(target).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_metrics_in_the_text_format(client: Client) -> None:
    answer = client.get("/metrics")

    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert b'\nkvcensus_backend_records{backend="memory"} 11.0\n' in answer.raw
    assert b"\nkvcensus_queue_messages 3.0\n" in answer.raw


@pytest.mark.parametrize("media", ["application/openmetrics-text", "text/plain"])
def test_metrics_in_a_version_that_is_no_number_are_in_the_oldest_format(client: Client, media: str) -> None:
    answer = client.get("/metrics", Accept=f"{media};version=x")

    assert (answer.status, answer.headers["content-type"]) == (200, client.get("/metrics").headers["content-type"])


def test_a_connection_is_kept_for_many_questions(client: Client) -> None:
    with client.socket() as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).endswith(b'{"alive":true}')


def test_a_port_in_use_is_an_error_and_leaves_nothing_behind(client: Client, view: View) -> None:
    async def start() -> None:
        await HttpServer(view, HttpConfig()).start(client.host, client.port)

    with pytest.raises(OSError, match="address already in use"):
        asyncio.run(start())


def test_a_stopped_server_listens_no_more(view: View) -> None:
    with serving(view) as client, client.socket() as idle:
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(4096)
    with pytest.raises(ConnectionError):
        socket.create_connection((client.host, client.port), timeout=5)
