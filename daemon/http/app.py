"""The application: which handler answers what."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import msgspec
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from ..config import HttpConfig
from ..status import DaemonView, Readiness
from .answers import JSON, errors_as_answers
from .bodies import (
    ChildrenAnswer,
    ChildrenBody,
    ChildrenQuery,
    DaemonState,
    Liveness,
    LocateBody,
    LocateQuery,
    MatchAnswer,
    MatchBody,
    ResidenciesAnswer,
    Residency,
    StreamsAnswer,
    WorkersAnswer,
)
from .openapi import HTML, Endpoint, describe
from .page import status_page
from .questions import Questions
from .reads import Reads
from .security import OPEN_PATHS, Guard
from .snapshot import Snapshots
from .state import State

_QUESTION_THREADS = 2
"""Threads for questions that may take long, beside one for each snapshot."""

_POSTED = (400, 408, 413, 415, 500, 503)
_GOT = (400, 500, 503)


def make_app(view: DaemonView, config: HttpConfig, guard: Guard | None = None) -> web.Application:
    """The application that answers for `view`. Its clean-up waits for every thread that reads the backend.

    Raises CredentialError, unless the `guard` of `config` is given.
    """
    guard = guard or Guard(config, view.http_counters)
    threads = ThreadPoolExecutor(config.max_snapshots + _QUESTION_THREADS, thread_name_prefix="http-read")
    snapshots = Snapshots(view, config, threads)
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[errors_as_answers, guard.middleware()])
    for one in endpoints(view, config, snapshots, threads):
        app.router.add_route(one.method, one.path, one.handler)

    async def stop_snapshots(_: web.Application) -> None:
        snapshots.stop()

    async def end_threads(_: web.Application) -> None:
        await asyncio.to_thread(threads.shutdown)

    app.on_response_prepare.append(_not_kept)
    app.on_shutdown.append(stop_snapshots)
    app.on_cleanup.append(end_threads)
    return app


async def _not_kept(_: web.Request, response: web.StreamResponse) -> None:
    """No answer outlives the question in a cache, or is taken for another type than it says."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"


def endpoints(
    view: DaemonView, config: HttpConfig, snapshots: Snapshots, threads: ThreadPoolExecutor
) -> list[Endpoint]:
    """Every endpoint: routes and the description are made from this list."""
    reads = Reads(view, threads)
    questions = Questions(view, config, reads)
    state = State(view, reads)
    served: list[Endpoint] = []
    release = version("kvcensus")

    shown = status_page()

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=shown.text, content_type=HTML, headers=shown.headers)

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=description, content_type=JSON)

    async def metrics(request: web.Request) -> web.Response:
        try:
            encode, media = choose_encoder(",".join(request.headers.getall("Accept", [])))
        except TypeError:  # a version that is no number
            encode, media = choose_encoder("")
        names = request.query.getall("name[]", [])
        asked = view.registry.restricted_registry(names) if names else view.registry
        body = await reads.short(lambda: encode(asked))
        response = web.Response(body=body, headers={"Content-Type": media})
        response.enable_compression()
        return response

    served += [
        Endpoint("GET", "/", page, "The status page, for a browser.", media=HTML),
        Endpoint("POST", "/v1/match", questions.match, "How long a prefix of these blocks each worker could serve.",
                 MatchAnswer, body=MatchBody, errors=_POSTED),
        Endpoint("POST", "/v1/locate", questions.locate, "Every residency of one block.",
                 ResidenciesAnswer, body=LocateBody, errors=_POSTED),
        Endpoint("GET", "/v1/locate", questions.locate_query, "Every residency of one block.",
                 ResidenciesAnswer, query=LocateQuery, errors=_GOT),
        Endpoint("POST", "/v1/children", questions.children, "The residencies whose parent is this block, or the root.",
                 ChildrenAnswer, body=ChildrenBody, errors=_POSTED),
        Endpoint("GET", "/v1/children", questions.children_query,
                 "The residencies whose parent is this block, or the root.",
                 ChildrenAnswer, query=ChildrenQuery, errors=_GOT),
        Endpoint("GET", "/v1/workers", state.workers, "Every worker: trust, and what it holds.",
                 WorkersAnswer, errors=(500, 503)),
        Endpoint("GET", "/v1/daemon", state.daemon, "The daemon itself: version, problems, index, queue.",
                 DaemonState, errors=(500, 503)),
        Endpoint("GET", "/v1/streams", state.streams, "Every configured stream.", StreamsAnswer, errors=(500,)),
        Endpoint("GET", "/v1/snapshot", snapshots.snapshot, "The whole index as of one moment, a residency a line.",
                 Residency, lines=True, errors=(429, 500, 503)),
        Endpoint("GET", "/livez", state.livez, "Whether every thread of the daemon runs.", Liveness, unwell=True),
        Endpoint("GET", "/readyz", state.readyz, "Whether the daemon can answer.", Readiness, unwell=True),
        Endpoint("GET", "/metrics", metrics, "Figures for Prometheus."),
        Endpoint("GET", "/openapi.json", openapi, "This description.", media=JSON),
    ]  # fmt: skip
    description = msgspec.json.encode(describe(served, release, OPEN_PATHS))
    return served
