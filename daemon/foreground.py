"""A service in the foreground: it runs until a signal or its own failure, and the service manager hears how it goes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Protocol

from .service_manager import ServiceManager

_WATCH_S = 0.5
_STATUS_S = 5.0
CLOSING_S = 30.0
"""For what comes after a drain: the commit that runs, the end of HTTP, closing files."""


class Running(Protocol):
    """A service whose threads are at work."""

    def failure(self) -> BaseException | None:
        """Why it cannot go on, if it cannot."""

    def beat_s(self) -> float:
        """When the thread that writes last was between two steps, by the monotonic clock."""

    def summary(self) -> str:
        """How it goes, in one line."""


async def run_until(stop: asyncio.Event, service: Running, manager: ServiceManager) -> None:
    """Return when `stop` is set or the service has failed."""
    said_s = float("-inf")
    while not stop.is_set() and service.failure() is None:
        now_s = time.monotonic()
        if manager.listens and now_s - said_s >= _STATUS_S:
            said_s = now_s
            manager.status(service.summary())
        if manager.watchdog.is_due(now_s, service.beat_s()):
            manager.alive()
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _WATCH_S)
