"""Where the index is read: in the event loop when that is a matter of microseconds, else in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from ..status import DaemonView

T = TypeVar("T")


class Reads:
    """Runs what reads the backend. A turn of the event loop costs less than the way to a thread and back."""

    def __init__(self, view: DaemonView, threads: Executor) -> None:
        self._view = view
        self._threads = threads

    async def short(self, read: Callable[[], T]) -> T:
        """The result of a read that takes no longer than a request does, unless the backend waits for a server."""
        if self._view.backend.reads_wait:
            return await self.long(read)
        return read()

    async def long(self, read: Callable[[], T]) -> T:
        """The result of a read that may take its time."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, read)
