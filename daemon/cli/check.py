"""`kvcensus check`: what a configuration would run, or what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..config import Config, ConfigError, NatsConfig, SourceConfig, load_config
from .columns import columns
from .ending import EXIT_CONFIG, EXIT_UNAVAILABLE, Failure

if TYPE_CHECKING:
    from ..probe.findings import ProbeFindings

PROBE_S = 5.0
"""Twice the longest wait between two messages of an engine that works, and few enough to wait for."""


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, metavar="FILE", help="TOML file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: config, streams, warnings; with --probe, probe.")
@click.option("--probe", "probed", is_flag=True, help="Connect to every source, and say what is there.")
@click.option(
    "--probe-s",
    "probe_s",
    type=click.FloatRange(min=0.1, max=3600),
    metavar="SECONDS",
    help=f"How long to look.  [default: {PROBE_S:g}]",
)
def check(path: Path, as_json: bool, probed: bool, probe_s: float | None) -> None:
    """Say what a configuration would run, environment overrides included, and with --probe what is at its sources.

    A bad one is named as FILE:LINE: KEY: REASON, with exit code 78. Exits with 69 when a source is not reached.
    Warnings do not change the exit code.
    """
    if probe_s is not None and not probed:
        raise click.UsageError("--probe-s goes with --probe")
    try:
        config = load_config(path, os.environ)
    except ConfigError as error:
        raise Failure(str(error), EXIT_CONFIG) from error
    if as_json:
        streams = [stream for _, stream in config.streams()]
        printed = {"config": config, "streams": streams, "warnings": config.warnings()}
        findings = _probe(config, probe_s) if probed else None
        if findings is not None:
            printed["probe"] = findings
        click.echo(msgspec.json.encode(printed))
    else:
        _show(path, config)
        findings = _probe(config, probe_s) if probed else None
        if findings is not None:
            from ..probe.words import report

            click.echo(f"\n{report(findings)}")
    if findings is not None and not findings.reached:
        click.get_current_context().exit(EXIT_UNAVAILABLE)


def _probe(config: Config, seconds: float | None) -> ProbeFindings:
    from ..probe.probing import probe

    return probe(config, PROBE_S if seconds is None else seconds)


def _show(path: Path, config: Config) -> None:
    click.echo(f"{path}: ok\n")
    click.echo(columns(("SETTING", "VALUE"), _settings(config)))
    click.echo()
    if any(config.streams()):
        click.echo(_streams(config))
    if config.buses():
        click.echo(_buses(config))
    for warning in config.warnings():
        click.echo(f"warning: {warning}", err=True)


def _settings(config: Config) -> list[tuple[str, Any]]:
    """Every setting that is not of a source or a bus."""
    found: list[tuple[str, Any]] = []
    for key, value in msgspec.to_builtins(config).items():
        if isinstance(value, dict):
            found.extend((f"{key}.{name}", inner) for name, inner in value.items())
        elif key not in ("sources", "nats"):
            found.append((key, value))
    return found


def _streams(config: Config) -> str:
    head = ("STREAM", "TYPE", "ENDPOINT", "", "REPLAY", "TOPIC", "MODEL", "OTHER")
    return columns(
        head,
        (
            (
                stream.stream,
                source.type,
                stream.endpoint,
                "bind" if source.bind else "connect",
                stream.replay_endpoint,
                source.topic,
                source.model,
                _changed(source),
            )
            for source, stream in config.streams()
        ),
    )


def _buses(config: Config) -> str:
    return columns(
        ("BUS", "TYPE", "SERVERS", "STREAM", "SUBJECTS", "MODEL", "OTHER"),
        ((bus.name, bus.type, *_where(bus), bus.model, _changed(bus)) for bus in config.buses()),
    )


def _where(bus: SourceConfig | NatsConfig) -> tuple[str, str, str]:
    """Servers, stream and subjects of a bus."""
    if isinstance(bus, SourceConfig):
        return bus.endpoint, "ZMQ", bus.topic or "every one"
    return " ".join(bus.connection.servers), bus.stream or "core NATS", " ".join(bus.subjects) or "every one"


_SHOWN = frozenset(
    "endpoint name type replay_endpoint bind ranks topic model connection stream subjects".split()  # noqa: SIM905
)


def _changed(source: msgspec.Struct) -> str:
    """The settings of a source that have no column and are not at their defaults."""
    plain = msgspec.to_builtins(source)
    changed = []
    for field in msgspec.structs.fields(source):
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        value = plain[field.name]
        is_implied = field.name == "tokenizer" and value == plain["model"]
        if field.name not in _SHOWN and not is_implied and value != msgspec.to_builtins(default):
            changed.append(f"{field.name}={msgspec.json.encode(value).decode()}")
    return " ".join(changed)
