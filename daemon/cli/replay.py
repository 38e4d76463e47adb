"""`kvcensus replay`: a recording, published as an engine would."""

from __future__ import annotations

import threading
from pathlib import Path

import click
import msgspec
import zmq

from ..config.endpoints import Endpoint
from ..engine_replay import ReplayedEngine
from ..engine_sockets import BUFFER_STEPS, ReplayFraming
from ..recording import Recording, RecordingError
from .ending import EXIT_DATA, EXIT_IO, EXIT_UNAVAILABLE, Failure, signals_set

_ANY_PORT = "tcp://127.0.0.1:0"
_LINGER_MS = 2000
"""How long the last messages may take to leave, once the process ends."""
_WAIT_STEP_S = 0.1


def _lives(ctx: click.Context, option: click.Parameter, text: str) -> int | None:
    """How often to play; None is for ever."""
    if text == "forever":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of at least 1 nor `forever`")
    return int(text)


def _endpoint(ctx: click.Context, option: click.Parameter, text: str) -> str:
    try:
        return str(Endpoint.parse(text)) if text else ""
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("recording", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--bind", callback=_endpoint, metavar="ENDPOINT", default=_ANY_PORT, show_default=True, help="Publish here."
)
@click.option(
    "--connect",
    callback=_endpoint,
    metavar="ENDPOINT",
    default="",
    help="Publish to a consumer that binds here, instead.",
)
@click.option(
    "--replay-bind",
    callback=_endpoint,
    metavar="ENDPOINT",
    default=_ANY_PORT,
    show_default=True,
    help='Answer replays here; "" for none.',
)
@click.option(
    "--replay-framing", type=click.Choice([str(one) for one in ReplayFraming]), default="new", show_default=True
)
@click.option(
    "--buffer-steps",
    type=click.IntRange(min=0),
    default=BUFFER_STEPS,
    show_default=True,
    help="Messages kept for replay.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Factor of the recorded pace; 0 is as fast as it goes.",
)
@click.option(
    "--loop",
    "lives",
    callback=_lives,
    metavar="N|forever",
    default="1",
    show_default=True,
    help="Play so often; each time is a new engine life.",
)
@click.option(
    "--restart-pause-ms",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Silence of each restart, between lives and within the recording.",
)
@click.option(
    "--wait-subscribers",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Begin with so many subscribers.",
)
@click.option(
    "--wait-timeout-seconds",
    "wait_timeout_s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Give up when they do not come.",
)
@click.option(
    "--fresh-timestamps",
    is_flag=True,
    help="Give each batch the present time, as a live engine does. Always so from the second life on.",
)
@click.option(
    "--linger-seconds",
    "linger_s",
    type=click.FloatRange(min=0),
    help="End so long after the last message, instead of answering replays until a signal.",
)
def replay(
    recording: Path,
    bind: str,
    connect: str,
    replay_bind: str,
    replay_framing: str,
    buffer_steps: int,
    speed: float,
    lives: int | None,
    restart_pause_ms: int,
    wait_subscribers: int,
    wait_timeout_s: float,
    fresh_timestamps: bool,
    linger_s: float | None,
) -> None:
    """Publish RECORDING as an engine would: its sequence numbers live, and past messages on request.

    Prints one JSON line with the endpoints, then waits for subscribers, plays, and answers replays until a signal.
    """
    stopping = threading.Event()
    try:
        engine = ReplayedEngine(
            Recording(recording),
            live=connect or bind,
            live_binds=not connect,
            replay_bind=replay_bind,
            buffer_steps=buffer_steps,
            framing=ReplayFraming(replay_framing),
            fresh_timestamps=fresh_timestamps,
        )
    except zmq.ZMQError as error:
        raise Failure(f"{connect or bind}, {replay_bind}: {error.strerror}", EXIT_IO) from error
    engine.start()
    try:
        with signals_set(stopping):
            addresses = {"endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
            click.echo(msgspec.json.encode(addresses))
            _wait(engine, wait_subscribers, wait_timeout_s, stopping)
            engine.play(speed=speed, lives=lives, restart_pause_s=restart_pause_ms / 1000, stopping=stopping)
            if not stopping.is_set():
                click.echo(f"published {engine.published_count} messages", err=True)
            stopping.wait(linger_s)
    except RecordingError as error:
        raise Failure(str(error), EXIT_DATA) from error
    finally:
        engine.stop(_LINGER_MS)


def _wait(engine: ReplayedEngine, count: int, timeout_s: float, stopping: threading.Event) -> None:
    waited_s = 0.0
    while not stopping.is_set() and not engine.wait_subscribers(count, _WAIT_STEP_S):
        waited_s += _WAIT_STEP_S
        if waited_s >= timeout_s:
            raise Failure(f"{engine.subscribers} of {count} subscribers after {timeout_s:g} s", EXIT_UNAVAILABLE)
