"""`kvcensus bench backends`: the same traces over every backend that is installed."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kvcensus.backends.registry import usable_backends, why_unusable

from .ending import EXIT_DATA, EXIT_UNAVAILABLE, Failure

_SERVER = "valkey"
_SMALLEST = 1_000
"""Of fewer blocks there are not enough records to ask for."""


def _sizes(ctx: click.Context, option: click.Parameter, text: str) -> list[int]:
    parts = _parts(text)
    if not parts or any(not one.isdecimal() or int(one) < _SMALLEST for one in parts):
        raise click.BadParameter(f"{text!r} is not one or more numbers of at least {_SMALLEST}, with commas between")
    return list(dict.fromkeys(map(int, parts)))


def _parts(text: str) -> list[str]:
    return [one for part in text.split(",") if (one := part.strip())]


def _server(ctx: click.Context, option: click.Parameter, text: str) -> str:
    host, _, port = text.rpartition(":")
    if text and not (host and port.isdecimal()):
        raise click.BadParameter(f"{text!r} is not HOST:PORT")
    return text


def _backends(named: str, server: str) -> list[str]:
    if not named:
        return [name for name in usable_backends() if name != _SERVER or server]
    names = list(dict.fromkeys(_parts(named)))
    for name in names:
        if problem := why_unusable(name):
            raise click.BadParameter(problem, param_hint="--backends")
        if name == _SERVER and not server:
            raise click.BadParameter("valkey needs --valkey HOST:PORT", param_hint="--backends")
    return names


def _traces(text: str) -> list[str]:
    from ..bench.backends.traces import CAPTURE, SIMULATED

    names = list(dict.fromkeys(_parts(text)))
    for name in names:
        if name not in SIMULATED and not Path(name.removeprefix(CAPTURE)).is_file():
            known = ", ".join(SIMULATED)
            raise click.BadParameter(f"{name!r} is neither {known}, nor a recording", param_hint="--traces")
    if not names:
        raise click.BadParameter("names no trace", param_hint="--traces")
    return names


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option(
    "--backends", "named", default="", metavar="NAME,…", help="Which; without it every one that is installed."
)
@click.option(
    "--sizes", callback=_sizes, default="100000,1000000", show_default=True, help="Blocks that a trace stores."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each kind.")
@click.option(
    "--traces",
    default="chat,agentic,eviction",
    show_default=True,
    metavar="TRACE,…",
    help="chat, agentic, eviction, or recordings as capture:FILE.",
)
@click.option(
    "--engine", type=click.Choice(["vllm", "sglang"]), default="vllm", show_default=True, help="Of the recordings."
)
@click.option(
    "--valkey",
    "server",
    callback=_server,
    default="",
    metavar="HOST:PORT",
    help="Server for valkey; what is made is cleared.",
)
@click.option("--work-dir", type=_FOLDER, help="Where the files of the indexes go; a file system on a disk.")
@click.option("--json", "json_file", type=_FILE, help="Write the figures there.")
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the tables there, with the method.")
@click.option("--plots", "plots_dir", type=_FOLDER, help="Write plots there, PNG and SVG; needs kvcensus[plots].")
def backends(
    named: str,
    sizes: list[int],
    rounds: int,
    traces: str,
    engine: str,
    server: str,
    work_dir: Path | None,
    json_file: Path | None,
    markdown_file: Path | None,
    plots_dir: Path | None,
) -> None:
    """Compare the backends on the same traces, each in a process of its own for every size, trace and round.

    Exits with 69 when a backend failed; the others are shown nevertheless.
    """
    import msgspec

    from ..bench.backends.plots import PlotsUnavailable, require_matplotlib, write_plots
    from ..bench.backends.running import Plan, compare
    from ..bench.backends.tables import markdown, show
    from ..recording import RecordingError

    if plots_dir is not None:
        try:
            require_matplotlib()
        except PlotsUnavailable as error:
            raise Failure(str(error), EXIT_UNAVAILABLE) from error
    plan = Plan(_backends(named, server), sizes, _traces(traces), rounds, engine, server)
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {rounds} rounds."
    try:
        with (
            tempfile.TemporaryDirectory(prefix="kvcensus-bench-", dir=work_dir) as place,
            Console(stderr=True).status("measuring …") as status,
        ):
            results = compare(plan, Path(place), status.update)
    except RecordingError as error:
        raise Failure(str(error), EXIT_DATA) from error
    show(results, Console())
    if json_file is not None:
        document: dict[str, Any] = {"machine": machine, "plan": plan, "results": results}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    if markdown_file is not None:
        command = " ".join(["kvcensus", *sys.argv[1:]])
        markdown_file.write_text(markdown(results, machine, command))
    if plots_dir is not None:
        write_plots(results, plots_dir)
    if failed := sorted({row.backend for row in results.rows if row.failure}):
        raise Failure(f"failed: {', '.join(failed)}", EXIT_UNAVAILABLE)
