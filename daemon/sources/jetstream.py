"""A bus over JetStream: the server keeps the messages, and we know up to where they are in the index.

The only cursor is ours, in the index, committed with what the messages changed. From it a consumer is made that the
server need not remember: in memory, never acknowledged, and made again at the same place whenever something is odd. See
docs/decisions/0006-jetstream-consumer.md.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from contextlib import suppress

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..config import NatsConfig
from ..frame_queue import FrameQueue
from ..logs import get_logger
from .bus_source import BusSource
from .jetstream_api import (
    Place,
    StreamInfo,
    create_consumer,
    delete_consumer,
    place_of,
    pull_request,
    pull_subject,
    stream_info,
)
from .nats_bus import BURST_ITEMS, Arrived, Message, NatsBus
from .nats_connection import Backoff, Callback, NatsConnection, TakeAtOnce
from .nats_headers import VERSION_LINE, Headers
from .nats_problems import NatsProblem
from .subjects import matches

_TICK_S = 0.1
_IDLE_HEARTBEAT_S = 1.0
_SILENCE_S = 3 * _IDLE_HEARTBEAT_S
_PULL_EXPIRES_S = 30.0
_INACTIVE_S = 60.0
"""How long the server keeps a consumer that nobody asks. A full queue may last longer; then another one is made."""
_BATCH = 4096
_PULLS = 2
"""Requests at a time: the next messages are on their way while the last ones are applied."""
_LOOK_AGAIN_S = 0.2
_FEW_SIGNS = 4096
_GOODBYE_S = 1.0
_STATUS = "Status"
_DESCRIPTION = "Description"
_HEARTBEAT, _NO_MESSAGES, _EXPIRED, _CONFLICT = "100", "404", "408", "409"
_ENDED = ("batch completed", "message size exceeds maxbytes")
"""Conflicts that only end a request."""

log = get_logger("nats")


class _Odd(Exception):
    """The consumer cannot be relied upon any more: make another one at our position."""


class _Pull:
    """What one consumer has sent, and what it still may send."""

    def __init__(self, name: str, inbox: str, now_s: float) -> None:
        self.name = name
        self.inbox = inbox
        self.arrived: deque[Message] = deque()
        self.woken = asyncio.Event()
        self.heard_s = now_s
        self.consumer_seq = 0
        self.requests: dict[str, int] = {}
        """Open requests by their inbox, each with the messages that may still come for it."""
        self.oversize = False
        self._number = 0

    def next_inbox(self, batch: int) -> str:
        self._number += 1
        inbox = f"{self.inbox}.{self._number}"
        self.requests[inbox] = batch
        return inbox

    def count(self) -> None:
        """A message came: the oldest request has one less to wait for."""
        inbox = next(iter(self.requests), "")
        if not inbox:
            return
        self.requests[inbox] -= 1
        if self.requests[inbox] <= 0:
            del self.requests[inbox]


class JetStreamBus(NatsBus):
    """Follows a stream from our position on."""

    def __init__(self, bus: BusSource, config: NatsConfig, queue: FrameQueue) -> None:
        super().__init__(bus, config, queue)
        cursor = bus.position.cursor
        self._position = cursor.seq
        self._life, _, stored_ns = cursor.life.partition(" ")
        self._stored_ns = int(stored_ns or 0)
        """When the stream got the message at our position, 0 when unknown: another one there is of another history."""
        self._caught_up_at = 0
        self._batch = max(1, min(_BATCH, config.pending_max_messages // _PULLS))
        self._max_bytes = max(1, config.pending_max_bytes // _PULLS)

    async def follow(self, connection: NatsConnection) -> None:
        await self._look(connection)
        await self._hear_signs_of_life(connection)
        self.bus.connection_made()
        retry = Backoff(self.config.connection)
        loop = asyncio.get_running_loop()
        while True:
            began_s, position = loop.time(), self._position
            try:
                await self._consume(connection)
            except _Odd as odd:
                log.warning("consumer_made_again", bus=self.bus.name, position=self._position, reason=str(odd))
            if self._position > position or loop.time() - began_s > _SILENCE_S:
                retry.reset()
            await asyncio.sleep(retry.next_s())
            await self._look(connection)

    async def leave(self, connection: NatsConnection) -> None:
        """What is not handed over is read again at the next start."""

    async def _hear_signs_of_life(self, connection: NatsConnection) -> None:
        """They come over core NATS. Without them only leases are longer, so a refusal is a complaint and no end."""
        if not self.signs_of_life:
            return
        try:
            await connection.subscribe(self.signs_of_life, self.take_sign_of_life, max_messages=_FEW_SIGNS, max_bytes=0)
        except NatsProblem as problem:
            if connection.is_lost:
                raise
            self._hears_none(connection, str(problem))
        else:
            self.hears(True)

    def _hears_none(self, connection: NatsConnection, problem: str) -> None:
        connection.refused.pop(self.signs_of_life, None)
        log.error("no_signs_of_life", bus=self.bus.name, detail=problem)
        self.hears(False)

    # What the stream still has

    async def _look(self, connection: NatsConnection) -> None:
        """Compare the stream with our position, with nothing on its way. What is gone is lost, and said to be.

        Raises NatsProblem when there is no such stream, or none that keeps its messages for all readers.
        """
        info = await stream_info(connection, self.config.stream)
        if info.config.retention != "limits":
            raise NatsProblem(
                f"stream {self.config.stream} has retention {info.config.retention}: it drops messages once somebody "
                "has read them; give it retention limits"
            )
        first, last = max(1, info.state.first_seq), info.state.last_seq
        if lost := self._lost(info, first, last):
            self.outlet.add(lambda: self.bus.lost(lost))
        position = self._position
        if info.created != self._life or position < first - 1:
            self._position = first - 1
        self._position = min(self._position, max(last, first - 1))
        if lost or self._position != position:
            self._stored_ns = 0
        self._life = info.created
        self._caught_up_at = last
        self._note_pending(max(0, last - self._position))
        self._advance()
        await self._hand_over(connection)

    def _lost(self, info: StreamInfo, first: int, last: int) -> str:
        """What cannot be read any more, as a reason; "" for nothing."""
        stream, position = self.config.stream, self._position
        if not self._life:
            return ""
        if info.created != self._life:
            return f"stream {stream} was deleted and made anew"
        if last < position:
            return f"stream {stream} ends at {last}, before {position}, which was read already: it has lost messages"
        if first > position + 1:
            return f"messages {position + 1} to {first - 1} of stream {stream} were gone before they were read"
        return ""

    def _looks_odd(self, info: StreamInfo, position: int) -> bool:
        """Whether a look from afar says that another one is due. `position` is ours before the stream was asked."""
        state = info.state
        return info.created != self._life or state.last_seq < position or state.first_seq > position + 1

    def _note_pending(self, pending: int) -> None:
        self.bus.pending = pending
        self.bus.bus.behind = self._position < self._caught_up_at and pending > 0

    def _advance(self) -> None:
        life = f"{self._life} {self._stored_ns}" if self._stored_ns else self._life
        self.outlet.add(lambda: [self.bus.advance(self._position, life)])

    # Messages

    async def _consume(self, connection: NatsConnection) -> None:
        """Take messages from our position on. Ends by _Odd or NatsProblem."""
        stream = self.config.stream
        loop = asyncio.get_running_loop()
        pull = _Pull(f"kvcensus-{secrets.token_hex(8)}", connection.client.new_inbox(), loop.time())
        subscription: Subscription | None = None
        polling: asyncio.Task[None] | None = None
        try:
            subscription = await connection.subscribe(
                f"{pull.inbox}.*", self._receiver(pull), max_messages=0, max_bytes=0, at_once=self._taker(pull)
            )
            start = self._position if self._stored_ns else self._position + 1
            await create_consumer(connection, stream, pull.name, start, _INACTIVE_S)
            polling = asyncio.create_task(self._poll_for_ever(connection, pull))
            while True:
                await self._ask_for_more(connection, pull)
                await self._wait(pull)
                await self._take_all(connection, pull)
                self._check(connection, pull, polling)
        finally:
            if polling is not None and not polling.cancel() and not polling.cancelled():
                polling.exception()
            if subscription is not None:
                await connection.unsubscribe(subscription)
            if not connection.is_lost:
                with suppress(NatsProblem, TimeoutError):
                    async with asyncio.timeout(_GOODBYE_S):
                        await delete_consumer(connection, stream, pull.name)

    @staticmethod
    def _receiver(pull: _Pull) -> Callback:
        loop = asyncio.get_running_loop()

        async def receive(message: Msg) -> None:
            pull.heard_s = loop.time()
            pull.arrived.append(message)
            pull.woken.set()

        return receive

    @staticmethod
    def _taker(pull: _Pull) -> TakeAtOnce:
        """For all but what the server says in the first line of headers: that is left to nats-py to read."""
        loop = asyncio.get_running_loop()

        def take(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> bool:
            if headers and not headers.startswith(VERSION_LINE):
                return False
            said = Headers(headers) if headers else None
            pull.heard_s = loop.time()
            pull.arrived.append(Arrived(subject.decode(), reply.decode(), payload, said))
            pull.woken.set()
            return True

        return take

    async def _ask_for_more(self, connection: NatsConnection, pull: _Pull) -> None:
        subject = pull_subject(connection, self.config.stream, pull.name)
        request = pull_request(self._batch, self._max_bytes, _PULL_EXPIRES_S, _IDLE_HEARTBEAT_S)
        while len(pull.requests) < _PULLS:
            await connection.publish(subject, request, pull.next_inbox(self._batch))

    @staticmethod
    async def _wait(pull: _Pull) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_TICK_S):
                await pull.woken.wait()
        pull.woken.clear()

    async def _take_all(self, connection: NatsConnection, pull: _Pull) -> None:
        """Take what has arrived, a burst at a time, each with the position that it leads to."""
        while pull.arrived:
            try:
                while pull.arrived and len(self.outlet) < BURST_ITEMS:
                    self._take_one(pull, pull.arrived.popleft())
            finally:
                self._advance()
            self.tick()
            await self._hand_over(connection)
            pull.heard_s = asyncio.get_running_loop().time()
        self.tick()
        await self._hand_over(connection)

    async def _hand_over(self, connection: NatsConnection) -> None:
        """Hand over what was taken. Raises NatsProblem when the connection is lost before there is room for it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    return await self.outlet.flush()
            if connection.is_lost:
                raise NatsProblem(connection.why_lost())

    def _take_one(self, pull: _Pull, message: Message) -> None:
        place = place_of(message.reply)
        if place is None:
            self._note_status(pull, message)
            return
        pull.count()
        pull.consumer_seq += 1
        if place.consumer_seq == pull.consumer_seq == 1 and place.stream_seq == self._position:
            self._compare(place)
            return
        if place.consumer_seq != pull.consumer_seq or place.stream_seq <= self._position:
            raise _Odd(f"message {place.consumer_seq} of the consumer came as its {pull.consumer_seq}th")
        if place.stream_seq > self._position + 1:
            first, last = self._position + 1, place.stream_seq - 1
            reason = f"messages {first} to {last} of stream {self.config.stream} were gone before they were read"
            self.outlet.add(lambda: self.bus.lost(reason))
        pull.oversize = False
        self._position, self._stored_ns = place.stream_seq, place.stored_ns
        self._note_pending(place.pending)
        if not self.config.subjects or any(matches(pattern, message.subject) for pattern in self.config.subjects):
            self.take(message)

    def _compare(self, place: Place) -> None:
        """The message at our position comes first again: it must be the one that was read."""
        if place.stored_ns != self._stored_ns:
            reason = f"message {place.stream_seq} of stream {self.config.stream} is another than the one that was read"
            self.outlet.add(lambda: self.bus.lost(f"{reason}: the stream went back"))
            self._stored_ns = place.stored_ns

    def _note_status(self, pull: _Pull, message: Message) -> None:
        """The server says something of a request, or of the consumer."""
        headers = message.headers or {}
        status, description = headers.get(_STATUS, ""), headers.get(_DESCRIPTION, "").partition("\n")[0].strip()
        if status == _HEARTBEAT:
            return
        if pull.requests.pop(message.subject, None) is None:
            return
        if status in (_NO_MESSAGES, _EXPIRED):
            return
        if status == _CONFLICT and description.lower() in _ENDED:
            if description.lower() != _ENDED[0] and pull.oversize:
                raise NatsProblem(
                    f"message {self._position + 1} of stream {self.config.stream} is larger than half of "
                    f"pending_max_bytes ({self.config.pending_max_bytes})"
                )
            pull.oversize = not pull.arrived
            return
        raise _Odd(f"the server says {status} {description}".rstrip())

    def _check(self, connection: NatsConnection, pull: _Pull, polling: asyncio.Task[None]) -> None:
        if connection.is_lost:
            raise NatsProblem(connection.why_lost())
        if polling.done():
            polling.result()
        if problem := connection.refused.get(pull_subject(connection, self.config.stream, pull.name)):
            raise NatsProblem(problem)
        if problem := connection.refused.get(self.signs_of_life):
            self._hears_none(connection, problem)
        if asyncio.get_running_loop().time() - pull.heard_s > _SILENCE_S:
            raise _Odd("not even heartbeats come of it")

    async def _poll_for_ever(self, connection: NatsConnection, pull: _Pull) -> None:
        """See to it that what is gone is noticed also when no message follows it.

        Messages on their way may be gone from the stream already, so it is odd only if none of them comes.
        """
        while True:
            await asyncio.sleep(self.config.poll_ms / 1000)
            position = self._position
            info = await stream_info(connection, self.config.stream)
            self.bus.pending = max(0, info.state.last_seq - self._position)
            if not self._looks_odd(info, position):
                continue
            await asyncio.sleep(_LOOK_AGAIN_S)
            if self._position == position and not pull.arrived and not self.outlet:
                raise _Odd("the stream no longer has what should come next")
