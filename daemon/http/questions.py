"""Who holds what: match, locate, children."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from http import HTTPStatus

from aiohttp import web

from kvcensus.backends.model import CacheResidency, IdentityScope

from ..config import HttpConfig
from ..status import DaemonView, Trust
from .answers import RequestRefused, answer
from .beliefs import Beliefs
from .bodies import (
    ChildrenAnswer,
    ChildrenBody,
    ChildrenQuery,
    LocateBody,
    LocateQuery,
    MatchAnswer,
    MatchBody,
    MatchedWorker,
    ResidenciesAnswer,
    ScopeBody,
    TrustedResidency,
    fields_of,
)
from .reading import BodyReader, read_hash, read_hashes, read_parent, read_query
from .reads import Reads

_SHORT_HASHES_MAX = 1024
"""A longer `match` takes more than a millisecond and leaves the event loop to others."""

_match_bodies = BodyReader(MatchBody)
_locate_bodies = BodyReader(LocateBody)
_children_bodies = BodyReader(ChildrenBody)


class Questions:
    """Handlers of questions to the index."""

    def __init__(self, view: DaemonView, config: HttpConfig, reads: Reads) -> None:
        self._view = view
        self._hashes_max = config.max_hashes_per_query
        self._trusted_only = config.trusted_only
        self._reads = reads

    async def match(self, request: web.Request) -> web.Response:
        asked = await _match_bodies.read(request)
        if len(asked.block_hashes) > self._hashes_max:
            message = f"{len(asked.block_hashes)} hashes; http.max_hashes_per_query is {self._hashes_max}"
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "too_many_hashes", message, "block_hashes")
        hashes = read_hashes(asked.block_hashes, "block_hashes")
        scope = asked.scope.scope() if asked.scope else None
        trusted_only = self._trusted_only if asked.trusted_only is None else asked.trusted_only
        run = self._reads.short if len(hashes) <= _SHORT_HASHES_MAX else self._reads.long
        return answer(request, await run(partial(self._matched, scope, hashes, trusted_only)))

    def _matched(self, scope: IdentityScope | None, hashes: list[bytes], trusted_only: bool) -> MatchAnswer:
        beliefs = Beliefs(self._view)
        workers = []
        for match in self._view.backend.match(scope, hashes):
            belief = beliefs.of(match.worker_id)
            if belief.trust is Trust.FRESH or not trusted_only:
                workers.append(
                    MatchedWorker(
                        match.worker_id, match.rank, *belief, match.tiers, match.blocks, match.blocks_any_tier
                    )
                )
        return MatchAnswer(workers)

    async def locate(self, request: web.Request) -> web.Response:
        asked = await _locate_bodies.read(request)
        return await self._located(request, asked.block_hash, asked.scope, asked.group)

    async def locate_query(self, request: web.Request) -> web.Response:
        asked = read_query(request, LocateQuery)
        return await self._located(request, asked.block_hash, _scope_of(asked), asked.group)

    async def _located(
        self, request: web.Request, block_hash: str | int, scope: ScopeBody | None, group: int | None
    ) -> web.Response:
        wanted = read_hash(block_hash, "block_hash")

        def find() -> ResidenciesAnswer:
            beliefs = Beliefs(self._view)
            found = self._view.backend.find(wanted, scope.scope() if scope else None)
            return _believed(beliefs, (one for one in found if group is None or one.key.group == group))

        return answer(request, await self._reads.short(find))

    async def children(self, request: web.Request) -> web.Response:
        asked = await _children_bodies.read(request)
        return await self._children(request, asked.scope, asked.prefix_hash, asked.limit)

    async def children_query(self, request: web.Request) -> web.Response:
        asked = read_query(request, ChildrenQuery)
        scope = ScopeBody(asked.model_id, asked.tokenizer_id, asked.adapter_id, asked.tenant_id or "")
        return await self._children(request, scope, asked.prefix_hash, asked.limit)

    async def _children(
        self, request: web.Request, scope: ScopeBody, prefix_hash: str | int, limit: int | None
    ) -> web.Response:
        parent = read_parent(prefix_hash, "prefix_hash")

        def scan() -> web.Response:
            beliefs, backend, more = Beliefs(self._view), self._view.backend, False
            if limit is None:
                found = backend.prefix_scan(scope.scope(), parent)
            else:
                found, more = backend.first_children(scope.scope(), parent, limit)
            return answer(request, ChildrenAnswer(_believed(beliefs, found).residencies, more))

        return await self._reads.long(scan)


def _believed(beliefs: Beliefs, found: Iterable[CacheResidency]) -> ResidenciesAnswer:
    return ResidenciesAnswer([TrustedResidency(*fields_of(one), *beliefs.of(one.worker_id)) for one in found])


def _scope_of(asked: LocateQuery) -> ScopeBody | None:
    if asked.model_id is not None:
        return ScopeBody(asked.model_id, asked.tokenizer_id, asked.adapter_id, asked.tenant_id or "")
    for name in ("tokenizer_id", "adapter_id", "tenant_id"):
        if getattr(asked, name) is not None:
            message = f"`{name}` is part of a scope, which needs `model_id`"
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "invalid", message, "model_id")
    return None
