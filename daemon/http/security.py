"""Who may ask, and how long and how often: bearer tokens, TLS, slow clients, the number of connections."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from http import HTTPStatus

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler

from ..config import HttpConfig
from ..counters import HttpCounters, HttpRefusal
from ..credentials import CredentialError, read_secret, read_tokens, server_tls, versions
from ..logs import get_logger
from .answers import JSON, RequestRefused
from .bodies import ErrorAnswer, ErrorDetail

OPEN_PATHS = frozenset({"/", "/livez", "/readyz"})
"""Probes tell nothing but whether the daemon is well, and a kubelet has no token. The status page has no data in it."""
METRICS_PATH = "/metrics"
SCHEME = "bearer"
CHALLENGE = 'Bearer realm="kvcensus"'

_LOOK_S = 1.0
"""How often the files of tokens and certificates are looked at for a change."""
_LOG_EVERY_S = 10.0
_HANDSHAKE_S = 10.0
_UNSENT_MS = 30_000
"""A client that takes nothing of an answer for so long is disconnected by the kernel."""
_UNSENT_BYTES = 128 << 10
"""What the kernel may hold of an answer: of more, a slow client takes megabytes before it is seen to take anything."""
_BACKLOG = 128

log = get_logger("http")


class Guard:
    """Asks for a token, and gives a body a time limit. Belongs to the event loop."""

    def __init__(self, config: HttpConfig, counters: HttpCounters) -> None:
        """Raises CredentialError."""
        self._counters = counters
        self._tokens = read_tokens(config.token_file) if config.token_file else None
        self._token_file = config.token_file
        self._open_paths = OPEN_PATHS if config.metrics_need_token else OPEN_PATHS | {METRICS_PATH}
        self._body_s = config.body_timeout_ms / 1000
        self._last_logged_s = float("-inf")
        self._refused = 0
        self.asking: set[RequestHandler] = set()
        """Connections with a request that is being answered."""

    def renew(self) -> None:
        """Read the tokens again. Raises CredentialError, and then the old ones stay."""
        if self._token_file:
            self._tokens = read_tokens(self._token_file)
            log.info("tokens_read", file=self._token_file, tokens=len(self._tokens))

    def middleware(self) -> Middleware:
        """What every request passes before its handler."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self._tokens is not None and request.path not in self._open_paths:
                self._admit(request)
            await self._receive(request)
            self.asking.add(request.protocol)
            try:
                return await handler(request)
            finally:
                self.asking.discard(request.protocol)

        return guarded

    def _admit(self, request: web.Request) -> None:
        assert self._tokens is not None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = scheme.lower() == SCHEME
        if given and self._tokens.admit(token.strip().encode("utf-8", "surrogateescape")):
            return
        self._counters.refused[HttpRefusal.TOKEN] += 1
        self._refused += 1
        if time.monotonic() - self._last_logged_s >= _LOG_EVERY_S:
            self._last_logged_s = time.monotonic()
            log.warning("token_refused", client=request.remote, path=request.path, given=given, requests=self._refused)
            self._refused = 0
        message = "the bearer token is not one of this server's" if given else "a bearer token is needed"
        challenge = f'{CHALLENGE}, error="invalid_token"' if given else CHALLENGE
        raise RequestRefused(HTTPStatus.UNAUTHORIZED, "unauthorized", message, headers={"WWW-Authenticate": challenge})

    async def _receive(self, request: web.Request) -> None:
        """Wait for the whole body, which the request then keeps; aiohttp refuses one that grows too long."""
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            message = "send the body without Content-Encoding"
            raise RequestRefused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        if not request.body_exists or request.content.is_eof():
            return
        try:
            async with asyncio.timeout(self._body_s):
                await request.read()
        except TimeoutError:
            self._counters.refused[HttpRefusal.SLOW] += 1
            message = f"the body did not arrive within {self._body_s:g} s (http.body_timeout_ms)"
            raise RequestRefused(
                HTTPStatus.REQUEST_TIMEOUT, "too_slow", message, headers={"Connection": "close"}
            ) from None


class _TurnedAway(asyncio.Protocol):
    """Answers a connection that is one too many, and ends it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_FULL_ANSWER)
        transport.close()


_FULL_BODY = msgspec.json.encode(
    ErrorAnswer(ErrorDetail("too_many_connections", None, "every connection (http.max_connections) has a request"))
)
_FULL_ANSWER = (
    f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {JSON}\r\nContent-Length: {len(_FULL_BODY)}\r\n"
    "Retry-After: 1\r\nConnection: close\r\n\r\n"
).encode() + _FULL_BODY


class GuardedSite(web.BaseSite):
    """Listens with a limit on connections. At the limit, the oldest one without a request makes room."""

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str,
        port: int,
        config: HttpConfig,
        guard: Guard,
        counters: HttpCounters,
    ) -> None:
        """Raises CredentialError."""
        tls = config.tls_files()
        self._authorities = _authorities(tls)
        self._distrusts = False
        """Whether who was let in before may not be let in any more."""
        self._newest = server_tls(*tls) if tls else None
        super().__init__(runner, ssl_context=self._newest, backlog=_BACKLOG)
        if self._newest is not None:
            self._newest.sni_callback = self._with_newest
        self._host, self._port = host, port
        self._connections_max = config.max_connections
        self._guard = guard
        self._counters = counters
        self._tls = tls
        self._secrets = [path for path in (config.token_file, *(tls or ())) if path]
        self._watching: asyncio.Task[None] | None = None
        self._leaving: set[RequestHandler] = set()

    @property
    def name(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Raises OSError when the address cannot be had."""
        await super().start()
        self._server = server = await asyncio.get_running_loop().create_server(
            self._accept,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=_HANDSHAKE_S if self._ssl_context else None,
        )
        for listening in server.sockets:
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_MS)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        if self._secrets:
            self._watching = asyncio.create_task(self._watch(versions(self._secrets)))

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().stop()

    def _accept(self) -> asyncio.Protocol:
        """The protocol of a new connection. A burst may pass the limit for a moment; the next connection mends that."""
        server = self._runner.server
        assert server is not None
        self._leaving.intersection_update(server.connections)
        staying = [one for one in server.connections if one not in self._leaving]
        excess = len(staying) + 1 - self._connections_max
        if excess > 0:
            idle = [one for one in staying if one not in self._guard.asking][:excess]
            if not idle:
                self._counters.refused[HttpRefusal.FULL] += 1
                return _TurnedAway()
            self._counters.refused[HttpRefusal.IDLE] += len(idle)
            self._leaving.update(idle)
            for one in idle:
                one.force_close()
        return server()

    async def _watch(self, seen: object) -> None:
        """Take up tokens and certificates that were exchanged. What cannot be used is logged, and the old ones stay."""
        while True:
            await asyncio.sleep(_LOOK_S)
            now = versions(self._secrets)
            if now == seen:
                continue
            seen = now
            for renew in (self._guard.renew, self._renew):
                try:
                    renew()
                except CredentialError as error:
                    log.error("credentials_refused", detail=str(error))

    def _renew(self) -> None:
        if self._tls:
            authorities = _authorities(self._tls)
            self._newest = server_tls(*self._tls)
            self._distrusts = self._distrusts or authorities != self._authorities
            log.info("certificate_read", file=self._tls[0])

    def _with_newest(self, connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> int | None:
        """For each client, with a name or without. To a context that is in use authorities can only be added."""
        assert self._newest is not None
        if connection.session_reused and self._distrusts:
            return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
        connection.context = self._newest
        return None


def _authorities(tls: tuple[str, str, str] | None) -> bytes:
    """What the file of the clients' authorities says, b"" without one. Raises CredentialError."""
    return read_secret(tls[2]) if tls and tls[2] else b""


class _PeerNonsense(logging.Filter):
    """What is not HTTP is the peer's affair: a line for debugging, without the bytes, which may hold a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        log.debug("not_http", kind=type(error).__name__)
        return False


protocol_log = logging.getLogger("kvcensus.http.protocol")
protocol_log.addFilter(_PeerNonsense())
