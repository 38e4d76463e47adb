"""The sockets that receive from one publisher: a SUB with its monitor, opened anew whenever its connection is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from functools import reduce
from operator import or_

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..config import SourceConfig
from ..credentials import CurveKeys, read_curve_keys

BURST_MESSAGES = 256
"""Messages taken from one socket before the others are looked at."""

_HANDSHAKE_FAILED: dict[int, str] = {
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the connection ended in it",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "not the same protocol, or keys that do not fit",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the other side refuses our key",
}
_AT_ONCE = int(zmq.NOBLOCK)
_MONITORED = reduce(or_, _HANDSHAKE_FAILED, zmq.Event.ACCEPTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)


class ZmqOptions(msgspec.Struct, frozen=True):
    """How to reach one publisher. `replay_endpoint` empty: none. Sizes in messages and bytes, times in ms."""

    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""
    bind: bool = False
    receive_hwm: int = 100_000
    max_message_bytes: int = 64 << 20
    reconnect_min_ms: int = 100
    reconnect_max_ms: int = 5_000
    heartbeat_ms: int = 5_000
    curve_server_key_file: str = ""
    curve_secret_key_file: str = ""


def options_of(source: SourceConfig, endpoint: str, replay_endpoint: str = "") -> ZmqOptions:
    """How to reach a publisher of a source."""
    return ZmqOptions(
        endpoint=endpoint,
        replay_endpoint=replay_endpoint,
        topic=source.topic,
        bind=source.bind,
        receive_hwm=source.receive_hwm,
        max_message_bytes=source.max_message_bytes,
        reconnect_min_ms=source.reconnect_min_ms,
        reconnect_max_ms=source.reconnect_max_ms,
        heartbeat_ms=source.heartbeat_ms,
        curve_server_key_file=source.curve_server_key_file,
        curve_secret_key_file=source.curve_secret_key_file,
    )


def curve_of(options: ZmqOptions) -> CurveKeys | None:
    """The keys for a publisher, None without CURVE. Raises CredentialError."""
    if not options.curve_server_key_file:
        return None
    return read_curve_keys(options.curve_server_key_file, options.curve_secret_key_file)


def open_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, options: ZmqOptions, curve: CurveKeys | None
) -> zmq.Socket[bytes]:
    """A socket with the options of a publisher, not connected yet."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvhwm = options.receive_hwm
    socket.maxmsgsize = options.max_message_bytes
    socket.reconnect_ivl = options.reconnect_min_ms
    socket.reconnect_ivl_max = options.reconnect_max_ms
    if curve is not None:
        socket.curve_serverkey = curve.server
        socket.curve_publickey = curve.public
        socket.curve_secretkey = curve.secret
    if options.heartbeat_ms and not options.endpoint.startswith("inproc://"):
        socket.heartbeat_ivl = options.heartbeat_ms
        socket.heartbeat_timeout = 3 * options.heartbeat_ms
    return socket


class Change(Enum):
    """What happened to a connection."""

    MADE = "made"
    LOST = "lost"
    OTHER = "other"
    """To a socket that binds: another one than the publisher's failed or ended."""


class LiveSocket:
    """A SUB socket and its monitor."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], options: ZmqOptions) -> None:
        """Raises zmq.ZMQError for an endpoint that cannot be used, CredentialError for keys that cannot."""
        self.options = options
        self._context = context
        self.topic = options.topic.encode()
        self._curve = curve_of(options)
        self.live, self.monitor = self._open_live()
        self.reopen_at_ms = 0
        self._accepted: dict[int, bool] = {}
        """The connections of a socket that binds, by file descriptor, and whether each may be a publisher's."""
        self._connected_at_ms = 0
        self._wait_ms = options.reconnect_min_ms

    def changes(self) -> Iterator[tuple[Change, str]]:
        """What happened to the connection, in order; with the reason of a failed handshake, "" otherwise.

        Whoever connects to a socket that binds and is no publisher takes nothing away from the one that is. A
        handshake that succeeds does not say whose it was: it may be that of any connection that is open.
        """
        while self.monitor.poll(0):
            message = recv_monitor_message(self.monitor)
            event, descriptor = message["event"], message["value"]
            if event == zmq.Event.ACCEPTED:
                self._accepted[descriptor] = False
            elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._accepted = dict.fromkeys(self._accepted, True)
                yield Change.MADE, ""
            else:
                ended = event == zmq.Event.DISCONNECTED and self._accepted.pop(descriptor, False)
                is_last = ended and not any(self._accepted.values())
                lost = is_last or not self.options.bind
                yield Change.LOST if lost else Change.OTHER, _HANDSHAKE_FAILED.get(event, "")

    def _open_live(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        live = self.socket(zmq.SUB)
        live.setsockopt(zmq.SUBSCRIBE, self.topic)
        monitor = live.get_monitor_socket(_MONITORED)
        try:
            if self.options.bind:
                live.bind(self.options.endpoint)
            else:
                live.connect(self.options.endpoint)
        except zmq.ZMQError:
            self._close_live(live, monitor)
            raise
        return live, monitor

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket with the options of this publisher."""
        return open_socket(self._context, kind, self.options, self._curve)

    def connected(self, now: int) -> None:
        """The connection is there."""
        self.reopen_at_ms = 0
        self._connected_at_ms = now

    def disconnected(self, now: int) -> None:
        """libzmq reconnects after a lost connection, but not after a message that broke the protocol or the size limit.

        A new socket always does. A publisher that breaks each new connection at once is tried ever more slowly.
        """
        if self.options.bind:
            return
        lasted_ms = now - self._connected_at_ms
        least, most = self.options.reconnect_min_ms, self.options.reconnect_max_ms
        self._wait_ms = least if lasted_ms > most else min(most, 2 * self._wait_ms)
        self.reopen_at_ms = now + self._wait_ms

    def drop_received(self) -> None:
        """Throw away what was received and not read."""
        with suppress(zmq.Again):
            for _ in range(self.options.receive_hwm):
                receive(self.live)

    def reopen(self) -> None:
        """Connect anew, with a new socket."""
        self.reopen_at_ms = 0
        self._close_live(self.live, self.monitor)
        self.live, self.monitor = self._open_live()

    @staticmethod
    def _close_live(live: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        live.disable_monitor()
        monitor.close()
        live.close()

    def close(self) -> None:
        """Close every socket."""
        self._close_live(self.live, self.monitor)


def receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    """The frames of the next message, without waiting. Raises zmq.Again when there is none.

    `recv_multipart` asks the socket after each frame whether more follow, which costs more than the frames do.
    """
    frame = socket.recv(_AT_ONCE, copy=False)
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(_AT_ONCE, copy=False)
        frames.append(frame.bytes)
    return frames
