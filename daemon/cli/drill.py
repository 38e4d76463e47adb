"""`kvcensus drill`: faults on purpose, and whether the index tells the truth afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from kvcensus.backends.registry import usable_backends

from ..config import EXIT_CONFIG, Config, ConfigError, load_config
from ..drill.drilling import Order, Summary, drill_seeds, impossible, summed
from ..drill.faults import ABOUT, Fault, UnknownFault, parse_faults
from ..drill.oracle import Outcome
from ..drill.stage import Result
from ..drill.target import NothingToDrill, drillable
from . import EXIT_INTERRUPTED
from .columns import columns
from .ending import Failure, sigterm_ends
from .progress import progress

_SEEDS = 20
_KEEP = Path("kvcensus-drill")


def _faults(ctx: click.Context, option: click.Parameter, text: str) -> tuple[Fault, ...]:
    try:
        return parse_faults(text)
    except UnknownFault as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), help=f"How many drills.  [default: {_SEEDS}]")
@click.option("--seed", type=int, help="This one alone; with --seeds, the first of them.")
@click.option("--faults", callback=_faults, default="all", show_default=True, metavar="NAME,…|all", help="Which ones.")
@click.option("--messages", type=click.IntRange(min=1), default=300, show_default=True, help="Of each stream.")
@click.option("--backend", type=click.Choice(usable_backends()), help="Default: that of --against.")
@click.option("--against", type=click.Path(path_type=Path, dir_okay=False), help="Drill this configuration.")
@click.option("--deadline-seconds", "deadline_s", type=click.FloatRange(min=1), default=30.0, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1, max=64), default=1, show_default=True, help="Drills at a time.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), default=_KEEP, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of tables.")
@click.pass_context
def drill(
    ctx: click.Context,
    seeds: int | None,
    seed: int | None,
    faults: tuple[Fault, ...],
    messages: int,
    backend: str | None,
    against: Path | None,
    deadline_s: float,
    jobs: int,
    keep: Path,
    as_json: bool,
) -> None:
    """Follow simulated engines with real daemon processes through faults, and hold the index to the truth.

    Exits with 1 when a worker's blocks are wrong and not marked so; --keep then has what reproduces it.
    """
    numbers = [seed] if seed is not None and seeds is None else range(seed or 0, (seed or 0) + (seeds or _SEEDS))
    try:
        base, left_out = drillable(Config() if against is None else load_config(against, os.environ))
    except (ConfigError, NothingToDrill) as error:
        raise Failure(str(error), EXIT_CONFIG) from error
    for sentence in left_out:
        click.echo(sentence, err=True)
    skipped = impossible(base, faults, backend)
    for fault, reason in skipped.items():
        click.echo(f"{fault} is left out: {reason}", err=True)
    order = Order(base, tuple(one for one in faults if one not in skipped), messages, keep, backend, deadline_s)
    results: list[Result] = []
    code = 0
    try:
        with sigterm_ends(), progress("drills", len(numbers)) as advance:
            for result in drill_seeds(order, numbers, jobs):
                results.append(result)
                if not result.passed:
                    click.echo(_told(result, keep), err=True)
                advance(1)
    except (KeyboardInterrupt, SystemExit):
        code = EXIT_INTERRUPTED
        click.echo(f"ended after {len(results)} of {len(numbers)} drills", err=True)
    summary = summed(results)
    if as_json:
        click.echo(
            msgspec.json.format(msgspec.json.encode({"summary": summary, "skipped": skipped, "drills": results}))
        )
    else:
        _show(summary)
    ctx.exit(1 if summary.diverged else code)


def _told(result: Result, keep: Path) -> str:
    bad = [one for one in result.workers if one.outcome in (Outcome.DIVERGED, Outcome.BEHIND)]
    told = [*result.problems, *(f"{one.worker_id} {one.outcome}: {one.problem} [{one.reason}]" for one in bad)]
    return f"seed {result.seed}: {'; '.join(told)}; see {keep / f'seed-{result.seed}'}"


def _show(summary: Summary) -> None:
    rows = [(fault, str(summary.injected[fault]), ABOUT[fault].what) for fault in Fault if summary.injected.get(fault)]
    click.echo(columns(("INJECTED", "TIMES", ""), rows))
    click.echo()
    click.echo(columns(("FOUND BY THE DAEMON", ""), [(name, str(count)) for name, count in summary.found.items()]))
    click.echo()
    ended = [(outcome, str(summary.workers[outcome])) for outcome in Outcome if summary.workers[outcome]]
    click.echo(columns(("WORKERS AT THE END", ""), ended))
    click.echo()
    click.echo(
        f"{summary.drills} drills, {summary.messages} messages, {summary.diverged} diverged; from the last fault to "
        f"the truth {summary.recovery_ms_p50} ms (median), {summary.recovery_ms_max} ms (longest)"
    )
