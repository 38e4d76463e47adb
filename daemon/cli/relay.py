"""`kvcensus relay`: the sidecar that publishes an engine's messages to JetStream."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat

from ..collector import settle_collector
from ..config import Config, ConfigError, OnHole, SourceType, config_from_flags, load_config
from ..config.endpoints import Endpoint, is_loopback
from ..foreground import CLOSING_S, run_until
from ..http.server import GuardedServer
from ..logs import configure, get_logger
from ..long_start import long_start
from ..relay.http import make_app
from ..relay.service import RelayService
from ..reloads import ignore_hangups, reloads
from ..service_manager import ServiceManager
from .ending import EXIT_BUSY, EXIT_CONFIG, EXIT_DATA

EXIT_FAILURE = 1

log = get_logger("relay")


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="TOML file.")
@click.option("--engine", "engines", multiple=True, help="Endpoint of an engine's KV events; may repeat.")
@click.option(
    "--replay-endpoint", "replay_endpoints", multiple=True, help="Replay endpoint of the engine, in the same order."
)
@click.option("--engine-type", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True)
@click.option("--topic", default="", help="Only topics that start with this.")
@click.option("--worker", "workers", multiple=True, help="Worker name of the engine. Default: the host's name.")
@click.option("--model", default="", help="Model name that the messages bear.")
@click.option("--ranks", default=0, help="Data-parallel size: one stream a rank, at consecutive ports.")
@click.option("--bind", is_flag=True, help="Bind the endpoint, for an engine that connects.")
@click.option("--nats", "servers", multiple=True, metavar="URL", help="nats://HOST:PORT or tls://…; may repeat.")
@click.option("--stream", help="JetStream stream to publish to.")
@click.option("--create-stream", is_flag=True, default=None, help="Make the stream when it is missing.")
@click.option("--spool-dir", help="Directory of what is not acknowledged yet.")
@click.option("--http", "listen", help="HOST:PORT of the HTTP side; port 0 for any.")
def relay(
    path: Path | None,
    engines: tuple[str, ...],
    replay_endpoints: tuple[str, ...],
    engine_type: str,
    topic: str,
    workers: tuple[str, ...],
    model: str,
    ranks: int,
    bind: bool,
    servers: tuple[str, ...],
    stream: str | None,
    create_stream: bool | None,
    spool_dir: str | None,
    listen: str | None,
) -> None:
    """Publish engines' untouched messages to JetStream, through a spool on disk.

    Give a file with --config, or engines with --engine. Secrets stand in files, which the configuration names.
    """
    if (path is None) == (not engines):
        raise click.UsageError("give either --config FILE or --engine ENDPOINT")
    if path is not None and servers:
        raise click.UsageError("--nats goes with --engine; a file names its servers in [relay.connection]")
    flags = {"stream": stream, "create_stream": create_stream, "spool_dir": spool_dir}
    section: dict[str, object] = {key: value for key, value in flags.items() if value is not None}

    def load() -> Config:
        if path is not None:
            overrides = {f"relay.{key}": value for key, value in section.items()}
            config = load_config(path, os.environ, overrides | ({"http.listen": listen} if listen is not None else {}))
        else:
            config = config_from_flags(
                engines,
                replay_endpoints,
                workers=workers or _default_workers(engines),
                engine_type=engine_type,
                topic=topic,
                model=model,
                ranks=ranks,
                bind=bind,
                http=listen,
                environ=os.environ,
                relay=section | ({"connection": {"servers": servers}} if servers else {}),
            )
        _check(config, path)
        return config

    try:
        config = load()
    except ConfigError as error:
        click.echo(f"kvcensus: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    configure(config.log.level, config.log.format)
    for warning in _warnings(config):
        log.warning("configuration", detail=warning)
    sys.exit(asyncio.run(_run(config, load if path is not None else None)))


def _default_workers(engines: Sequence[str]) -> tuple[str, ...]:
    """The name of a pod is that of its engine."""
    return (socket.gethostname(),) if len(engines) == 1 else ()


def _check(config: Config, path: Path | None) -> None:
    """What only a relay needs. Raises ConfigError."""
    place = str(path) if path else "command line"
    if not config.relay.stream:
        raise ConfigError(place, None, "relay.stream" if path else "--stream", "is required")
    if not config.sources:
        raise ConfigError(place, None, "sources", "none is configured: there is nothing to relay")
    for number, source in enumerate(config.sources):
        endpoint = Endpoint.parse(source.endpoint)
        if source.type is SourceType.DYNAMO:
            raise ConfigError(place, None, f"sources[{number}].type", "Dynamo publishes to NATS by itself")
        if source.name == endpoint.default_name() and (endpoint.path or is_loopback(endpoint.host)):
            reason = f"{source.name!r} would be the name of every worker that is relayed like this one: give it its own"
            raise ConfigError(place, None, f"sources[{number}].name" if path else "--worker", reason)
        if source.max_message_bytes > config.relay.spool_max_bytes:
            reason = f"less than max_message_bytes of sources[{number}]: such a message could not be kept"
            raise ConfigError(place, None, "relay.spool_max_bytes", reason)


def _warnings(config: Config) -> list[str]:
    sources = [warning for source in config.sources for warning in source.warnings()]
    unheard = [
        f"source {source.name}: without replay_endpoint what the engine published while the relay was away is lost"
        for source in config.sources
        if not source.replay_endpoint
    ]
    holes = [
        f"source {source.name}: on_hole is tolerate, and nobody who follows the bus can tolerate a hole: it fences"
        for source in config.sources
        if source.on_hole is OnHole.TOLERATE
    ]
    return config.http.warnings() + config.relay.connection.warnings() + sources + unheard + holes


async def _run(config: Config, load: Callable[[], Config] | None) -> int:
    """Relay until a signal; `load` reads the configuration again. Returns the exit code."""
    ignore_hangups()
    stopping = asyncio.Event()
    manager = ServiceManager(os.environ)
    drain_s = config.writer.drain_deadline_ms / 1000
    try:
        with long_start(manager):
            service = RelayService(config)
    except BackendError as error:
        return _unusable(error)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = None
    try:
        service.start()
        settle_collector()
        try:
            server = await _listen(service, config)
        except OSError as error:
            log.critical("cannot_listen", listen=config.http.listen, detail=str(error))
            return EXIT_FAILURE
        log.info("started", pid=os.getpid(), streams=len(service.streams))
        async with reloads(manager, load, lambda config: service.reload(config, stopping.is_set)):
            manager.ready()
            await run_until(stopping, service, manager)
    finally:
        log.info("stopping")
        manager.stopping(drain_s + CLOSING_S)
        if server is not None:
            await server.stop()
        drained = await asyncio.to_thread(service.stop, drain_s)
        log.info("stopped", all_published=drained)
    failure = service.failure()
    if isinstance(failure, BackendError):
        return _unusable(failure)
    return EXIT_FAILURE if failure else 0


async def _listen(service: RelayService, config: Config) -> GuardedServer | None:
    address = config.http.address()
    if address is None:
        return None
    server = GuardedServer(lambda guard: make_app(service, config.http, guard), config.http, service.http_counters)
    host, port = await server.start(*address)
    log.info("http_listening", host=host, port=port)
    return server


def _unusable(error: BackendError) -> int:
    """Say what is wrong with the spool, and return the exit code of it."""
    log.critical("spool_unusable", problem=error.problem, detail=str(error))
    if isinstance(error, BackendBusy):
        return EXIT_BUSY
    return EXIT_DATA if isinstance(error, BackendFormat | BackendCorrupt) else EXIT_FAILURE
