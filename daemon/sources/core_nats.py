"""A bus over core NATS: who listens gets it, and nobody keeps it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..config import NatsConfig, SourceType
from ..frame_queue import FrameQueue
from ..logs import get_logger
from .bus_source import BusSource
from .nats_bus import BURST_ITEMS, NatsBus, drain
from .nats_connection import Backoff, Callback, NatsConnection
from .nats_problems import NatsProblem
from .subjects import matches, overlap

_TICK_S = 0.1
_DRAIN_S = 5.0
_FEW_SIGNS = 4096
"""Signs of life that may wait: older ones say nothing that the next ones do not."""

log = get_logger("nats")


class CoreBus(NatsBus):
    """Follows the subjects of a bus. A subject that the server refuses is tried again while the others are followed."""

    def __init__(self, bus: BusSource, config: NatsConfig, queue: FrameQueue) -> None:
        super().__init__(bus, config, queue)
        self._subscribed: dict[str, Subscription] = {}
        self._arrived = asyncio.Event()
        self._most_messages = config.pending_max_messages // 2
        self._most_bytes = config.pending_max_bytes // 2
        self._earlier = {
            subject: [one for one in self.subjects[:at] if overlap(one, subject)]
            for at, subject in enumerate(self.subjects)
        }
        """For each subject those before it that take some of its messages."""
        bus.waiting = self._waiting

    async def follow(self, connection: NatsConnection) -> None:
        self._subscribed = {}
        retry = Backoff(self.config.connection)
        wanted = [*self.subjects, *filter(None, [self.signs_of_life])]
        refused = await self._subscribe(connection, wanted)
        if not self._subscribed.keys() & set(self.subjects):
            raise NatsProblem("; ".join(refused.values()))
        self.bus.connection_made()
        loop = asyncio.get_running_loop()
        retry_at = loop.time() + retry.next_s()
        while not connection.is_lost:
            if refused:
                self.bus.fail("; ".join(refused.values()))
                if loop.time() >= retry_at:
                    refused = await self._subscribe(connection, list(refused))
                    retry_at = loop.time() + retry.next_s()
                    if not refused:
                        self.bus.connection_made()
            refused |= await self._withdrawn(connection)
            self.hears(self.signs_of_life in self._subscribed)
            if connection.failure is not None:
                raise connection.failure
            await self._hand_over()
        raise NatsProblem(connection.why_lost())

    async def leave(self, connection: NatsConnection) -> None:
        """What waits in the client is taken, unless the queue is full for long."""
        await drain(connection, _DRAIN_S)

    def take_rest(self) -> None:
        """What waits in nats-py is in order, and would be forgotten. It came before the end, so it proves nothing."""
        for subject, subscription in self._subscribed.items():
            queue = subscription._pending_queue
            while not queue.empty():
                self._take_of(subject, queue.get_nowait())
        self.outlet.end_runs()
        self.bus.connection_lost()

    async def _hand_over(self) -> None:
        """Hand over until the next tick, which does not wait for room: a lost connection is noticed all the same."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TICK_S):
                while True:
                    if not self.outlet.waiting_messages:
                        await self._arrived.wait()
                    self._arrived.clear()
                    await self.outlet.flush()
        self.tick()
        self.outlet.end_burst()

    def _waiting(self) -> int:
        """Asked by other threads."""
        in_client = [subscription.pending_msgs for subscription in list(self._subscribed.values())]
        return self.outlet.waiting_messages + sum(in_client)

    async def _subscribe(self, connection: NatsConnection, subjects: list[str]) -> dict[str, str]:
        """Subscribe. Returns those that are refused, with the reason."""
        refused = {}
        for subject in subjects:
            is_life = subject == self.signs_of_life
            most_messages = _FEW_SIGNS if is_life else self.config.pending_max_messages
            most_bytes = self.config.pending_max_bytes
            at_once = None
            if not is_life and self.config.type is not SourceType.DYNAMO and not self._earlier[subject]:
                at_once = self._take_at_once
                most_messages -= self._most_messages
                most_bytes -= self._most_bytes
            try:
                self._subscribed[subject] = await connection.subscribe(
                    subject,
                    self.take_sign_of_life if is_life else self._receiver(subject),
                    max_messages=most_messages,
                    max_bytes=most_bytes,
                    at_once=at_once,
                )
            except NatsProblem as problem:
                if connection.is_lost:
                    raise
                refused[subject] = str(problem)
        return refused

    async def _withdrawn(self, connection: NatsConnection) -> dict[str, str]:
        """Subscriptions that the server has ended since: its users were changed."""
        found = {subject: why for subject, why in connection.refused.items() if subject in self._subscribed}
        for subject in found:
            await connection.unsubscribe(self._subscribed.pop(subject))
        if found.keys() & set(self.subjects):
            self.doubt()
        if found and not self._subscribed.keys() & set(self.subjects):
            raise NatsProblem("; ".join(found.values()))
        return found

    def _take_at_once(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> bool:
        """A message that is as earlier ones of its worker, without a turn of the event loop. False: it was not taken.

        What the queue has no room for waits in the outlet, up to half of the bounds. The other half is nats-py's.
        """
        outlet = self.outlet
        if len(outlet) >= BURST_ITEMS:
            outlet.end_burst()
        if outlet.waiting_messages >= self._most_messages or outlet.waiting_bytes >= self._most_bytes:
            return False
        if not self.take_plain(subject, headers, payload):
            return False
        self._arrived.set()
        return True

    def _receiver(self, subject: str) -> Callback:
        """What is called for each message in turn. While it waits, messages wait in the client, up to its bound.

        A message of several subscriptions comes once for each, and only the first of them takes it.
        """

        async def receive(message: Msg) -> None:
            self._take_of(subject, message)
            self._arrived.set()
            if len(self.outlet) >= BURST_ITEMS:
                await self.outlet.flush()

        return receive

    def _take_of(self, subject: str, message: Msg) -> None:
        if not any(one in self._subscribed and matches(one, message.subject) for one in self._earlier.get(subject, ())):
            self.take(message)
