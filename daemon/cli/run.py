"""`kvcensus run`: the daemon in the foreground."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat
from kvcensus.backends.lmdb.files import SUSPECT_FILE
from kvcensus.backends.registry import usable_backends

from ..collector import settle_collector
from ..config import EXIT_CONFIG, Config, ConfigError, config_from_flags, load_config
from ..foreground import CLOSING_S, run_until
from ..http.server import HttpServer
from ..logs import configure, get_logger
from ..long_start import long_start
from ..reloads import ignore_hangups, reloads
from ..service import Service
from ..service_manager import ServiceManager

EXIT_FAILURE = 1
EXIT_DATA = 65
EXIT_BUSY = 75
"""From sysexits.h: EX_DATAERR, EX_TEMPFAIL; a configuration error is EX_CONFIG."""

log = get_logger("run")


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="TOML file.")
@click.option("--engine", "engines", multiple=True, help="Endpoint of an engine's KV events; may repeat.")
@click.option(
    "--replay-endpoint", "replay_endpoints", multiple=True, help="Replay endpoint of the engine, in the same order."
)
@click.option("--nats", "servers", multiple=True, help="URL of a NATS server whose bus is followed; may repeat.")
@click.option("--stream", default="", help="JetStream stream of the bus; without it, core NATS.")
@click.option("--engine-type", type=click.Choice(["vllm", "sglang", "dynamo"]), default="vllm", show_default=True)
@click.option("--topic", default="", help="Only topics that start with this.")
@click.option("--worker", "workers", multiple=True, help="Worker name of the engine, in the same order.")
@click.option("--model", default="", help="Model name for the scope of the blocks.")
@click.option("--ranks", default=0, help="Data-parallel size: one stream a rank, at consecutive ports.")
@click.option("--bind", is_flag=True, help="Bind the endpoint, for an engine that connects.")
@click.option("--data-dir", help="Directory of the index.")
@click.option("--http", "listen", help="HOST:PORT of the HTTP side; port 0 for any.")
@click.option("--backend", type=click.Choice(usable_backends()), help="Where the index lives.")
def run(
    path: Path | None,
    engines: tuple[str, ...],
    replay_endpoints: tuple[str, ...],
    servers: tuple[str, ...],
    stream: str,
    engine_type: str,
    topic: str,
    workers: tuple[str, ...],
    model: str,
    ranks: int,
    bind: bool,
    data_dir: str | None,
    listen: str | None,
    backend: str | None,
) -> None:
    """Follow engines, keep the index, answer over HTTP.

    Give a file with --config, or engines with --engine, or a bus with --nats.
    """
    if path is not None and (engines or servers):
        raise click.UsageError("give --config, or --engine and --nats, not both")
    if path is None and not engines and not servers:
        raise click.UsageError("nothing to follow: give --config FILE, --engine ENDPOINT or --nats URL")
    if stream and not servers:
        raise click.UsageError("--stream belongs to --nats")

    def load() -> Config:
        if path is not None:
            flags = {"data_dir": data_dir, "http.listen": listen, "backend": backend}
            return load_config(path, os.environ, {key: value for key, value in flags.items() if value is not None})
        return config_from_flags(
            engines,
            replay_endpoints,
            workers=workers,
            servers=servers,
            stream=stream,
            engine_type=engine_type,
            topic=topic,
            model=model,
            ranks=ranks,
            bind=bind,
            data_dir=data_dir,
            http=listen,
            backend=backend,
            environ=os.environ,
        )

    try:
        config = load()
    except ConfigError as error:
        click.echo(f"kvcensus: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    configure(config.log.level, config.log.format)
    for warning in config.warnings():
        log.warning("configuration", detail=warning)
    sys.exit(asyncio.run(_Daemon(config, load if path is not None else None).run()))


def _unusable(error: BackendError) -> int:
    """Say what is wrong with the index, and return the exit code of it."""
    log.critical("backend_unusable", problem=error.problem, detail=str(error))
    if isinstance(error, BackendBusy):
        return EXIT_BUSY
    return EXIT_DATA if isinstance(error, BackendFormat | BackendCorrupt) else EXIT_FAILURE


def _note_fatal_signals(data_dir: Path) -> None:
    """An end by SIGBUS, SIGSEGV or SIGABRT leaves a note: the next start then looks at the whole index first."""
    file = (data_dir / SUSPECT_FILE).open("ab", buffering=0)
    os.fchmod(file.fileno(), 0o600)
    faulthandler.enable(file, all_threads=False)


class _Daemon:
    """The event loop of `run`: signals, HTTP, and watching the threads of the service."""

    def __init__(self, config: Config, load: Callable[[], Config] | None) -> None:
        """`load` reads the configuration again; None for one that is not in a file."""
        self._config = config
        self._load = load
        self._stop = asyncio.Event()
        self._manager = ServiceManager(os.environ)

    async def run(self) -> int:
        """Returns the exit code."""
        ignore_hangups()
        try:
            with long_start(self._manager):
                service = Service(self._config)
        except BackendError as error:
            return _unusable(error)
        if service.backend.persistent():
            _note_fatal_signals(Path(self._config.data_dir))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        server = None
        drain_s = self._config.writer.drain_deadline_ms / 1000
        try:
            with long_start(self._manager):
                service.start()
            settle_collector()
            try:
                server = await self._listen(service)
            except OSError as error:
                log.critical("cannot_listen", listen=self._config.http.listen, detail=str(error))
                return EXIT_FAILURE
            log.info("started", pid=os.getpid(), backend=service.backend.name(), blocks=len(service.backend))
            async with reloads(self._manager, self._load, lambda config: service.reload(config, self._stop.is_set)):
                self._manager.ready()
                await run_until(self._stop, service, self._manager)
        except BackendError as error:
            return _unusable(error)
        finally:
            log.info("stopping")
            self._manager.stopping(drain_s + CLOSING_S)
            if server is not None:
                await server.stop()
            drained = await asyncio.to_thread(service.stop, drain_s)
            log.info("stopped", drained=drained)
        failure = service.failure()
        if isinstance(failure, BackendError):
            return _unusable(failure)
        return EXIT_FAILURE if failure else 0

    async def _listen(self, service: Service) -> HttpServer | None:
        address = self._config.http.address()
        if address is None:
            return None
        server = HttpServer(service, self._config.http)
        host, port = await server.start(*address)
        log.info("http_listening", host=host, port=port)
        return server
