"""The HTTP side of a relay: probes, metrics, and how far each stream has been published."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from ..config import HttpConfig
from ..http.answers import answer, errors_as_answers
from ..http.bodies import Liveness
from ..http.security import Guard
from ..status import StreamState

if TYPE_CHECKING:
    from .service import RelayService


class RelayedStream(msgspec.Struct, frozen=True):
    """A stream: its last spooled message, and the last one that the bus has acknowledged. -1: none of its epoch."""

    stream: str
    worker: str
    rank: int | None
    endpoint: str
    state: StreamState
    epoch: int
    spooled_seq: int
    published_epoch: int
    published_seq: int
    dropped: int


class RelayAnswer(msgspec.Struct, frozen=True):
    """The relay. `lineage` is the id of its spool; `waiting` and `waiting_bytes` are what it still has to publish."""

    lineage: str
    jetstream: str
    connected: bool
    problem: str
    waiting: int
    waiting_bytes: int
    streams: list[RelayedStream]


def make_app(service: RelayService, config: HttpConfig, guard: Guard) -> web.Application:
    """The application that answers for `service`."""

    async def livez(request: web.Request) -> web.Response:
        alive = service.alive()
        return answer(request, Liveness(alive), HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)

    async def readyz(request: web.Request) -> web.Response:
        readiness = service.readiness()
        return answer(request, readiness, HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def relay(request: web.Request) -> web.Response:
        return answer(request, _describe(service))

    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[errors_as_answers, guard.middleware()])
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/v1/relay", relay)
    app.router.add_get("/metrics", make_aiohttp_handler(service.registry))
    return app


def _describe(service: RelayService) -> RelayAnswer:
    _, published = service.publisher.progress
    streams = []
    for name, stream in service.streams.items():
        status = stream.followed.status()
        epoch, seq = published.get(name, (0, -1))
        streams.append(
            RelayedStream(
                stream=name,
                worker=stream.address.worker,
                rank=stream.address.rank,
                endpoint=status.endpoint,
                state=status.state,
                epoch=status.epoch,
                spooled_seq=status.last_seq,
                published_epoch=epoch,
                published_seq=seq,
                dropped=sum(stream.counters.dropped.values()),
            )
        )
    return RelayAnswer(
        lineage=service.spool.lineage,
        jetstream=service.config.relay.stream,
        connected=bool(service.publisher.counters.connected),
        problem=service.publisher.problem,
        waiting=service.spool.waiting,
        waiting_bytes=service.spool.waiting_bytes,
        streams=streams,
    )
