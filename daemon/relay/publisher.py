"""The thread that empties the spool: records go to JetStream in order, and are forgotten once the server has them.

Each connection is used until it fails and then thrown away, with all that was on its way: a client that reconnects by
itself would send the rest of its buffer, behind what was lost.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..followed import monotonic_ms, now_ms
from ..logs import get_logger
from ..streams.delivery import Control
from .convention import (
    EXPECTED_STREAM,
    MESSAGE_ID,
    Address,
    address_headers,
    message_id,
    numbered,
    subject_of,
)
from .counters import DropCause, Failure, PublisherCounters
from .spool import Position, Record, Spool
from .spooler import SpooledStream, Spooler
from .window import Window

_WINDOW_BYTES = 8 << 20
"""Payloads on their way at a time: a connection of 1 Gbit/s takes 64 ms for them."""
_LOOK_S = 0.25
"""How often the time limits are looked at while nothing happens."""
_LOG_EVERY_S = 10.0
_GOODBYE_S = 1
_HEADER_LINES_BYTES = 12
"""`NATS/1.0`, an empty line, and their ends."""
_TOO_LARGE_CODE = 10054
_NO_RESPONDERS = "503"
_STATUS = "Status"

log = get_logger("publisher")


class PublishProblem(Exception):
    """Why nothing can be published now, as a sentence for the operator."""


class Connect(Protocol):
    """Opens a connection that does not reconnect. Raises PublishProblem.

    `lost` is called once it is gone, `problem` with what the server says against us.
    """

    def __call__(self, lost: Callable[[], None], problem: Callable[[str], None]) -> Awaitable[Client]: ...


class PublisherOptions(msgspec.Struct, frozen=True):
    """Where records go. Times in ms; `window` in records on their way at a time."""

    stream: str
    prefix: str
    alive_prefix: str
    window: int
    ack_timeout_ms: int
    heartbeat_ms: int
    retry_min_ms: int
    retry_max_ms: int


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    stream: str = ""
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
        options: PublisherOptions,
        connect: Connect,
        prepare: Callable[[Client], Awaitable[None]],
    ) -> None:
        """`prepare` is awaited on each new connection and after a refusal; it raises PublishProblem."""
        super().__init__(name="publisher", daemon=True)
        self._spool = spool
        self._spooler = spooler
        self._streams = streams
        self._options = options
        self._connect = connect
        self._prepare = prepare
        self._window = Window(options.window, _WINDOW_BYTES, options.ack_timeout_ms)
        self._published = spool.published()
        self._acknowledged_through = 0
        self._too_large: set[int] = set()
        self._headers: dict[Address, tuple[str, dict[str, str]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._finish_at_s: float | None = None
        self._failure: tuple[Failure, str] | None = None
        self._said = ""
        self._said_at_s = 0.0
        self._complaint = ""
        self.counters = PublisherCounters()
        self.error: BaseException | None = None
        self.problem = ""
        """Why nothing can be published, "" while it can."""

    def wake(self) -> None:
        """There are new records. Called from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._woken.set)

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
        wait_ms = self._options.retry_min_ms
        while self._finish_at_s is None:
            acknowledged = self.counters.acknowledged
            try:
                await self._use_connection()
            except PublishProblem as problem:
                self._say(str(problem))
            if self._finish_at_s is not None:
                return
            wait_ms = self._next_wait_ms(wait_ms, self.counters.acknowledged > acknowledged)
            await self._pause(wait_ms)

    def _next_wait_ms(self, wait_ms: int, went_well: bool) -> int:
        return self._options.retry_min_ms if went_well else min(self._options.retry_max_ms, 2 * wait_ms)

    async def _pause(self, wait_ms: int) -> None:
        """Wait, unless there is nothing to wait for any more."""
        ends_s = time.monotonic() + wait_ms / 1000
        while self._finish_at_s is None and (left := ends_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK_S))

    async def _use_connection(self) -> None:
        """Publish over one connection until it is lost, or until the end."""
        lost = asyncio.Event()

        def connection_lost() -> None:
            lost.set()
            self._woken.set()

        self._complaint = ""
        client = await self._connect(connection_lost, self._complained)
        self.counters.connected = 1
        self.counters.connections += 1
        beating = None
        try:
            await self._prepare(client)
            inbox = client.new_inbox()
            await client.subscribe(f"{inbox}.*", cb=self._answered)
            beating = asyncio.create_task(self._beat_for_ever(client))
            self._settle("")
            await self._publish_while(client, inbox, lost)
            await self._say_goodbye(client)
        except (NatsError, OSError, TimeoutError) as error:
            raise PublishProblem(
                self._complaint or f"the connection failed: {error or type(error).__name__}"
            ) from error
        finally:
            was_lost = lost.is_set()
            self.counters.connected = 0
            if beating is not None:
                beating.cancel()
            self._retreat(Failure.DISCONNECTED, "the connection was lost")
            await _close(client)
        if was_lost:
            raise PublishProblem(self._complaint or "the connection was lost")

    async def _publish_while(self, client: Client, inbox: str, lost: asyncio.Event) -> None:
        wait_ms = self._options.retry_min_ms
        while not lost.is_set() and not self._is_done():
            self._woken.clear()
            self._hand_over()
            if self._window.overdue(monotonic_ms()):
                seconds = self._options.ack_timeout_ms / 1000
                self._fail(Failure.TIMEOUT, self._complaint or f"no acknowledgement of the server for {seconds:g} s")
            if self._failure is not None:
                self._retreat(*self._failure)
                await self._prepare(client)
                wait_ms = self._next_wait_ms(wait_ms, False)
                await self._pause(wait_ms)
                continue
            if not self._window.cautious:
                wait_ms = self._options.retry_min_ms
            if not await self._send_some(client, inbox):
                await self._wait()

    def _is_done(self) -> bool:
        """Whether the end has come: everything is acknowledged, or the time is up."""
        if self._finish_at_s is None:
            return False
        return time.monotonic() >= self._finish_at_s or self._window.through >= self._spool.last_key

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _send_some(self, client: Client, inbox: str) -> int:
        """Publish what there is room for. Returns how many records that were."""
        most, most_bytes = self._window.room()
        if most <= 0 or most_bytes <= 0:
            return 0
        records = self._spool.read(self._window.after, most, most_bytes)
        counters = self.counters
        for key, record in records:
            subject, headers, payload = self._message(key, record, client.max_payload)
            if key <= self._window.highest:
                counters.republished += 1
            token = self._window.send(key, record, len(payload), monotonic_ms())
            counters.sent += 1
            await client.publish(subject, payload, f"{inbox}.{token}", headers)
        return len(records)

    def _message(self, key: int, record: Record, max_bytes: int) -> tuple[str, dict[str, str], bytes]:
        """Subject, headers and body. What the server does not take for its size becomes a fence in its place."""
        subject, headers = self._envelope(record, record.control)
        if record.control:
            return subject, headers, b""
        size = len(record.payload) + _HEADER_LINES_BYTES + sum(4 + len(name) + len(headers[name]) for name in headers)
        if size > max_bytes:
            self._give_up(key, record, max_bytes)
        if key in self._too_large:
            subject, headers = self._envelope(record, Control.FENCE)
            return subject, headers, b""
        return subject, headers, record.payload

    def _envelope(self, record: Record, control: Control) -> tuple[str, dict[str, str]]:
        address = record.address
        known = self._headers.get(address)
        if known is None:
            common = address_headers(self._spool.lineage, address) | {EXPECTED_STREAM: self._options.stream}
            known = self._headers[address] = (subject_of(self._options.prefix, address), common)
        subject, common = known
        headers = numbered(common, record.epoch, record.seq, control)
        headers[MESSAGE_ID] = message_id(self._spool.lineage, address, record.epoch, record.seq, control)
        return subject, headers

    def _give_up(self, key: int, record: Record, max_bytes: int) -> None:
        """The server does not take a record for its size."""
        if key in self._too_large:
            return
        self._too_large.add(key)
        stream = self._streams.get(record.stream)
        if stream is not None:
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
        try:
            token = int(message.subject.rpartition(".")[2])
            about = self._window.answered(token)
            if about is None:
                return
            if message.headers and message.headers.get(_STATUS) == _NO_RESPONDERS:
                self._refused_by_nobody(about[1])
                return
            answer = _decode_answer(message.data)
        except (ValueError, msgspec.DecodeError) as error:
            self._fail(Failure.REFUSED, f"the server's acknowledgement cannot be read: {error}")
            return
        if answer.error is None:
            self._done(token, answer)
        else:
            self._refused(*about, answer.error)

    def _done(self, token: int, answer: _Answer) -> None:
        counters = self.counters
        counters.duplicates += answer.duplicate
        for done in self._window.acknowledge(token):
            counters.acknowledged += 1
            counters.delay_s.observe(max(0.0, (now_ms() - done.spooled_at_ms) / 1000))
            self._published[done.stream] = done.position
            self._too_large.discard(done.key)
            stream = self._streams.get(done.stream)
            if stream is not None:
                stream.counters.acknowledged += 1
        if self.problem:
            self._settle("")
        self._woken.set()

    def _refused_by_nobody(self, record: Record) -> None:
        subject = subject_of(self._options.prefix, record.address)
        self._fail(
            Failure.REFUSED,
            f"no JetStream stream takes {subject}: {self._options.stream} has other subjects, or no leader",
        )

    def _refused(self, key: int, record: Record, error: _ApiError) -> None:
        if error.err_code == _TOO_LARGE_CODE:
            self._give_up(key, record, len(record.payload) - 1)
        subject = subject_of(self._options.prefix, record.address)
        self._fail(
            Failure.REFUSED,
            f"stream {self._options.stream} refuses {subject}: {error.description} (error {error.err_code})",
        )

    def _fail(self, kind: Failure, reason: str) -> None:
        if self._failure is None:
            self._failure = (kind, reason)
        self._woken.set()

    def _retreat(self, kind: Failure, reason: str) -> None:
        """Publish again from the first record that is not acknowledged on."""
        self._failure = None
        retreat = self._window.retreat()
        if kind is not Failure.DISCONNECTED or retreat.records:
            self.counters.failures[kind] += 1
        if kind is not Failure.DISCONNECTED:
            self._say(reason)
        for name, count in retreat.overtaken.items():
            stream = self._streams.get(name)
            if stream is not None:
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
        now_s = time.monotonic()
        if problem != self._said or now_s - self._said_at_s >= _LOG_EVERY_S:
            self._said, self._said_at_s = problem, now_s
            log.warning("cannot_publish", stream=self._options.stream, reason=problem, waiting=self._spool.waiting)

    def _settle(self, problem: str) -> None:
        if self.problem and not problem:
            log.info("publishing", stream=self._options.stream, waiting=self._spool.waiting)
        self.problem = self._said = problem
        self._complaint = ""

    def _hand_over(self) -> None:
        """Tell the spool's writer what it may forget."""
        through = self._window.through
        if through > self._acknowledged_through:
            self._acknowledged_through = through
            self._spooler.acknowledge(through, dict(self._published))

    async def _beat_for_ever(self, client: Client) -> None:
        while True:
            await self._beat(client)
            await asyncio.sleep(self._options.heartbeat_ms / 1000)

    async def _beat(self, client: Client, *, leaving: bool = False) -> None:
        """A sign of life of each worker of which anything was published."""
        for name, stream in self._streams.items():
            position = self._published.get(name)
            if position is None:
                continue
            is_there = stream.followed.intake.connected and not leaving
            control = Control.ALIVE if is_there else Control.GONE
            headers = numbered(address_headers(self._spool.lineage, stream.address), *position, control)
            await client.publish(subject_of(self._options.alive_prefix, stream.address), b"", "", headers)
            self.counters.beats += 1

    async def _say_goodbye(self, client: Client) -> None:
        self._hand_over()
        if self._finish_at_s is not None and client.is_connected:
            await self._beat(client, leaving=True)
            await client.flush(_GOODBYE_S)


async def _close(client: Client) -> None:
    try:
        async with asyncio.timeout(_GOODBYE_S):
            await client.close()
    except (NatsError, OSError, TimeoutError) as error:
        log.debug("close_failed", error=repr(error))
