"""What the daemon and its streams are doing: probes, workers, streams."""

from __future__ import annotations

import time
from collections import defaultdict
from http import HTTPStatus
from importlib.metadata import version

import msgspec
from aiohttp import web

from kvcensus.backends.model import Holding

from ..counters import IntakeCounters
from ..followed import now_ms
from ..status import DaemonView, StreamStatus, Trust
from .answers import answer
from .beliefs import NO_STREAM, age_ms
from .bodies import (
    DaemonState,
    HeldGroup,
    IndexState,
    Liveness,
    StreamReport,
    StreamsAnswer,
    WorkersAnswer,
    WorkerState,
)
from .reads import Reads


class State:
    """Handlers that tell of the daemon itself."""

    def __init__(self, view: DaemonView, reads: Reads) -> None:
        self._view = view
        self._reads = reads
        self._began_s = time.monotonic()
        self._version = version("kvcensus")

    async def livez(self, request: web.Request) -> web.Response:
        alive = self._view.alive()
        return answer(request, Liveness(alive), HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)

    async def readyz(self, request: web.Request) -> web.Response:
        readiness = self._view.readiness()
        status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return answer(request, readiness, status)

    async def daemon(self, request: web.Request) -> web.Response:
        readiness = self._view.readiness()
        name, index = self._view.backend.name(), await self._reads.short(self._index)
        uptime_s = time.monotonic() - self._began_s
        queued = self._view.queue_depth()
        body = DaemonState(self._version, uptime_s, readiness.ready, readiness.problems, name, index, *queued)
        return answer(request, body)

    def _index(self) -> IndexState:
        backend = self._view.backend
        health = backend.health()
        return IndexState(len(backend), backend.stored_bytes(), health.live_bytes, health.limit_bytes)

    async def streams(self, request: web.Request) -> web.Response:
        at_ms = now_ms()
        buses = [bus.status() for bus in self._view.buses()]
        counted = {one.stream: one.intake for one in self._view.stream_counters()}
        nothing = IntakeCounters()
        reports = [_report(one, counted.get(one.stream, nothing), at_ms) for one in self._view.statuses()]
        return answer(request, StreamsAnswer(reports, buses))

    async def workers(self, request: web.Request) -> web.Response:
        # Before the index is read: what is counted then has all that was committed up to their numbers.
        statuses = {status.worker_id: status for status in self._view.statuses()}
        at_ms = now_ms()
        held: dict[str, list[Holding]] = defaultdict(list)
        for holding in await self._reads.short(self._view.backend.holdings):
            held[holding.worker_id].append(holding)
        names = sorted(held.keys() | statuses.keys())
        return answer(request, WorkersAnswer([_worker(name, statuses.get(name), held[name], at_ms) for name in names]))


def _report(status: StreamStatus, intake: IntakeCounters, at_ms: int) -> StreamReport:
    lag_s = (at_ms - status.engine_ms) / 1000 if status.engine_ms else None
    return StreamReport(
        **msgspec.structs.asdict(status),
        age_ms=age_ms(status, at_ms),
        lag_s=lag_s,
        gaps=intake.gaps,
        unrecovered_messages=intake.unrecovered,
    )


def _worker(worker_id: str, status: StreamStatus | None, held: list[Holding], at_ms: int) -> WorkerState:
    groups = [HeldGroup(one.tier, one.group, one.spec, one.blocks, one.bytes) for one in held]
    return WorkerState(
        worker_id=worker_id,
        rank=status.rank if status else held[0].rank,
        trust=status.trust if status else Trust.UNTRUSTED,
        reason=status.reason if status else NO_STREAM,
        since_ms=status.since_ms if status else 0,
        last_seq=status.last_seq if status else -1,
        age_ms=age_ms(status, at_ms) if status else None,
        blocks=sum(one.blocks for one in held),
        bytes=sum(one.bytes for one in held),
        holdings=groups,
    )
