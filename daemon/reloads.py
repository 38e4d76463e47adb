"""SIGHUP: the configuration is read again, and taken up as far as that goes while the service runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from .config import Config, ConfigError
from .logs import get_logger
from .service_manager import ServiceManager

log = get_logger("reload")


def ignore_hangups() -> None:
    """SIGHUP ends nobody who has not read the configuration for long, and is not ready to read it again."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@asynccontextmanager
async def reloads(
    manager: ServiceManager, load: Callable[[], Config] | None, take_up: Callable[[Config], Sequence[str]]
) -> AsyncIterator[None]:
    """Reload at each SIGHUP while the body runs, one at a time. The end waits for the one that is under way.

    `load` reads the configuration; None where there is nothing to read. `take_up` is called in another thread, and
    returns the keys that changed but need a restart.
    """
    asked = asyncio.Event()
    ended = False

    async def serve() -> None:
        while True:
            await asked.wait()
            if ended:
                return
            asked.clear()
            manager.reloading()
            await asyncio.to_thread(_reload, load, take_up)
            manager.ready()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        ended = True
        asked.set()
        await task


def _reload(load: Callable[[], Config] | None, take_up: Callable[[Config], Sequence[str]]) -> None:
    if load is None:
        log.warning("reload_ignored", reason="started from flags, there is no file to read")
        return
    try:
        config = load()
    except ConfigError as error:
        log.error("reload_refused", detail=str(error))
        return
    try:
        needs_restart = take_up(config)
    except Exception as error:
        log.critical("reload_failed", error=repr(error), exc_info=True)
        return
    log.info("reloaded", sources=len(config.sources), needs_restart=needs_restart)
