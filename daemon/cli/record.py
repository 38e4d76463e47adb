"""`kvcensus record`: the raw messages of a live stream, to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import zmq

from ..config import SourceConfig
from ..config.errors import InvalidValue
from ..recording import RecordedMessage, RecordingError, RecordingWriter
from .ending import EXIT_IO, Failure, sigterm_ends
from .progress import progress

_POLL_MS = 100
_DEFAULTS = SourceConfig(endpoint="tcp://localhost:5557")


@click.command()
@click.argument("endpoint")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--bind", is_flag=True, help="Bind ENDPOINT, for an engine that connects.")
@click.option("--topic", default="", help="Only topics that start with this.")
@click.option("--duration", "duration_s", type=click.FloatRange(min=0), help="Stop after so many seconds.")
@click.option("--max-messages", type=click.IntRange(min=1), help="Stop after so many messages.")
@click.option(
    "--receive-hwm",
    type=click.IntRange(min=1),
    default=_DEFAULTS.receive_hwm,
    show_default=True,
    help="Messages that ZMQ may hold while the disk is slow.",
)
def record(
    endpoint: str,
    output: Path,
    bind: bool,
    topic: str,
    duration_s: float | None,
    max_messages: int | None,
    receive_hwm: int,
) -> None:
    """Record what an engine publishes at ENDPOINT to OUTPUT, until a signal.

    OUTPUT is gzip when its name ends in .gz, and is never overwritten. It can be read while it is written.
    """
    try:
        source = SourceConfig(endpoint=endpoint, bind=bind, topic=topic, receive_hwm=receive_hwm)
    except InvalidValue as error:
        raise click.BadParameter(error.reason, param_hint="ENDPOINT") from error
    summary = _Summary()
    try:
        with sigterm_ends(), RecordingWriter(output) as writer, progress("recording", max_messages) as advance:
            for message in _messages(source, duration_s):
                if message is None:
                    writer.flush_if_due()
                    continue
                writer.write(message)
                summary.add(message)
                advance(1)
                if summary.messages == max_messages:
                    break
    except RecordingError as error:
        raise Failure(str(error), EXIT_IO) from error
    finally:
        click.echo(f"{output}: {summary}", err=True)


def _messages(source: SourceConfig, duration_s: float | None) -> Iterator[RecordedMessage | None]:
    """Messages as they come, None now and then while none comes. Raises Failure."""
    ends = time.monotonic() + duration_s if duration_s is not None else None
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.rcvhwm = source.receive_hwm
        socket.maxmsgsize = source.max_message_bytes
        socket.reconnect_ivl = source.reconnect_min_ms
        socket.reconnect_ivl_max = source.reconnect_max_ms
        socket.heartbeat_ivl = source.heartbeat_ms
        socket.subscribe(source.topic.encode())
        try:
            (socket.bind if source.bind else socket.connect)(source.endpoint)
        except zmq.ZMQError as error:
            raise Failure(f"{source.endpoint}: {error.strerror}", EXIT_IO) from error
        while ends is None or time.monotonic() < ends:
            if socket.poll(_POLL_MS):
                yield RecordedMessage(received_ns=time.time_ns(), frames=tuple(socket.recv_multipart()))
            else:
                yield None


class _Summary:
    """What was recorded, and what seems to be missing in it."""

    def __init__(self) -> None:
        self.messages = 0
        self._missing = 0
        self._restarts = 0
        self._last: int | None = None

    def add(self, message: RecordedMessage) -> None:
        self.messages += 1
        seq = message.seq
        if seq is None:
            return
        if self._last is not None:
            self._missing += max(0, seq - self._last - 1)
            self._restarts += seq <= self._last
        self._last = seq

    def __str__(self) -> str:
        return f"{self.messages} messages, {self._missing} missing, {self._restarts} restarts"
