"""`kvcensus tap`: the events of a stream as they pass."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .ending import EXIT_CONFIG, EXIT_DATA, EXIT_IO, EXIT_UNAVAILABLE, Failure, sigterm_ends

if TYPE_CHECKING:
    from ..config import NatsConfig, SourceConfig
    from ..tap.inbox import Inbox, Incoming
    from ..tap.wording import Wanted

_WAIT_S = 0.1


@click.command()
@click.argument("what", metavar="[ENDPOINT|FILE|NAME]", required=False)
@click.option("--bind", is_flag=True, help="Bind ENDPOINT, for an engine that connects.")
@click.option("--topic", default="", help="Only topics that start with this.")
@click.option("--engine-type", type=click.Choice(["vllm", "sglang", "dynamo"]), default="vllm", show_default=True)
@click.option("--nats", "servers", multiple=True, metavar="URL", help="A server whose bus is tapped; may repeat.")
@click.option("--stream", default="", help="Tap the subjects of this JetStream stream.")
@click.option("--subject", "subjects", multiple=True, help="Tap this subject; may repeat.")
@click.option("--credentials", default="", metavar="FILE", help="File with a user's JWT and seed, for NATS.")
@click.option(
    "--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="NAME is a source or bus of it."
)
@click.option("--event", "events", multiple=True, type=click.Choice(["store", "remove", "clear"]), help="May repeat.")
@click.option("--hash", "hashes", default="", metavar="HEX", help="Only blocks, or parents, whose hash begins so.")
@click.option("--worker", default="", metavar="NAME", help="Only this worker: NAME, or NAME/RANK.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this data-parallel rank.")
@click.option("--tier", default="", help="Only this tier, or medium in an engine's spelling.")
@click.option("--raw", is_flag=True, help="The payloads as they are, msgpack as JSON. They hold the tokens of users.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, as without a terminal.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many lines.")
@click.option("--duration", "duration_s", type=click.FloatRange(min=0), help="End after so many seconds.")
def tap(
    what: str | None,
    bind: bool,
    topic: str,
    engine_type: str,
    servers: tuple[str, ...],
    stream: str,
    subjects: tuple[str, ...],
    credentials: str,
    path: Path | None,
    events: tuple[str, ...],
    hashes: str,
    worker: str,
    rank: int | None,
    tier: str,
    raw: bool,
    as_json: bool,
    count: int | None,
    duration_s: float | None,
) -> None:
    """Print the events of a live stream, a bus or a recording as the index would apply them, until a signal.

    Give ENDPOINT (tcp:// or ipc://), the FILE of a recording, --nats, or --config and the NAME of a source or bus.
    """
    if raw and (events or hashes or tier):
        raise click.UsageError("--raw shows whole payloads: --event, --hash and --tier do not go with it")
    if path is not None:
        config = _configured(path, what)
    else:
        config = _from_options(what, bind, topic, engine_type, servers, stream, subjects, credentials)
    wanted = _wanted(events, hashes, worker, rank, tier, config)
    recording = Path(what) if what and path is None and not servers and "://" not in what else None
    from ..tap.decoding import Kind, Seen, Tap

    decoded = Tap(config, raw=raw)
    show = _printer(as_json or not sys.stdout.isatty(), wanted, count)
    with sigterm_ends():
        for message in _recorded(recording) if recording else _live(config, duration_s):
            if isinstance(message, int):
                detail = f"{message} messages were dropped here: this terminal is too slow"
                lines: Iterator[Seen] = iter([Seen(time.time_ns() // 1_000_000, Kind.GAP, "", detail=detail)])
            else:
                lines = decoded.see(message)
            if not all(show(seen) for seen in lines):
                return


def _printer(as_json: bool, wanted: Wanted, count: int | None) -> Callable[..., bool]:
    """Prints what is wanted of what it is given. It returns False when that is enough."""
    from ..tap.decoding import Seen
    from ..tap.wording import json_of, line_of, style_of

    printed = 0

    def show(seen: Seen) -> bool:
        nonlocal printed
        if not wanted.wants(seen):
            return True
        click.echo(json_of(seen) if as_json else click.style(line_of(seen), fg=style_of(seen) or None))
        printed += 1
        return printed != count

    return show


def _recorded(path: Path) -> Iterator[Incoming]:
    from ..recording import Recording, RecordingError
    from ..tap.inbox import Incoming

    try:
        for one in Recording(path):
            yield Incoming(one.received_ns // 1_000_000, list(one.frames))
    except RecordingError as error:
        raise Failure(str(error), EXIT_DATA if error.line else EXIT_IO) from error


def _live(config: SourceConfig | NatsConfig, duration_s: float | None) -> Iterator[Incoming | int]:
    """Messages as they come, and how many were dropped, as a number. Raises Failure."""
    from ..config import SourceConfig
    from ..tap.inbox import Inbox

    inbox, ended = Inbox(), threading.Event()
    if isinstance(config, SourceConfig):
        from ..tap.zmq_feed import follow_zmq

        thread = threading.Thread(target=follow_zmq, args=(config, inbox, _note, ended), daemon=True)
    else:
        from ..tap.nats_feed import follow_nats

        thread = threading.Thread(target=follow_nats, args=(config, inbox, _note, ended), daemon=True)
    thread.start()
    try:
        yield from _received(inbox, duration_s)
    finally:
        ended.set()
        thread.join(5)


def _received(inbox: Inbox, duration_s: float | None) -> Iterator[Incoming | int]:
    from zmq import ZMQError

    from ..credentials import CredentialError
    from ..sources.nats_problems import NatsProblem

    ends = time.monotonic() + duration_s if duration_s is not None else None
    while ends is None or time.monotonic() < ends:
        try:
            message = inbox.get(_WAIT_S)
        except (ZMQError, CredentialError) as error:
            raise Failure(str(error), EXIT_IO) from error
        except NatsProblem as error:
            raise Failure(str(error), EXIT_UNAVAILABLE) from error
        if dropped := inbox.dropped():
            yield dropped
        if message is not None:
            yield message


def _note(text: str) -> None:
    click.echo(text, err=True)


def _from_options(
    what: str | None,
    bind: bool,
    topic: str,
    engine_type: str,
    servers: tuple[str, ...],
    stream: str,
    subjects: tuple[str, ...],
    credentials: str,
) -> SourceConfig | NatsConfig:
    from ..config import NatsConfig, SourceConfig
    from ..config.errors import InvalidValue
    from ..config.nats_servers import NatsServers
    from ..config.source import SourceType

    if bool(what) == bool(servers):
        raise click.UsageError("give an ENDPOINT, the FILE of a recording, or --nats URL")
    if (stream or subjects or credentials) and not servers:
        raise click.UsageError("--stream, --subject and --credentials go with --nats")
    try:
        if servers:
            connection = NatsServers(servers=servers, credentials_file=credentials)
            kind = SourceType(engine_type)
            return NatsConfig(name="tap", type=kind, connection=connection, stream=stream, subjects=subjects)
        assert what is not None
        is_endpoint = "://" in what
        name = "" if is_endpoint else "recording"
        endpoint = what if is_endpoint else "tcp://localhost:5557"
        return SourceConfig(endpoint=endpoint, name=name, bind=bind, topic=topic, type=SourceType(engine_type))
    except InvalidValue as error:
        raise click.BadParameter(error.reason, param_hint=error.key) from error


def _configured(path: Path, name: str | None) -> SourceConfig | NatsConfig:
    from ..config import ConfigError, load_config

    try:
        config = load_config(path, os.environ)
    except ConfigError as error:
        raise Failure(str(error), EXIT_CONFIG) from error
    every: list[SourceConfig | NatsConfig] = [*config.sources, *config.nats]
    followed = {one.name: one for one in every}
    if name not in followed:
        raise click.UsageError(f"give the NAME of one of: {', '.join(followed) or 'none is configured'}")
    return followed[name]


def _wanted(
    events: tuple[str, ...],
    hashes: str,
    worker: str,
    rank: int | None,
    tier: str,
    config: SourceConfig | NatsConfig,
) -> Wanted:
    from kvcensus.translators.media import Media

    from ..tap.wording import Wanted

    hashes = hashes.lower().removeprefix("0x")
    if set(hashes) - set("0123456789abcdef"):
        raise click.BadParameter(f"{hashes!r} is not hex", param_hint="--hash")
    known = Media(config.media).tier_of(tier) if tier else None
    if tier and known is None:
        raise click.BadParameter(f"{tier!r} is no known spelling of a tier", param_hint="--tier")
    return Wanted(events, hashes, worker, rank, known.value if known else "")
