"""The NATS intake: one thread with an event loop, in which every bus is followed by a task of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from ..config import NatsConfig
from ..frame_queue import Barrier, FrameQueue
from ..logs import get_logger
from .bus_source import BusSource
from .core_nats import CoreBus
from .jetstream import JetStreamBus
from .nats_bus import NatsBus

log = get_logger("nats")


class NatsIntake(threading.Thread):
    """The thread of all buses. They are added and removed while it runs, from any thread."""

    def __init__(self, queue: FrameQueue) -> None:
        super().__init__(name="nats-intake", daemon=True)
        self._queue = queue
        self._lock = threading.Lock()
        self._commands: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._stopping = False
        self._tasks: dict[str, tuple[NatsBus, asyncio.Task[None]]] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self.error: BaseException | None = None

    def add(self, bus: BusSource, config: NatsConfig) -> None:
        """Follow a bus. What cannot be reached is tried until it can; `bus.problem` says why."""
        self._command(lambda: self._start(bus, config))

    def remove(self, name: str, *, retire: bool, committed: Barrier) -> None:
        """Stop following a bus; `retire` also drops its workers. `committed` is queued behind all of it."""
        self._command(lambda: self._begin_removal(name, retire, committed))

    def stop(self) -> None:
        """End the thread. What has arrived is still handed over."""
        self._stopping = True
        self._command(lambda: None)

    def run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.error = error
            log.critical("nats_intake_failed", error=repr(error), exc_info=True)

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            self._commands.append(command)
            if self._loop is not None:
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._woken.set)

    async def _main(self) -> None:
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._woken.set()
        while not self._stopping:
            await self._woken.wait()
            self._woken.clear()
            with self._lock:
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            self._check()
        await asyncio.gather(*(self._end(*one) for one in self._tasks.values()), *self._removals)

    def _check(self) -> None:
        """A task ends only when it is cancelled: anything else is a mistake of ours."""
        for _, task in self._tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    def _start(self, bus: BusSource, config: NatsConfig) -> None:
        follower = (JetStreamBus if config.stream else CoreBus)(bus, config, self._queue)
        task = asyncio.create_task(follower.run(), name=bus.name)
        task.add_done_callback(lambda _: self._woken.set())
        self._tasks[bus.name] = follower, task
        log.info("bus_opened", bus=bus.name, servers=config.connection.servers, stream=config.stream)

    def _begin_removal(self, name: str, retire: bool, committed: Barrier) -> None:
        follower, task = self._tasks.pop(name)
        removal = asyncio.create_task(self._remove(follower, task, retire, committed))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)

    async def _remove(self, follower: NatsBus, task: asyncio.Task[None], retire: bool, committed: Barrier) -> None:
        await self._end(follower, task)
        if retire:
            follower.outlet.add(follower.bus.retire)
        follower.outlet.add(lambda: [(follower.bus.position, committed)])
        await follower.outlet.flush()

    @staticmethod
    async def _end(follower: NatsBus, task: asyncio.Task[None]) -> None:
        """What a task that is cancelled while it hands over has left is handed over."""
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await follower.outlet.flush()
