"""A real HTTP server over a real backend, with a stand-in for the rest of the daemon."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import ROOT, CacheTier, GroupSpec, IdentityScope, StoreRun
from kvcensus.daemon import metrics
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.counters import (
    AppliedCounters,
    BusCounters,
    HttpCounters,
    IntakeCounters,
    QuarantineCounters,
    ShadowCounters,
    WriterCounters,
)
from kvcensus.daemon.http.server import HttpServer
from kvcensus.daemon.status import BusStatus, Readiness, StreamState, StreamStatus, Trust

SCOPE = IdentityScope("m", "m")


def status(worker_id: str, **changes: Any) -> StreamStatus:
    """A live and fresh stream, unless changed."""
    live = StreamStatus(
        stream=worker_id,
        source=worker_id.partition("/")[0],
        endpoint="tcp://engine:5557",
        worker_id=worker_id,
        rank=None,
        epoch=1,
        last_seq=41,
        state=StreamState.LIVE,
        trust=Trust.FRESH,
        reason="",
        since_ms=1000,
        engine_ms=1_700_000_000_000,
        committed_ms=1_700_000_000_100,
        messages=42,
        blocks_stored=7,
        blocks_removed=3,
        silent=False,
    )
    return msgspec.structs.replace(live, **changes)


@dataclass
class Counters:
    source: str
    stream: str
    intake: IntakeCounters = field(default_factory=IntakeCounters)
    applied: AppliedCounters = field(default_factory=AppliedCounters)


@dataclass
class Bus:
    shown: BusStatus
    counters: BusCounters = field(default_factory=BusCounters)

    def status(self) -> BusStatus:
        return self.shown


def bus_status(name: str = "fleet", **changes: Any) -> BusStatus:
    """A bus that is followed, unless changed."""
    live = BusStatus(
        bus=name,
        type="vllm",
        servers=("nats://nats:4222",),
        jetstream="KV",
        state=StreamState.LIVE,
        problem="",
        position=99,
        pending=2,
        workers=16,
        refused=0,
    )
    return msgspec.structs.replace(live, **changes)


class View:
    """What the server sees of a daemon; a test sets it as it likes."""

    def __init__(self, backend: IndexBackend, statuses: Sequence[StreamStatus] = ()) -> None:
        self.backend = backend
        self.registry = CollectorRegistry()
        self.writer_counters = WriterCounters()
        self.quarantine_counters = QuarantineCounters()
        self.shadow_counters: ShadowCounters | None = ShadowCounters("lmdb")
        self.http_counters = HttpCounters()
        self.shown = list(statuses)
        self.counters = [Counters(one.source, one.stream) for one in statuses]
        self.followed_buses = [Bus(bus_status())]
        self.ready = Readiness(True, [])
        self.running = True
        metrics.install(self.registry, self)

    def statuses(self) -> list[StreamStatus]:
        return list(self.shown)

    def standings(self) -> dict[str, Callable[[], StreamStatus]]:
        return {one.worker_id: partial(msgspec.structs.replace, one) for one in self.shown}

    def stream_counters(self) -> list[Counters]:
        return self.counters

    def buses(self) -> list[Bus]:
        return self.followed_buses

    def queue_depth(self) -> tuple[int, int]:
        return 3, 4096

    def queue_limits(self) -> tuple[int, int]:
        return 10, 8192

    def readiness(self) -> Readiness:
        return self.ready

    def alive(self) -> bool:
        return self.running


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.raw)

    @property
    def error(self) -> tuple[int, str, str | None]:
        """The status, the code and the field of an error, which has no other keys."""
        error = self.json["error"]
        assert self.json.keys() == {"error"}
        assert error.keys() == {"code", "field", "message"}
        assert error["message"]
        assert "Traceback" not in error["message"]
        return self.status, error["code"], error["field"]


@dataclass(frozen=True)
class Client:
    """Asks a running server, one connection a question."""

    host: str
    port: int

    def get(self, target: str, **headers: str) -> Answer:
        return self.ask("GET", target, None, headers)

    def post(self, target: str, body: Any, **headers: str) -> Answer:
        """`body` as JSON, or as it is when it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", target, raw, {"Content-Type": "application/json", **headers})

    def ask(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            raw = response.read()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, raw)
        finally:
            connection.close()

    def socket(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=10)


@contextmanager
def serving(view: View, config: HttpConfig | None = None) -> Iterator[Client]:
    """A server in a thread of its own, on a free port, stopped at the end."""
    loop = asyncio.new_event_loop()
    server = HttpServer(view, config or HttpConfig())

    async def start() -> tuple[str, int]:
        return await server.start("127.0.0.1", 0)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Client(*asyncio.run_coroutine_threadsafe(start(), loop).result(10))
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def block(number: int) -> bytes:
    return number.to_bytes(8, "big")


def name(number: int) -> str:
    """The hash of a block as it is written."""
    return block(number).hex()


def chain(
    first: int,
    count: int,
    worker: str = "w",
    *,
    rank: int | None = None,
    tier: CacheTier = CacheTier.HBM,
    scope: IdentityScope = SCOPE,
    parent: bytes | None = ROOT,
    group: int = 0,
    spec: GroupSpec | None = None,
) -> StoreRun:
    """Store `count` blocks numbered from `first`, each the parent of the next."""
    hashes = tuple(block(first + at) for at in range(count))
    return StoreRun(worker, rank, scope, tier, hashes, parent, group, 16, at_ms=1000, bytes_per_block=100, spec=spec)


def many_chains(count: int, worker: str = "w") -> list[StoreRun]:
    """Store `count` blocks in chains of 100."""
    return [chain(first, 100, worker) for first in range(0, count, 100)]


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A record of a `chain` from 0 on the worker `w`, as it is answered."""
    return {
        "model_id": "m",
        "tokenizer_id": "m",
        "adapter_id": None,
        "tenant_id": "",
        "prefix_hash": name(number - 1) if number else "root",
        "block_hash": name(number),
        "block_index": number,
        "token_count": 16,
        "worker_id": "w",
        "tier": "hbm",
        "bytes": 100,
        "last_access_ms": 1000,
        "ref_count": 1,
        "pinned": False,
        "rank": None,
        "group": 0,
        **changes,
    }
