"""`kvcensus verify`: look at every page and every row of an index."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import click

from .ending import EXIT_BUSY, EXIT_DATA, EXIT_UNAVAILABLE, Failure

FINDINGS_MAX = 1000
"""Shown, not looked for: a file with more is no better understood with all of them."""


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory of the index, whether or not a daemon runs.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line: each finding, then the summary.")
def verify(data_dir: Path, as_json: bool) -> None:
    """Look at the whole index as of one moment, change nothing, and exit with 65 when it is damaged.

    What is wrong is shown as it is found, the first 1000 of it. Meanwhile no page that the daemon frees is used again.
    """
    show_lmdb(data_dir, as_json)


def show_lmdb(data_dir: Path, as_json: bool) -> None:
    """Show what is wrong with the LMDB index in a directory. Raises Failure when anything is."""
    from kvcensus.backends.errors import BackendBusy, BackendError, BackendFormat
    from kvcensus.backends.lmdb.files import INDEX_FILE
    from kvcensus.backends.lmdb.verify import IndexCheck

    path = data_dir / INDEX_FILE
    check = IndexCheck(path)
    shown = 0
    try:
        for finding in islice(check.findings(), FINDINGS_MAX):
            shown += 1
            click.echo(json.dumps(finding._asdict()) if as_json else f"{finding.where}: {finding.what}")
    except BackendError as error:
        data = isinstance(error, BackendFormat)
        raise Failure(
            str(error), EXIT_DATA if data else EXIT_BUSY if isinstance(error, BackendBusy) else EXIT_UNAVAILABLE
        ) from error
    figures = {
        "pages": check.pages,
        "blocks": check.rows,
        "records": check.records,
        "links": check.links,
        "stale_links": check.stale_links,
        "findings": shown,
    }
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(", ".join(f"{name.replace('_', ' ')} {figure}" for name, figure in figures.items()), err=True)
    if shown:
        raise Failure(
            f"{path} is damaged; to rebuild it from the engines, stop the daemon: mv {path} {path}.corrupt", EXIT_DATA
        )
