"""Receives what passes on the subjects of a bus: a plain subscriber, with no consumer and nothing acknowledged.

What goes into a stream of JetStream passes on its subjects like everything else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from nats.aio.msg import Msg

from ..config import NatsConfig
from ..sources.jetstream_api import stream_info
from ..sources.nats_bus import subjects_of
from ..sources.nats_connection import Backoff, NatsConnection, NatsConnector
from ..sources.nats_problems import NatsProblem
from .inbox import BYTES_MAX, MESSAGES_MAX, Inbox, Incoming

_LOOK_S = 0.1


def follow_nats(config: NatsConfig, inbox: Inbox, note: Callable[[str], None], ended: threading.Event) -> None:
    """Put every message into the inbox until `ended`. A first connection that fails, fails the inbox."""
    try:
        asyncio.run(_follow(config, inbox, note, ended))
    except Exception as failure:  # noqa: BLE001 - whoever reads the inbox raises it
        inbox.fail(failure)


async def _follow(config: NatsConfig, inbox: Inbox, note: Callable[[str], None], ended: threading.Event) -> None:
    connector = NatsConnector(config.connection, "kvcensus tap")
    backoff = Backoff(config.connection)
    was_there = False
    while not ended.is_set():
        try:
            connection = await connector.connect()
            try:
                subjects = await _subscribe(config, connection, inbox)
                was_there = True
                backoff.reset()
                note(f"connected to {connection.url}, following {' '.join(subjects)}")
                while not ended.is_set() and not connection.is_lost:
                    await asyncio.sleep(_LOOK_S)
                if connection.is_lost:
                    raise NatsProblem(connection.why_lost())
            finally:
                await connection.close()
        except NatsProblem as problem:
            if not was_there:
                raise
            note(f"{problem}; trying again")
            await asyncio.sleep(backoff.next_s())


async def _subscribe(config: NatsConfig, connection: NatsConnection, inbox: Inbox) -> list[str]:
    """The subjects that are followed: those that were asked for, those of the stream, or the usual ones."""

    async def take(message: Msg) -> None:
        headers = dict(message.headers) if message.headers else None
        inbox.put(Incoming(time.time_ns() // 1_000_000, [message.data], "", message.subject, headers))

    subjects = list(subjects_of(config))
    if config.stream and not config.subjects:
        subjects = (await stream_info(connection, config.stream)).config.subjects
    for subject in subjects:
        await connection.subscribe(subject, take, max_messages=MESSAGES_MAX, max_bytes=BYTES_MAX)
    return subjects
