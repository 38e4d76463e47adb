"""The JetStream stream that the relay publishes to: whether it is there, and making it if the configuration says so."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ..logs import get_logger
from ..sources.nats_connection import NatsConnection
from ..sources.nats_problems import NatsProblem, NoAnswer
from .convention import every_subject

_NOT_FOUND = 404
_ASK_S = 1.0
"""How long to wait for what a server says of a stream: nothing is published meanwhile."""
_NS = 1_000_000_000

log = get_logger("relay")


class StreamOptions(msgspec.Struct, frozen=True):
    """The stream `name`, and what to make of it where it is missing. 0: no limit."""

    name: str
    prefix: str
    create: bool
    max_age_s: int
    max_bytes: int
    replicas: int
    duplicates_s: int


class _Error(msgspec.Struct):
    code: int
    err_code: int = 0
    description: str = ""


class _Config(msgspec.Struct):
    num_replicas: int = 0


class _Answer(msgspec.Struct):
    error: _Error | None = None
    config: _Config = msgspec.field(default_factory=_Config)


class RelayStream:
    """Looks after the stream on each connection, and says what is wrong with it."""

    def __init__(self, options: StreamOptions) -> None:
        self._options = options
        self.replicas = 0
        """How many servers keep the stream, 0 while that is not known."""

    async def prepare(self, connection: NatsConnection) -> None:
        """Make the stream if it is missing and may be made. Raises NatsProblem when it is not there then."""
        name = self._options.name
        self.replicas = 0
        try:
            async with asyncio.timeout(_ASK_S):
                found = await self._ask(connection, "INFO", b"")
        except NoAnswer as error:
            raise NatsProblem(f"{connection.jetstream_place} has no JetStream, or no leader for it") from error
        except (NatsProblem, TimeoutError) as problem:
            if connection.is_lost:
                raise NatsProblem(connection.why_lost()) from problem
            # Whoever may only publish needs no permission to ask, and without a leader nobody answers.
            log.debug("stream_not_asked_for", stream=name, reason=str(problem))
            return
        if found is None:
            return
        if found.code != _NOT_FOUND:
            raise NatsProblem(f"stream {name}: {_sentence(found)}")
        if not self._options.create:
            where = connection.jetstream_place
            raise NatsProblem(f"there is no stream {name} at {where}: make it, or set create_stream = true")
        refused = await self._ask(connection, "CREATE", msgspec.json.encode(self._config()))
        if refused is not None:
            raise NatsProblem(f"stream {name} cannot be made: {_sentence(refused)}")
        log.info("stream_made", stream=name, subjects=[every_subject(self._options.prefix)])

    async def _ask(self, connection: NatsConnection, what: str, body: bytes) -> _Error | None:
        answer = await connection.request(f"{connection.jetstream}.STREAM.{what}.{self._options.name}", body)
        found = msgspec.json.decode(answer, type=_Answer)
        self.replicas = found.config.num_replicas
        return found.error

    def _config(self) -> dict[str, Any]:
        options = self._options
        return {
            "name": options.name,
            "subjects": [every_subject(options.prefix)],
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "max_age": options.max_age_s * _NS,
            "max_bytes": options.max_bytes or -1,
            "num_replicas": options.replicas,
            "duplicate_window": options.duplicates_s * _NS,
        }

    def not_taken(self, subject: str) -> str:
        """Nobody answered a message."""
        return f"no JetStream stream takes {subject}: {self._options.name} has other subjects, or no leader now"

    def refused(self, subject: str, code: int, description: str) -> str:
        """The server answered a message with an error."""
        return f"stream {self._options.name} does not take {subject}: {description} (error {code})"


def _sentence(error: _Error) -> str:
    return f"{error.description} (error {error.err_code or error.code})"
