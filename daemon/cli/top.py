"""`kvcensus top`: a live view of a running daemon."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from .asking import Daemon, http_option, timeout_option
from .columns import columns
from .ending import Failure

if TYPE_CHECKING:
    from ..top.looking import Look
    from ..top.rates import Rates
    from ..top.rows import Column, Row
    from ..top.sample import Sample

_LEAST_S = 0.2


@click.command()
@http_option
@timeout_option
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=_LEAST_S),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@click.option("--once", is_flag=True, help="Print two looks, an interval apart, as tables and end.")
@click.option("--json", "as_json", is_flag=True, help="As --once, as JSON.")
def top(address: str, timeout_s: float, interval_s: float, once: bool, as_json: bool) -> None:
    """Watch workers, streams and the index of a running daemon. Press ? there for the keys.

    It needs a terminal, at least 80 by 24, unless --once or --json is given.
    """
    from ..top.looking import Unreachable, look
    from ..top.sample import NotUnderstood

    daemon = Daemon(address, timeout_s)

    def look_once() -> Sample:
        try:
            return look(daemon.get)
        except Failure as error:
            raise Unreachable(error.message) from error
        except NotUnderstood as error:
            raise Unreachable(str(error)) from error

    if once or as_json:
        _print(look_once, interval_s, as_json)
        return
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise click.UsageError("this is no terminal: --once prints tables, --json JSON")
    from ..top.screen import Top

    Top(look_once, address, interval_s).run()


def _print(look: Look, interval_s: float, as_json: bool) -> None:
    from ..top.looking import Unreachable
    from ..top.rates import rates_between
    from .ending import EXIT_UNAVAILABLE

    try:
        before = look()
        time.sleep(interval_s)
        sample = look()
    except Unreachable as problem:
        raise Failure(str(problem), EXIT_UNAVAILABLE) from problem
    rates = rates_between(before, sample)
    click.echo(json.dumps(_as_json(sample, rates)) if as_json else _as_text(sample, rates))


def _as_text(sample: Sample, rates: Rates | None) -> str:
    from ..top.details import backend_lines, headline
    from ..top.rows import BUSES, STREAMS, WORKERS, bus_rows, stream_rows, worker_rows

    parts = [
        "\n".join([f"kvcensus {sample.version}", *(line.plain for line in headline(sample, rates))]),
        _table(WORKERS, worker_rows(sample, rates)),
        _table(STREAMS, stream_rows(sample, rates)),
        *([_table(BUSES, bus_rows(sample))] if sample.buses else []),
        backend_lines(sample, rates).plain.rstrip(),
    ]
    return "\n\n".join(parts)


def _table(shown: tuple[Column, ...], rows: list[Row]) -> str:
    from ..top.rows import ordered

    return columns(
        [column.title for column in shown],
        [[column.cell(row) for column in shown] for row in ordered(rows, shown[0], False)],
    )


def _as_json(sample: Sample, rates: Rates | None) -> dict[str, Any]:
    import msgspec

    return {
        "version": sample.version,
        "backend": sample.backend,
        "uptime_s": sample.uptime_s,
        "blocks": sample.figures.value("kvcensus_backend_records"),
        "queue_messages": sample.figures.value("kvcensus_queue_messages"),
        "readiness": msgspec.to_builtins(sample.readiness),
        "rates": msgspec.to_builtins(rates),
        "workers": msgspec.to_builtins(list(sample.workers.values())),
        "streams": msgspec.to_builtins(list(sample.streams.values())),
        "buses": msgspec.to_builtins(sample.buses),
    }
