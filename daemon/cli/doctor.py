"""`kvcensus doctor`: what could keep a daemon from working here."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..printable import printable
from .asking import Daemon, http_option
from .ending import Failure

if TYPE_CHECKING:
    from ..config import Config
    from ..doctor.facts import Finding, Running

_ASK_S = 3.0
PROBE_S = 3.0
_NO_END = 10_000
"""Columns of a pipe."""
_SYMBOLS = {"ok": "●", "warning": "!", "problem": "✕"}
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="The daemon's TOML file.")
@click.option("--data-dir", metavar="DIR", help="Its data directory, over that of the file.")
@http_option
@click.option("--no-probe", is_flag=True, help="Do not connect to the sources.")
@click.option(
    "--probe-s",
    "probe_s",
    type=click.FloatRange(min=0.1, max=3600),
    default=PROBE_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to look at them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(
    ctx: click.Context,
    path: Path | None,
    data_dir: str | None,
    address: str,
    no_probe: bool,
    probe_s: float,
    as_json: bool,
) -> None:
    """Check the machine, the configuration, permissions, the index, the daemon and its sources, and give advice.

    Exits with 1 when there is a problem; warnings do not count. Run it as the daemon's user, where the daemon runs.
    Nothing is changed.
    """
    if path is None and data_dir is None:
        raise click.UsageError("give --config FILE, or --data-dir DIR")
    import msgspec

    from ..config import Config, ConfigError, load_config
    from ..doctor.facts import Finding, Verdict
    from ..doctor.running import worst

    try:
        config = load_config(path, os.environ, {"data_dir": data_dir} if data_dir is not None else {})
        configuration = _configuration(config, path)
    except ConfigError as error:
        advice = "correct it: kvcensus check says the same; what follows is of the defaults"
        configuration = [Finding("configuration", "settings", Verdict.PROBLEM, str(error), advice)]
        config = Config(data_dir=data_dir) if data_dir is not None else Config()
    given = ctx.get_parameter_source("address") is not click.core.ParameterSource.DEFAULT
    running = _ask(address if given else _address(config), config)
    found = [*configuration, *_look(config, running)]
    if path is not None:
        found += _sources(config, running, None if no_probe else probe_s)
    if as_json:
        printed = {"verdict": worst(found), "version": version("kvcensus"), "findings": found}
        click.echo(msgspec.json.encode(printed))
    else:
        _show(found)
    if worst(found) is Verdict.PROBLEM:
        ctx.exit(1)


def _configuration(config: Config, path: Path | None) -> list[Finding]:
    from ..doctor.facts import Finding, Verdict

    if path is None:
        return []
    warnings = [one for one in config.warnings() if one]
    advice = "docs/reference/configuration.md"
    found = [Finding("configuration", "settings", Verdict.WARNING, one, advice) for one in warnings]
    return found or [Finding("configuration", "settings", Verdict.OK, f"{path} can be used as it is")]


def _look(config: Config, running: Running) -> list[Finding]:
    """What is found on this machine."""
    from ..doctor.directory import directory_findings
    from ..doctor.facts import Settings
    from ..doctor.gather import look_at_directory, look_at_machine
    from ..doctor.machine import machine_findings
    from ..doctor.running import daemon_findings

    data_dir = Path(config.data_dir)
    settings = Settings(
        backend=config.backend,
        queue_max_bytes=config.writer.queue_max_bytes,
        max_connections=config.http.max_connections,
        streams=sum(1 for _ in config.streams()),
        map_size=config.index.map_size_bytes,
        durability=config.index.durability,
    )
    directory = look_at_directory(data_dir)
    machine = look_at_machine(data_dir, directory.owner_pid)
    of_index, index_bytes = [], 0
    if config.backend == "lmdb" and directory.writable:
        from ..doctor.gather_index import look_at_index
        from ..doctor.index import index_findings

        index = look_at_index(data_dir)
        of_index, index_bytes = index_findings(index, directory, settings, running), index.file
    return [
        *machine_findings(machine, settings, index_bytes, directory.newest_s),
        *directory_findings(directory),
        *of_index,
        *daemon_findings(running, directory),
    ]


def _sources(config: Config, running: Running, probe_s: float | None) -> list[Finding]:
    """As the running daemon says; where none answers, as a probe does."""
    from ..doctor.running import followed, probed

    if not running.problem:
        return followed(running)
    if probe_s is None or not (config.sources or config.nats):
        return []
    from ..probe.probing import probe

    return probed(probe(config, probe_s))


def _address(config: Config) -> str:
    """Where the daemon of a configuration is to be asked from this machine, "" for nowhere."""
    listen = config.http.address()
    if listen is None:
        return ""
    host, port = listen
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    scheme = "https://" if config.http.tls_certificate else ""
    return f"{scheme}{host}:{port}"


def _ask(address: str, config: Config) -> Running:
    from http import HTTPStatus

    import msgspec

    from ..config.endpoints import is_loopback
    from ..doctor.facts import Running
    from ..http.bodies import DaemonState, StreamsAnswer
    from ..status import Readiness

    if not address:
        return Running("", "http.listen is empty: the daemon answers nobody")
    host = address.partition("//")[2] or address
    nearby = is_loopback(host.rpartition(":")[0].strip("[]"))
    try:
        daemon = Daemon(address, _ASK_S, config.http.token_file)
        readiness = daemon.get("/readyz", HTTPStatus.SERVICE_UNAVAILABLE)
        return Running(
            address,
            loopback=nearby,
            version=msgspec.json.decode(daemon.get("/v1/daemon"), type=DaemonState).version,
            our_version=version("kvcensus"),
            readiness=msgspec.json.decode(readiness, type=Readiness),
            streams=msgspec.json.decode(daemon.get("/v1/streams"), type=StreamsAnswer),
        )
    except Failure as error:
        return Running(address, error.message, nearby)
    except msgspec.DecodeError as error:
        return Running(address, f"{address} does not answer as a kvcensus of this version: {error}", nearby)


def _show(found: Sequence[Finding]) -> None:
    width = max(len(one.check) for one in found)
    indent = " " * (width + 15)
    columns = max(len(indent) + 20, shutil.get_terminal_size().columns) if sys.stdout.isatty() else _NO_END
    area = ""
    for one in found:
        if one.area != area:
            click.echo(f"\n{one.area}" if area else one.area)
            area = one.area
        verdict = click.style(f"{_SYMBOLS[one.verdict]} {one.verdict:<7}", fg=_COLOURS[one.verdict])
        says, *rest = [line for text in (one.says, one.advice) for line in textwrap.wrap(text, columns - len(indent))]
        click.echo(f"  {verdict}  {one.check:<{width}}  {printable(says)}")
        for line in rest:
            click.echo(f"{indent}{printable(line)}")
    counts = [sum(one.verdict == verdict for one in found) for verdict in ("problem", "warning")]
    click.echo(f"\nchecks: {len(found)}, problems: {counts[0]}, warnings: {counts[1]}")
