"""Receives what engines publish over ZMQ, for as long as it runs, and asks them nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import zmq

from ..config import SourceConfig
from ..config.endpoints import Endpoint
from ..followed import monotonic_ms
from ..sources.zmq_sockets import BURST_MESSAGES, Change, LiveSocket, options_of, receive
from .inbox import Inbox, Incoming

_POLL_MS = 100


def follow_zmq(source: SourceConfig, inbox: Inbox, note: Callable[[str], None], ended: threading.Event) -> None:
    """Put every message into the inbox until `ended`; `note` is told of connections. What is wrong fails the inbox."""
    endpoints = [stream.endpoint for stream in source.streams()] or [str(Endpoint.parse(source.endpoint))]
    note(f"{'waiting at' if source.bind else 'connecting to'} {' '.join(endpoints)}")
    with zmq.Context() as context:
        live: list[LiveSocket] = []
        try:
            live.extend(LiveSocket(context, options_of(source, endpoint)) for endpoint in endpoints)
            while not ended.is_set():
                _turn(live, inbox, note)
        except Exception as failure:  # noqa: BLE001 - whoever reads the inbox raises it
            inbox.fail(failure)
        finally:
            for one in live:
                one.close()


def _turn(live: list[LiveSocket], inbox: Inbox, note: Callable[[str], None]) -> None:
    poller = zmq.Poller()
    for one in live:
        poller.register(one.live, zmq.POLLIN)
        poller.register(one.monitor, zmq.POLLIN)
    poller.poll(_POLL_MS)
    now = monotonic_ms()
    for one in live:
        endpoint = one.options.endpoint
        for change, failed in one.changes():
            if change is Change.MADE:
                note(f"connected to {endpoint}")
                one.connected(now)
            elif change is Change.LOST or failed:
                note(f"{endpoint}: {failed or 'the connection is lost'}; trying again")
                one.disconnected(now)
        if 0 < one.reopen_at_ms <= now:
            one.reopen()
        else:
            _take(one.live, endpoint, inbox)


def _take(socket: zmq.Socket[bytes], endpoint: str, inbox: Inbox) -> None:
    for _ in range(BURST_MESSAGES):
        try:
            frames = receive(socket)
        except zmq.Again:
            return
        inbox.put(Incoming(time.time_ns() // 1_000_000, frames, endpoint))
