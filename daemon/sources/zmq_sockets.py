"""The sockets that receive from one publisher: a SUB with its monitor, opened anew whenever its connection is lost."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import reduce
from operator import or_

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..credentials import read_curve_keys

BURST_MESSAGES = 256
"""Messages taken from one socket before the others are looked at."""

_HANDSHAKE_FAILED: dict[int, str] = {
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the connection ended in it",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "not the same protocol, or keys that do not fit",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the other side refuses our key",
}
_MONITORED = reduce(or_, _HANDSHAKE_FAILED, zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)


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


class Change(Enum):
    """What happened to a connection."""

    MADE = "made"
    LOST = "lost"


class LiveSocket:
    """A SUB socket and its monitor."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], options: ZmqOptions) -> None:
        """Raises zmq.ZMQError for an endpoint that cannot be used, CredentialError for keys that cannot."""
        self.options = options
        self._context = context
        self.topic = options.topic.encode()
        self._curve = (
            read_curve_keys(options.curve_server_key_file, options.curve_secret_key_file)
            if options.curve_server_key_file
            else None
        )
        self.live, self.monitor = self._open_live()
        self.reopen_at_ms = 0
        self._connected_at_ms = 0
        self._wait_ms = options.reconnect_min_ms

    def changes(self) -> Iterator[tuple[Change, str]]:
        """What happened to the connection, in order; with the reason of a failed handshake, "" otherwise."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                yield Change.MADE, ""
            else:
                yield Change.LOST, _HANDSHAKE_FAILED.get(event, "")

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
        options = self.options
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = options.receive_hwm
        socket.maxmsgsize = options.max_message_bytes
        socket.reconnect_ivl = options.reconnect_min_ms
        socket.reconnect_ivl_max = options.reconnect_max_ms
        if self._curve is not None:
            socket.curve_serverkey = self._curve.server
            socket.curve_publickey = self._curve.public
            socket.curve_secretkey = self._curve.secret
        if options.heartbeat_ms and not options.endpoint.startswith("inproc://"):
            socket.heartbeat_ivl = options.heartbeat_ms
            socket.heartbeat_timeout = 3 * options.heartbeat_ms
        return socket

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
