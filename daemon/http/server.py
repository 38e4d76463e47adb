"""The HTTP server of the daemon."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from ..config import HttpConfig
from ..counters import HttpCounters
from ..credentials import CredentialError
from ..status import DaemonView
from .app import make_app
from .security import Guard, GuardedSite, protocol_log

_SHUTDOWN_S = 2.0
"""How long a request in progress may go on when the server stops."""
_LINGER_S = 2.0
"""How long the rest of a refused body is read, so that the client sees the answer."""


class GuardedServer:
    """Serves an application in the running event loop, behind the guard that it is made with."""

    def __init__(self, make: Callable[[Guard], web.Application], config: HttpConfig, counters: HttpCounters) -> None:
        """Raises CredentialError."""
        self._config = config
        self._counters = counters
        self._guard = Guard(config, counters)
        self._runner = web.AppRunner(
            make(self._guard),
            handle_signals=False,
            access_log=None,
            shutdown_timeout=_SHUTDOWN_S,
            keepalive_timeout=config.idle_timeout_ms / 1000,
            lingering_time=_LINGER_S,
            auto_decompress=False,
            logger=protocol_log,
        )

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen, and return the (host, port) that was bound; port 0 takes any free one.

        Raises OSError, CredentialError.
        """
        await self._runner.setup()
        try:
            await GuardedSite(self._runner, host, port, self._config, self._guard, self._counters).start()
        except (OSError, CredentialError):
            await self._runner.cleanup()
            raise
        bound = self._runner.addresses[0]
        return bound[0], bound[1]

    async def stop(self) -> None:
        """Answer nothing more, and wait until every answer has ended."""
        await self._runner.cleanup()


class HttpServer(GuardedServer):
    """Serves `view` in the running event loop. Stop it before the backend is closed."""

    def __init__(self, view: DaemonView, config: HttpConfig) -> None:
        """Raises CredentialError."""
        super().__init__(lambda guard: make_app(view, config, guard), config, view.http_counters)
