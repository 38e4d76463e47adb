"""The thread that empties the spool: records go to JetStream in order, and are forgotten once the server has them.

Each connection is used until it fails and then thrown away, with all that was on its way: a client that reconnects by
itself would send the rest of its buffer, behind what was lost.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..config.relay import Pipeline
from ..followed import monotonic_ms, now_ms
from ..logs import get_logger
from ..sources.nats_connection import Backoff, NatsConnection, NatsConnector
from ..sources.nats_problems import NatsProblem
from ..streams.delivery import Control
from .counters import DropCause, Failure, PublisherCounters
from .envelopes import Envelopes, size_of
from .record import Position, Record
from .spool import Spool
from .spooler import SpooledStream, Spooler
from .stream import RelayStream
from .window import Window

_WINDOW_BYTES = 8 << 20
"""Payloads on their way at a time: a connection of 1 Gbit/s takes 64 ms for them."""
_LOOK_S = 0.25
"""How often the time limits are looked at while nothing happens."""
_LOOK_AT_STREAM_S = 60.0
"""How often the stream is looked at while all is well: somebody may give it more servers."""
_LOG_EVERY_S = 10.0
_GOODBYE_S = 1
_TOO_LARGE_CODE = 10054
_NO_RESPONDERS = "503"
_STATUS = "Status"

log = get_logger("publisher")


class PublisherOptions(msgspec.Struct, frozen=True):
    """`window` records are on their way at a time, `pipeline` says when several of one worker may be. Times in ms."""

    window: int
    pipeline: Pipeline
    ack_timeout_ms: int
    heartbeat_ms: int


class Way(NamedTuple):
    """How to come to the servers."""

    connector: NatsConnector
    backoff: Backoff


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    duplicate: bool = False
    error: _ApiError | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Publisher(threading.Thread):
    """Publishes what is spooled until `finish`. `streams` are the followed ones, for their signs of life."""

    def __init__(
        self,
        spool: Spool,
        spooler: Spooler,
        streams: Mapping[str, SpooledStream],
        envelopes: Envelopes,
        stream: RelayStream,
        way: Way,
        options: PublisherOptions,
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        self._spool = spool
        self._spooler = spooler
        self._streams = streams
        self._envelopes = envelopes
        self._stream = stream
        self._way = self._used = way
        self._options = options
        self._window = Window(options.window, _WINDOW_BYTES, options.ack_timeout_ms)
        self._published = spool.published()
        self._handed_over = 0
        self._drops_seen = 0
        self._too_large: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._finish_at_s: float | None = None
        self._failure: tuple[Failure, str] | None = None
        self._complaint = ""
        self._said = ("", 0.0)
        self.counters = PublisherCounters()
        self.error: BaseException | None = None
        self.problem = ""
        """Why nothing can be published, "" while it can."""

    def wake(self) -> None:
        """There are new records. Called from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # The loop has just ended.
                self._loop.call_soon_threadsafe(self._woken.set)

    def follow(self, streams: Mapping[str, SpooledStream]) -> None:
        """Give signs of life of these from now on. Called from any thread."""
        self._streams = streams

    def connect_by(self, way: Way) -> None:
        """Leave the connection, and go on over another one. Called from any thread."""
        self._way = way
        self.wake()

    @property
    def _leaves(self) -> bool:
        return self._way is not self._used

    def finish(self, deadline_s: float) -> None:
        """Publish what is spooled and end, after `deadline_s` at the latest; at once without a connection."""
        self._finish_at_s = time.monotonic() + deadline_s
        self.wake()

    @property
    def progress(self) -> tuple[int, Mapping[str, Position]]:
        """The running number up to which every record is acknowledged, and the last position of each stream."""
        return self._window.through, dict(self._published)

    def run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.error = error
            log.critical("publisher_failed", error=repr(error), exc_info=True)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        while self._finish_at_s is None:
            self._used = self._way
            try:
                connection = await self._connect()
                if connection is None:
                    continue
                self.counters.connections += 1
                self.counters.connected = 1
                try:
                    await self._use(connection)
                finally:
                    self.counters.connected = 0
                    self._retreat(Failure.DISCONNECTED)
                    await connection.close()
            except NatsProblem as problem:
                self._say(str(problem))
            await self._pause()

    async def _connect(self) -> NatsConnection | None:
        """A connection, None when the end or another way comes first. A server may say nothing for long."""
        connecting = asyncio.create_task(self._used.connector.connect())
        while not connecting.done() and not self._leaves and not self._is_over():
            done, _ = await asyncio.wait([connecting], timeout=_LOOK_S)
            if not done and not self.problem:
                self._say("no server has let us in yet")
        if connecting.cancel():
            await asyncio.wait([connecting])
        return None if connecting.cancelled() else connecting.result()

    async def _pause(self) -> None:
        """Wait before the next attempt, unless there is nothing to wait for any more."""
        ends_s = time.monotonic() + self._used.backoff.next_s()
        while self._finish_at_s is None and not self._leaves and (left_s := ends_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_S))

    async def _use(self, connection: NatsConnection) -> None:
        """Publish over one connection until the end. Raises NatsProblem when it is lost, or of no use."""
        connection.lost = self._woken.set
        await self._prepare(connection)
        inbox = connection.client.new_inbox()
        await connection.subscribe(f"{inbox}.*", self._answered, max_messages=0, max_bytes=0)
        connection.complained = self._complained
        self._settle()
        beating = asyncio.create_task(self._beat_for_ever(connection))
        try:
            await self._publish_while_connected(connection, inbox)
            self._hand_over()
            if not connection.is_lost:
                await self._beat(connection, leaving=self._finish_at_s is not None)
                await connection.client.flush(_GOODBYE_S)
        except (NatsError, OSError) as error:
            raise NatsProblem(connection.why_lost() if connection.is_lost else repr(error)) from error
        finally:
            beating.cancel()

    async def _prepare(self, connection: NatsConnection) -> None:
        """Look after the stream. With one server in charge of it, what is sent in order is kept in order."""
        await self._stream.prepare(connection)
        pipeline = self._options.pipeline
        safe = self._stream.replicas == 1 if pipeline is Pipeline.AUTO else pipeline is Pipeline.ALWAYS
        self._window.one_by_one = not safe

    async def _publish_while_connected(self, connection: NatsConnection, inbox: str) -> None:
        while not self._is_done() and not self._leaves:
            if connection.is_lost:
                raise NatsProblem(connection.why_lost())
            self._woken.clear()
            self._hand_over()
            if self._window.overdue(monotonic_ms()):
                seconds = self._options.ack_timeout_ms / 1000
                self._fail(Failure.TIMEOUT, self._complaint or f"the server acknowledges nothing for {seconds:g} s")
            if self._failure is not None:
                kind, reason = self._failure
                self._say(reason)
                self._retreat(kind)
                await self._prepare(connection)
                await self._pause()
            elif not await self._send_some(connection, inbox):
                await self._wait()

    def _is_done(self) -> bool:
        """Whether the end has come: everything is acknowledged, or the time is up."""
        return self._finish_at_s is not None and (self._is_over() or self._window.through >= self._spool.last_key)

    def _is_over(self) -> bool:
        return self._finish_at_s is not None and time.monotonic() >= self._finish_at_s

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await self._woken.wait()

    async def _send_some(self, connection: NatsConnection, inbox: str) -> int:
        """Publish what there is room for. Returns how many records that were."""
        self._forget_dropped()
        most, most_bytes = self._window.room()
        if most > 0 and most_bytes > 0:
            for key, record in self._spool.read(self._window.after, most, most_bytes):
                self._window.hold(key, record)
        ready = self._window.ready()
        for key, record in ready:
            subject, headers, payload = self._message(key, record, connection.client.max_payload)
            token = self._window.send(record, monotonic_ms())
            await connection.publish(subject, payload, f"{inbox}.{token}", headers)
        self.counters.sent += len(ready)
        self.counters.republished = self._window.repeated
        return len(ready)

    def _forget_dropped(self) -> None:
        """What is held may have been dropped from the spool since: the fences in its place are to be published."""
        if self._window.one_by_one and self._spool.drops != self._drops_seen:
            self._drops_seen = self._spool.drops
            self._window.retreat()

    def _message(self, key: int, record: Record, max_bytes: int) -> tuple[str, dict[str, str], bytes]:
        """Subject, headers and body. What the server does not take for its size becomes a fence in its place."""
        subject, headers = self._envelopes.of(record, record.control)
        if not record.control and size_of(headers, record.payload) > max_bytes:
            self._give_up(key, record, max_bytes)
        if key in self._too_large:
            subject, headers = self._envelopes.of(record, Control.FENCE)
            return subject, headers, b""
        return subject, headers, record.payload

    def _give_up(self, key: int, record: Record, max_bytes: int) -> None:
        """The server does not take a record for its size."""
        if key in self._too_large:
            return
        self._too_large.add(key)
        if stream := self._streams.get(record.stream):
            stream.counters.dropped[DropCause.TOO_LARGE] += 1
        log.error(
            "message_too_large",
            worker=record.stream,
            epoch=record.epoch,
            seq=record.seq,
            bytes=len(record.payload),
            server_takes=max_bytes,
            detail="a fence is published in its place; raise max_payload of the server, or max_msg_size of the stream",
        )

    async def _answered(self, message: Msg) -> None:
        """An acknowledgement, or why there is none."""
        token = int(message.subject.rpartition(".")[2])
        about = self._window.answered(token)
        if about is None:
            return
        key, record = about
        if message.headers and message.headers.get(_STATUS) == _NO_RESPONDERS:
            self._fail(Failure.REFUSED, self._stream.not_taken(self._envelopes.of(record, record.control)[0]))
            return
        try:
            answer = _decode_answer(message.data)
        except msgspec.DecodeError as error:
            self._fail(Failure.REFUSED, f"the server's acknowledgement cannot be read: {error}")
            return
        if answer.error is None:
            self._done(token, answer)
            return
        if answer.error.err_code == _TOO_LARGE_CODE:
            self._give_up(key, record, len(record.payload) - 1)
        subject = self._envelopes.of(record, record.control)[0]
        self._fail(Failure.REFUSED, self._stream.refused(subject, answer.error.err_code, answer.error.description))

    def _done(self, token: int, answer: _Answer) -> None:
        counters = self.counters
        counters.duplicates += answer.duplicate
        for done in self._window.acknowledge(token):
            counters.acknowledged += 1
            counters.delay_s.observe(max(0.0, (now_ms() - done.spooled_at_ms) / 1000))
            self._published[done.stream] = done.position
            self._too_large.discard(done.key)
            if stream := self._streams.get(done.stream):
                stream.counters.acknowledged += 1
        self._used.backoff.reset()
        self._settle()
        self._woken.set()

    def _fail(self, kind: Failure, reason: str) -> None:
        if self._failure is None:
            self._failure = (kind, reason)
        self._woken.set()

    def _retreat(self, kind: Failure) -> None:
        """Publish again from the first record that is not acknowledged on."""
        self._failure = None
        retreat = self._window.retreat()
        if retreat.records:
            self.counters.failures[kind] += 1
        for name, count in retreat.overtaken.items():
            if stream := self._streams.get(name):
                stream.counters.overtaken += count
            log.warning(
                "records_overtaken",
                worker=name,
                records=count,
                detail="the server took them before one that it lost: whoever follows the bus may see a gap",
            )

    def _complained(self, sentence: str) -> None:
        self._complaint = sentence
        self._say(sentence)

    def _say(self, problem: str) -> None:
        """Note why nothing can be published, and log it when it is news, or from time to time."""
        self.problem = problem
        said, at_s = self._said
        if problem != said or time.monotonic() - at_s >= _LOG_EVERY_S:
            self._said = (problem, time.monotonic())
            log.warning("cannot_publish", reason=problem, waiting=self._spool.waiting)

    def _settle(self) -> None:
        """It works."""
        if self.problem:
            log.info("publishing", waiting=self._spool.waiting)
            self.problem = self._complaint = ""
            self._said = ("", 0.0)

    def _hand_over(self) -> None:
        """Tell the spool's writer what it may forget."""
        through = self._window.through
        if through > self._handed_over:
            self._handed_over = through
            self._spooler.acknowledge(through, dict(self._published))

    async def _beat_for_ever(self, connection: NatsConnection) -> None:
        looked_s = time.monotonic()
        while not connection.is_lost:
            with suppress(NatsProblem):  # Whoever publishes notices as well.
                await self._beat(connection)
                if time.monotonic() - looked_s >= _LOOK_AT_STREAM_S:
                    looked_s = time.monotonic()
                    await self._prepare(connection)
            await asyncio.sleep(self._options.heartbeat_ms / 1000)

    async def _beat(self, connection: NatsConnection, *, leaving: bool = False) -> None:
        """A sign of life of each worker of which anything was published."""
        for name, stream in self._streams.items():
            position = self._published.get(name)
            if position is None:
                continue
            followed = stream.followed
            sure = followed.intake.connected and followed.state.proven and not self.problem and not leaving
            control = Control.ALIVE if sure else Control.GONE
            subject, headers = self._envelopes.of_beat(stream.address, position, control)
            await connection.publish(subject, b"", "", headers)
            self.counters.beats += 1
