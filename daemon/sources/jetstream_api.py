"""What is said to JetStream, and what it says: https://docs.nats.io/reference/reference-protocols/nats_api_reference.

Requests and answers are JSON on subjects under `$JS.API`, or `$JS.DOMAIN.API`. A message of a consumer has its place in
its reply subject:

    $JS.ACK.STREAM.CONSUMER.DELIVERED.STREAM_SEQ.CONSUMER_SEQ.TIME.PENDING
    $JS.ACK.DOMAIN.ACCOUNT.STREAM.CONSUMER.DELIVERED.STREAM_SEQ.CONSUMER_SEQ.TIME.PENDING.…
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import msgspec

from .nats_connection import NatsConnection
from .nats_problems import NatsProblem, NoAnswer

_OLDEST_SERVER = (2, 9)
"""Where a consumer can be created with a name, replicas and a place in memory."""
_NO_STREAM = 10059
_NOT_FOR_ACCOUNT = 10039
_NOT_ENABLED = 10076
_NS_PER_S = 1_000_000_000
_PLAIN_TOKENS = 9
_DOMAIN_TOKENS = 11

AnswerT = TypeVar("AnswerT", bound="_Answer")


class ApiError(msgspec.Struct):
    """Why a request was refused."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    error: ApiError | None = None


class StreamState(msgspec.Struct):
    """What a stream has now. A stream without messages has a `first_seq` after its `last_seq`, or both are 0."""

    first_seq: int = 0
    last_seq: int = 0


class StreamConfig(msgspec.Struct):
    """Which messages a stream keeps, and how."""

    retention: str = "limits"
    subjects: list[str] = []


class StreamInfo(_Answer):
    """A stream. `created` names its life: a stream that is deleted and made anew has another one."""

    created: str = ""
    config: StreamConfig = msgspec.field(default_factory=StreamConfig)
    state: StreamState = msgspec.field(default_factory=StreamState)


class _Created(_Answer):
    name: str = ""


class Place(NamedTuple):
    """Where a message stands: in its stream, among those of its consumer, and how many more there are for it.

    `stored_ns` is when the stream got it, in ns since the Unix epoch.
    """

    stream_seq: int
    consumer_seq: int
    pending: int
    stored_ns: int


def place_of(reply: str) -> Place | None:
    """The place of a message, None if it is no consumer's."""
    tokens = reply.split(".")
    if len(tokens) < _PLAIN_TOKENS or tokens[1] != "ACK":
        return None
    at = 5 if len(tokens) < _DOMAIN_TOKENS else 7
    try:
        return Place(int(tokens[at]), int(tokens[at + 1]), int(tokens[at + 3]), int(tokens[at + 2]))
    except (ValueError, IndexError):
        return None


async def stream_info(connection: NatsConnection, stream: str) -> StreamInfo:
    """What there is of a stream. Raises NatsProblem: no such stream, no JetStream, no permission, an old server."""
    if connection.version < _OLDEST_SERVER:
        raise NatsProblem(f"{connection.url} is NATS {connection.version_text}: JetStream is followed from 2.9 on")
    try:
        return await _ask(connection, f"{connection.jetstream}.STREAM.INFO.{stream}", b"", StreamInfo, stream)
    except NoAnswer as error:
        raise NatsProblem(
            f"JetStream is not enabled at {connection.jetstream_place}, or its cluster has no leader: "
            f"nobody answers when asked for stream {stream}"
        ) from error


async def create_consumer(connection: NatsConnection, stream: str, name: str, start: int, inactive_s: float) -> None:
    """A consumer that is asked for messages, from the first one at or after `start` on, and is never told of them.

    It is in memory, on one server, and gone when nothing was asked for `inactive_s`. Raises NatsProblem.
    """
    config = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "none",
        "replay_policy": "instant",
        "inactive_threshold": int(inactive_s * _NS_PER_S),
        "num_replicas": 1,
        "mem_storage": True,
    }
    request = msgspec.json.encode({"stream_name": stream, "config": config})
    await _ask(connection, f"{connection.jetstream}.CONSUMER.CREATE.{stream}.{name}", request, _Created, stream)


async def delete_consumer(connection: NatsConnection, stream: str, name: str) -> None:
    """Raises NatsProblem when it cannot be deleted; it goes by itself later."""
    await _ask(connection, f"{connection.jetstream}.CONSUMER.DELETE.{stream}.{name}", b"", _Answer, stream)


def pull_request(batch: int, max_bytes: int, expires_s: float, heartbeat_s: float) -> bytes:
    """The request for the next messages: it ends with the first limit that is reached."""
    limits = {"batch": batch, "max_bytes": max_bytes}
    waits = {"expires": int(expires_s * _NS_PER_S), "idle_heartbeat": int(heartbeat_s * _NS_PER_S)}
    return msgspec.json.encode(limits | waits)


def pull_subject(connection: NatsConnection, stream: str, consumer: str) -> str:
    return f"{connection.jetstream}.CONSUMER.MSG.NEXT.{stream}.{consumer}"


async def _ask(connection: NatsConnection, subject: str, request: bytes, kind: type[AnswerT], stream: str) -> AnswerT:
    payload = await connection.request(subject, request)
    try:
        answer = msgspec.json.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        raise NatsProblem(f"{connection.url}: the answer on {subject} cannot be read: {error}") from error
    if answer.error is not None:
        raise NatsProblem(_refused(connection, stream, answer.error))
    return answer


def _refused(connection: NatsConnection, stream: str, error: ApiError) -> str:
    if error.err_code == _NO_STREAM:
        return f"{connection.jetstream_place} has no stream {stream}"
    if error.err_code in (_NOT_FOR_ACCOUNT, _NOT_ENABLED):
        return f"JetStream is not enabled at {connection.url} for this account"
    return f"stream {stream} at {connection.url}: {error.description} (error {error.err_code})"
