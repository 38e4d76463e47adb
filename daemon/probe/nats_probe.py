"""Looks at one bus over NATS for some seconds: the server, the subjects or the stream, and what comes.

Of a stream it takes the last messages as the daemon would: through a consumer that no server has to remember, and that
is deleted afterwards. Nothing is acknowledged, and nobody else misses anything.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from datetime import datetime

import msgspec
from nats import errors
from nats.aio.msg import Msg

from ..config import NatsConfig, SourceType
from ..sources.jetstream_api import create_consumer, delete_consumer, place_of, pull_request, pull_subject, stream_info
from ..sources.nats_bus import subjects_of
from ..sources.nats_connection import NatsConnection, NatsConnector
from ..sources.nats_problems import NatsProblem, whoever
from ..sources.subjects import matches
from .bus_look import BusLook
from .findings import BusFinding, JetStream

LOOK_BACK = 1_000
"""The last messages of a stream that are looked at."""

_LOOK_BACK_BYTES = 32 << 20
_INACTIVE_S = 30.0
_HEARTBEAT_S = 1.0
_TICK_S = 0.02
_FRACTION_DIGITS = 6


class _State(msgspec.Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    first_ts: str = ""


class _Config(msgspec.Struct):
    subjects: list[str] = []
    num_replicas: int = 1
    retention: str = "limits"


class _Cluster(msgspec.Struct):
    leader: str = ""


class _Info(msgspec.Struct):
    config: _Config = msgspec.field(default_factory=_Config)
    state: _State = msgspec.field(default_factory=_State)
    cluster: _Cluster | None = None


async def probe_nats(config: NatsConfig, seconds: float) -> BusFinding:
    """One bus. Whatever is wrong is in the finding."""
    transport = "JetStream" if config.stream else "core NATS"
    finding = BusFinding(config.name, config.type, transport, list(config.connection.servers), seconds=seconds)
    finding.identity = whoever(config.connection)
    look = BusLook(finding, config)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        connection = await NatsConnector(config.connection, f"kvcensus check {config.name}").connect()
    except NatsProblem as problem:
        finding.problem = str(problem)
        return finding
    finding.connected_ms = max(1, round((loop.time() - began) * 1000))
    finding.server, finding.version, finding.tls = connection.url, connection.version_text, connection.uses_tls
    try:
        await _hear_signs_of_life(config, connection, look)
        if config.stream:
            await _look_back(config, connection, look, loop.time() + seconds)
        else:
            await _subscribe(config, connection, look)
        finding.reached = True
        await asyncio.sleep(max(0.0, began + seconds - loop.time()))
        if connection.is_lost:
            finding.reached, finding.problem = False, connection.why_lost()
    except NatsProblem as problem:
        finding.reached, finding.problem = False, str(problem)
    finally:
        await connection.close()
    return look.finish()


async def _hear_signs_of_life(config: NatsConfig, connection: NatsConnection, look: BusLook) -> None:
    """They need no permission to follow a bus, so without it there is only a warning."""
    if config.type is SourceType.DYNAMO or not config.alive_subject:
        return

    async def take(message: Msg) -> None:
        look.sign_of_life(message.subject, message.headers, message.data)

    try:
        await connection.subscribe(config.alive_subject, take, max_messages=LOOK_BACK, max_bytes=0)
    except NatsProblem as problem:
        if connection.is_lost:
            raise
        look.finding.warnings.append(f"no signs of life of relays: {problem}")


async def _subscribe(config: NatsConfig, connection: NatsConnection, look: BusLook) -> None:
    """Raises NatsProblem with every subject that the server refuses."""

    async def take(message: Msg) -> None:
        look.message(message.subject, message.headers, message.data, time.time_ns() // 1_000_000, in_order=True)

    refused = []
    for subject in subjects_of(config):
        try:
            await connection.subscribe(
                subject, take, max_messages=config.pending_max_messages, max_bytes=config.pending_max_bytes
            )
            look.finding.subscribed.append(subject)
        except NatsProblem as problem:
            if connection.is_lost:
                raise
            refused.append(str(problem))
    if refused:
        raise NatsProblem("; ".join(refused))


async def _look_back(config: NatsConfig, connection: NatsConnection, look: BusLook, ends: float) -> None:
    """What there is of the stream, and its last messages. Raises NatsProblem."""
    name = config.stream
    await stream_info(connection, name)
    info = msgspec.json.decode(await connection.request(f"{connection.jetstream}.STREAM.INFO.{name}"), type=_Info)
    state = info.state
    found = JetStream(name, info.config.subjects, state.first_seq, state.last_seq, state.messages, state.bytes)
    found.oldest_s = _age_s(state.first_ts) if state.messages else None
    found.replicas, found.leader = info.config.num_replicas, info.cluster.leader if info.cluster else ""
    look.finding.jetstream = found
    if info.config.retention != "limits":
        raise NatsProblem(
            f"stream {name} has retention {info.config.retention}: it drops messages once somebody has read them; give "
            "it retention limits"
        )
    if not state.messages:
        return
    messages = await _last_messages(connection, name, state, ends)
    found.looked_at = len(messages)
    patterns = subjects_of(config) if config.subjects else (">",)
    for message in messages:
        if any(matches(pattern, message.subject) for pattern in patterns):
            look.message(message.subject, message.headers, message.data, None, in_order=config.subjects == ())
    if messages and not look.finding.messages:
        look.finding.warnings.append(f"none of its last {len(messages)} messages is on {' or '.join(patterns)}")


async def _last_messages(connection: NatsConnection, stream: str, state: _State, ends: float) -> list[Msg]:
    loop = asyncio.get_running_loop()
    start = max(1, state.first_seq, state.last_seq - LOOK_BACK + 1)
    name = f"kvcensus-check-{secrets.token_hex(8)}"
    inbox = connection.client.new_inbox()
    messages: list[Msg] = []
    done = asyncio.Event()

    async def take(message: Msg) -> None:
        place = place_of(message.reply)
        if place is not None:
            messages.append(message)
        elif message.headers and message.headers.get("Status") not in (None, "100"):
            done.set()
        if place is not None and (place.pending == 0 or place.stream_seq >= state.last_seq):
            done.set()

    subscription = await connection.subscribe(inbox, take, max_messages=0, max_bytes=0)
    await create_consumer(connection, stream, name, start, _INACTIVE_S)
    left = max(_HEARTBEAT_S, ends - loop.time())
    request = pull_request(LOOK_BACK, _LOOK_BACK_BYTES, left, min(_HEARTBEAT_S, left / 2))
    await connection.publish(pull_subject(connection, stream, name), request, inbox)
    with suppress(TimeoutError):
        async with asyncio.timeout(left):
            await done.wait()
    await connection.unsubscribe(subscription)
    with suppress(NatsProblem, errors.Error):
        await delete_consumer(connection, stream, name)
    return messages


def _age_s(written: str) -> float | None:
    """The age of a time as Go writes it, with up to nine digits of a second."""
    head, dot, tail = written.removesuffix("Z").partition(".")
    try:
        at = datetime.fromisoformat(f"{head}{dot}{tail[:_FRACTION_DIGITS]}+00:00")
    except ValueError:
        return None
    return max(0.0, time.time() - at.timestamp())
