"""What following a bus over core NATS and over JetStream have in common: trying again, and handing over."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec
from nats import errors
from nats.aio.msg import Msg

from kvcensus.translators.dynamo_envelope import DEFAULT_SUBJECTS

from ..config import NatsConfig, SourceType
from ..followed import monotonic_ms
from ..frame_queue import Burst, FrameQueue, Item
from ..logs import get_logger
from ..relay.convention import EVENTS_PREFIX, every_subject
from ..streams.bus import key_of
from ..streams.delivery import Delivery
from .bus_source import BusSource
from .nats_connection import Backoff, NatsConnection, NatsConnector
from .nats_headers import Headers
from .nats_problems import NatsProblem
from .opening import open_message
from .plain_messages import PlainMessages

BURST_ITEMS = 256
"""What is handed over at a time: more would only wait longer for the writer."""
_ROOM_LOOK_S = 0.002
"""How often a full queue is looked at: a thread cannot wake an event loop for free."""
_LOG_EVERY_S = 10.0

log = get_logger("nats")


def subjects_of(config: NatsConfig) -> tuple[str, ...]:
    """The subjects that are followed: those of the configuration, or all that Dynamo or a relay publishes on."""
    if config.subjects:
        return config.subjects
    return DEFAULT_SUBJECTS if config.type is SourceType.DYNAMO else (every_subject(EVENTS_PREFIX),)


class Outlet:
    """The way to the writer: in order, and waiting without blocking the event loop while the queue is full."""

    def __init__(self, queue: FrameQueue, bus: BusSource) -> None:
        self._queue = queue
        self._bus = bus
        self._runs: dict[str, tuple[Delivery, int, list[bytes]]] = {}
        """By worker: what its next messages have in common, the number of the first, their payloads."""
        self._in_runs = 0
        self._burst = Burst()
        self._ended = 0
        self._waiting: deque[Burst] = deque()
        """The last ones of the bursts that have ended."""
        self.waiting_messages = self.waiting_bytes = 0
        """What these hold."""

    def __len__(self) -> int:
        """Messages, and whatever else there is, in the burst that is being put together."""
        return self._burst.messages + self._in_runs

    def add(self, happen: Callable[[], list[Item]]) -> None:
        """What comes of this for the next burst. It is called once the bus knows of every message before it."""
        self.end_runs()
        self._burst.extend(happen())

    def add_message(self, alike: Delivery, seq: int, payload: bytes) -> None:
        """A message for the next burst, said to be as others of its worker, but for its number and payload."""
        worker = key_of(alike)
        known, first, payloads = self._runs.get(worker, (alike, seq, []))
        if known is not alike or seq != first + len(payloads):
            self.end_runs()
            first, payloads = seq, []
        if not payloads:
            self._runs[worker] = alike, first, payloads
        payloads.append(payload)
        self._in_runs += 1

    def end_runs(self) -> None:
        """Say now what the messages are that were added. To be called before anything changes for their workers."""
        runs, self._runs, self._in_runs = self._runs, {}, 0
        for alike, first, payloads in runs.values():
            self._burst.extend(self._bus.take_run(msgspec.structs.replace(alike, seq=first), payloads))

    def end_burst(self) -> None:
        """What is added from now on is for another burst. Bursts that there is room for go to the queue."""
        self.end_runs()
        if self._burst.items:
            self._ended += 1
            self._waiting.append(self._burst)
            self.waiting_messages += self._burst.messages
            self.waiting_bytes += self._burst.size
            self._burst = Burst()
        while self._waiting and self._queue.offer(self._waiting[0]):
            burst = self._waiting.popleft()
            self.waiting_messages -= burst.messages
            self.waiting_bytes -= burst.size

    async def flush(self) -> None:
        """Hand over what was added until now. Returns when the queue has it, or is closed."""
        self.end_burst()
        until_now = self._ended
        while self._ended - len(self._waiting) < until_now:
            await asyncio.sleep(_ROOM_LOOK_S)
            self.end_burst()


class Arrived(msgspec.Struct, gc=False):
    """A message of which nats-py has made no object."""

    subject: str
    reply: str
    data: bytes
    headers: Headers | None


Message = Msg | Arrived


class NatsBus:
    """Follows one bus: connects, follows until something is wrong, says what, waits, and begins again."""

    def __init__(self, bus: BusSource, config: NatsConfig, queue: FrameQueue) -> None:
        self.bus = bus
        self.config = config
        self.outlet = Outlet(queue, bus)
        self._plain = PlainMessages()
        self._connector = NatsConnector(config.connection, f"kvcensus {config.name}")
        self._backoff = Backoff(config.connection)
        self._drop_logged_s = 0.0

    @property
    def signs_of_life(self) -> str:
        """The subject of the signs of life of relays, "" for none."""
        return "" if self.config.type is SourceType.DYNAMO else self.config.alive_subject

    @property
    def subjects(self) -> tuple[str, ...]:
        """Those of the messages."""
        return subjects_of(self.config)

    async def run(self) -> None:
        """Follow until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                await self._follow_once()
            except NatsProblem as problem:
                self.bus.fail(str(problem))
            if loop.time() - began_s > self.config.connection.reconnect_max_ms / 1000:
                self._backoff.reset()
            await asyncio.sleep(self._backoff.next_s())

    async def _follow_once(self) -> None:
        connection = await self._connector.connect()
        connection.dropped = self._dropped
        try:
            await self.follow(connection)
        except asyncio.CancelledError:
            await self.leave(connection)
            raise
        finally:
            self.outlet.end_runs()
            self.bus.connection_lost()
            await connection.close()
            self.take_rest()
            await self.outlet.flush()

    async def follow(self, connection: NatsConnection) -> None:
        """Follow over one connection. Raises NatsProblem when nothing comes of it any more."""
        raise NotImplementedError

    async def leave(self, connection: NatsConnection) -> None:
        """The end has come: take what is already here."""
        raise NotImplementedError

    def take_rest(self) -> None:
        """The connection has ended: take what cannot be had again."""

    def tick(self) -> None:
        """Time has passed."""
        self.outlet.add(self.bus.tick)

    def doubt(self) -> None:
        """Something of what was sent may have been missed."""
        self.outlet.end_runs()
        self.bus.bus.doubt()

    def take(self, message: Message) -> None:
        """One message: what it comes to goes to the outlet."""
        bus, payload = self.bus, message.data
        settings, headers = bus.settings, message.headers
        subject, raw = message.subject.encode(), headers.raw if isinstance(headers, Headers) else b""
        if self.take_plain(subject, raw, payload):
            return
        bus.counters.messages += 1
        bus.counters.bytes += len(payload)
        opening = open_message(settings.type, settings.worker_prefix, message.subject, headers, payload)
        self.outlet.add(lambda: bus.take(opening, payload))
        self._plain.note(subject, raw, opening)

    def take_plain(self, subject: bytes, headers: bytes, payload: bytes) -> bool:
        """One message, if it is as earlier ones of its worker. False: it was not taken."""
        plain = self._plain.open(subject, headers)
        if plain is None:
            return False
        self.bus.counters.messages += 1
        self.bus.counters.bytes += len(payload)
        self.outlet.add_message(*plain, payload)
        return True

    def hears(self, signs: bool) -> None:
        """Whether signs of life can come."""
        self.bus.bus.hears(signs, monotonic_ms())

    async def take_sign_of_life(self, message: Msg) -> None:
        """One sign of life of a relay."""
        self.take(message)

    def _dropped(self, subject: str) -> None:
        self.bus.counters.dropped += 1
        self.doubt()
        now = asyncio.get_running_loop().time()
        if now - self._drop_logged_s > _LOG_EVERY_S:
            self._drop_logged_s = now
            log.warning(
                "messages_dropped",
                bus=self.bus.name,
                subject=subject,
                dropped=self.bus.counters.dropped,
                detail="more wait than pending_max_messages or pending_max_bytes; what is missed fences its workers",
            )


async def drain(connection: NatsConnection, seconds: float) -> None:
    """Take what the server has sent already."""
    with suppress(errors.Error, OSError, TimeoutError):
        async with asyncio.timeout(seconds):
            await connection.client.drain()
