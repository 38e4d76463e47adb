"""The HTTP server of the daemon."""

from __future__ import annotations

from aiohttp import web

from ..config import HttpConfig
from ..status import DaemonView
from .app import make_app

_SHUTDOWN_S = 2.0
"""How long a request in progress may go on when the server stops."""


class HttpServer:
    """Serves `view` in the running event loop. Stop it before the backend is closed."""

    def __init__(self, view: DaemonView, config: HttpConfig) -> None:
        self._runner = web.AppRunner(
            make_app(view, config), handle_signals=False, access_log=None, shutdown_timeout=_SHUTDOWN_S
        )

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen, and return the (host, port) that was bound; port 0 takes any free one. Raises OSError."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        bound = self._runner.addresses[0]
        return bound[0], bound[1]

    async def stop(self) -> None:
        """Answer nothing more, and wait until nothing reads the backend."""
        await self._runner.cleanup()
