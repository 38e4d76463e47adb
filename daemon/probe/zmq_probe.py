"""Looks at one publisher over ZMQ for some seconds: its live socket, and what its replay socket answers.

The replay socket is asked for what comes after everything, which costs the engine nothing, and for everything, of which
only the first message is taken: the engine still hands what its socket takes to the network, as it does whenever a
daemon starts. Only where the engine is idle is it asked where its messages end: some 17 questions, with at most all of
its messages in answer.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..config import SourceConfig, StreamConfig
from ..config.endpoints import Endpoint
from ..credentials import CredentialError
from ..followed import monotonic_ms
from ..sources.zmq_sockets import BURST_MESSAGES, Change, LiveSocket, ZmqOptions, curve_of, open_socket, options_of
from .bus_look import BusLook
from .findings import BusFinding, Replay, StreamFinding
from .reaching import why_not_reached
from .stream_look import StreamLook

ZmqContext = zmq.Context[zmq.Socket[bytes]]
Receive = Callable[[list[bytes], int], None]

_POLL_MS = 20
_END_OF_REPLAY = b"\xff" * 8
_PAST_THE_END = (1 << 63) - 1
_RING_MAX = 1 << 17
"""Messages among which the newest one is looked for: engines keep 10,000 by default."""
_NEWEST_S = 5.0
_TOPIC_FRAMES = 4


class _Contact(NamedTuple):
    """Whether there was a publisher. `problem` is what was wrong, in a sentence."""

    connected_ms: int | None
    publishers: int
    problem: str


class _Answer(NamedTuple):
    """The first frames of a reply, None when none came. `connected`: something that replays is there."""

    frames: list[bytes] | None
    connected: bool
    ms: int
    problem: str = ""

    @property
    def seq(self) -> int | None:
        """The number of the first message, None for an end marker and for no answer."""
        frames = self.frames
        return None if frames is None or frames[-2] == _END_OF_REPLAY else int.from_bytes(frames[-2], "big")

    @property
    def topic(self) -> bool:
        return self.frames is not None and len(self.frames) >= _TOPIC_FRAMES


def probe_stream(context: ZmqContext, source: SourceConfig, stream: StreamConfig, seconds: float) -> StreamFinding:
    """One stream of an engine."""
    finding = StreamFinding(stream.stream, source.type, stream.endpoint, source.bind, seconds=seconds)
    look = StreamLook(finding, source, stream.rank)
    options = options_of(source, stream.endpoint, stream.replay_endpoint)
    first: list[bytes] = []
    asking = threading.Thread(target=lambda: first.extend(_ask_replay(context, options, finding, seconds)), daemon=True)
    if options.replay_endpoint:
        finding.replay = Replay(options.replay_endpoint)
        asking.start()
    contact = _listen(context, options, seconds, look.live)
    finding.connected_ms, finding.publishers, finding.problem = contact
    finding.reached = contact.publishers > 0
    if finding.replay is not None:
        asking.join()
        _find_newest(context, options, finding)
        finding.reached = finding.reached and finding.replay.reached
    for payload in first:
        look.replayed(payload)
    return look.finish()


def probe_bus(context: ZmqContext, source: SourceConfig, seconds: float) -> BusFinding:
    """Dynamo's event plane over ZMQ."""
    endpoint = str(Endpoint.parse(source.endpoint))
    finding = BusFinding(source.name, source.type, "ZMQ", [endpoint], seconds=seconds)
    look = BusLook(finding, source)
    contact = _listen(context, options_of(source, endpoint), seconds, look.frames)
    finding.connected_ms, connections, finding.problem = contact
    finding.reached = connections > 0
    return look.finish()


def _listen(context: ZmqContext, options: ZmqOptions, seconds: float, receive: Receive) -> _Contact:
    """Take live messages until the time is over. `receive` gets the frames, and the time in ms since the Unix epoch."""
    began = time.monotonic()
    try:
        live = LiveSocket(context, options)
    except (zmq.ZMQError, CredentialError) as error:
        return _Contact(None, 0, _unusable(options.endpoint, error))
    connected_ms, publishers, problem = None, 0, ""
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            poller = zmq.Poller()
            poller.register(live.live, zmq.POLLIN)
            poller.register(live.monitor, zmq.POLLIN)
            poller.poll(min(_POLL_MS, ceil(left * 1000)))
            now = monotonic_ms()
            for change, failed in live.changes():
                if change is Change.MADE:
                    publishers += 1
                    connected_ms = connected_ms or max(1, round((time.monotonic() - began) * 1000))
                    live.connected(now)
                elif change is Change.LOST or not publishers:
                    problem = _lost(options, failed, publishers)
                    live.disconnected(now)
            if 0 < live.reopen_at_ms <= now:
                live.reopen()
                continue
            _take(live.live, receive)
    finally:
        live.close()
    if not publishers and not problem:
        problem = _nobody(options, seconds)
    return _Contact(connected_ms, publishers, problem)


def _take(live: zmq.Socket[bytes], receive: Receive) -> None:
    for _ in range(BURST_MESSAGES):
        try:
            frames = live.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        receive(frames, time.time_ns() // 1_000_000)


def _lost(options: ZmqOptions, failed: str, publishers: int) -> str:
    endpoint = options.endpoint
    if publishers:
        return f"{endpoint}: the connection was lost in the meantime"
    if options.bind:
        return f"{endpoint}: what connected is no publisher" + (f": {failed}" if failed else "")
    if failed:
        return f"{endpoint}: the handshake failed: {failed}"
    return f"{endpoint} is another kind of ZMQ socket and no publisher: is it the replay endpoint?"


def _nobody(options: ZmqOptions, seconds: float) -> str:
    if not options.bind:
        return why_not_reached(options.endpoint)
    return (
        f"nobody connected to {options.endpoint} within {seconds:g} s: the engine's endpoint must name this machine "
        "and this port, and have neither * nor ::"
    )


def _unusable(endpoint: str, error: Exception) -> str:
    if isinstance(error, zmq.ZMQError) and error.errno == errno.EADDRINUSE:
        return f"{endpoint} is taken: a daemon that runs with this configuration has it"
    return f"{endpoint}: {error}"


# Replay


def _ask_replay(context: ZmqContext, options: ZmqOptions, finding: StreamFinding, seconds: float) -> list[bytes]:
    """Fill in what the replay socket answers. Returns the payload of its oldest message, if it gave one."""
    replay = finding.replay
    assert replay is not None
    ends = time.monotonic() + seconds
    end = _ask(context, options, _PAST_THE_END, ends)
    if end.frames is None:
        replay.problem = end.problem or _no_answer(options.replay_endpoint, end.connected, seconds)
        return []
    replay.reached, replay.answered_ms, replay.topic = True, end.ms, end.topic
    oldest = _ask(context, options, 0, ends)
    if oldest.frames is None:
        replay.problem = f"{options.replay_endpoint} answered, and was busy when it was asked for its oldest message"
        return []
    replay.oldest = replay.newest = oldest.seq
    return [] if oldest.seq is None else [oldest.frames[-1]]


def _no_answer(endpoint: str, connected: bool, seconds: float) -> str:
    if not connected:
        return why_not_reached(endpoint)
    return (
        f"{endpoint} takes requests and answers none within {seconds:g} s: a busy engine answers between its steps, so "
        "try a longer --probe-s, and give the source a longer replay_timeout_ms"
    )


def _find_newest(context: ZmqContext, options: ZmqOptions, finding: StreamFinding) -> None:
    """The number of the newest message: that of the last live one, or, of an idle engine, by halving."""
    replay = finding.replay
    if replay is None or replay.oldest is None:
        return
    if finding.numbers is not None:
        replay.newest = finding.numbers.last
        return
    newest, step, ends = replay.oldest, _RING_MAX, time.monotonic() + _NEWEST_S
    while step := step // 2:
        answer = _ask(context, options, newest + step, ends)
        if answer.frames is None:
            replay.newest = None
            return
        newest = newest if answer.seq is None else answer.seq
    replay.newest = newest


def _ask(context: ZmqContext, options: ZmqOptions, start: int, ends: float) -> _Answer:
    """Ask for the messages from `start` on, and take the first frames of the reply only."""
    began = time.monotonic()
    try:
        socket = open_socket(context, zmq.DEALER, options, curve_of(options))
    except CredentialError as error:
        return _Answer(None, False, 0, str(error))
    socket.rcvhwm = 1
    monitor = socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
    connected, problem = False, ""
    try:
        socket.connect(options.replay_endpoint)
        socket.send_multipart([b"", start.to_bytes(8, "big")])
        while (left := ends - time.monotonic()) > 0:
            if socket.poll(min(_POLL_MS, ceil(left * 1000))):
                frames = socket.recv_multipart()
                if len(frames) >= 2 and len(frames[-2]) == len(_END_OF_REPLAY):
                    return _Answer(frames, True, max(1, round((time.monotonic() - began) * 1000)))
                problem = f"{options.replay_endpoint} answers with something else than an engine does"
            while monitor.poll(0):
                made = recv_monitor_message(monitor)["event"] == zmq.Event.HANDSHAKE_SUCCEEDED
                if not made and not connected:
                    where = options.replay_endpoint
                    problem = f"{where} is another kind of ZMQ socket and replays nothing: is it the live endpoint?"
                connected = connected or made
        return _Answer(None, connected, 0, problem)
    except zmq.ZMQError as error:
        return _Answer(None, False, 0, f"{options.replay_endpoint}: {error}")
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close()
