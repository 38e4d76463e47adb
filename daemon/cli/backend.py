"""`kvcensus backend`: whole indexes, copied, compared, checked, made smaller, backed up."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .ending import EXIT_BUSY, EXIT_DATA, EXIT_IO, EXIT_UNAVAILABLE, Failure
from .progress import progress
from .verify import FINDINGS_MAX, show_lmdb

if TYPE_CHECKING:
    from kvcensus.daemon.moving.location import Location

EXIT_DIFFERENT = 1


class _LocationType(click.ParamType[Any]):
    name = "NAME:DIRECTORY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from kvcensus.daemon.moving.location import Location

        try:
            return Location.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_LOCATION = _LocationType()


@click.group()
def backend() -> None:
    """Copy, compare, check, compact and back up whole indexes.

    An index is named NAME:DIRECTORY, as in lmdb:/var/lib/kvcensus; options of a backend follow as
    NAME:DIRECTORY?OPTION=VALUE&OPTION=VALUE. One of lmdb, filesystem or rocksdb is read while a daemon writes it.
    """


@backend.command()
@click.argument("source", metavar="FROM", type=_LOCATION)
@click.argument("target", metavar="TO", type=_LOCATION)
def copy(source: Location, target: Location) -> None:
    """Copy an index into another backend, or another directory, with every place in the streams.

    What is there already is never overwritten: TO has to be empty.
    """
    from kvcensus.daemon.moving.copying import copy as copied
    from kvcensus.daemon.moving.location import content_of, opened

    with _failures(), content_of(source) as content, opened(target, create=True) as into:
        with progress("records", content.records_held()) as advance:
            copied(content, into, advance)
        _say(f"{content.records_held()} records and {len(content.cursors)} cursors from {source} to {target}")


@backend.command()
@click.argument("a", type=_LOCATION)
@click.argument("b", type=_LOCATION)
@click.option("--cursors", is_flag=True, help="Compare the places in the streams as well, but not when they were told.")
@click.option("--ignore", "ignored", multiple=True, metavar="FIELD", help="Leave a field of records out. May repeat.")
def diff(a: Location, b: Location, cursors: bool, ignored: tuple[str, ...]) -> None:
    """Compare two indexes: a JSON object for each difference, in the order of the block hashes.

    Exits with 0 when there is none, with 1 otherwise. What does not fit into memory is sorted in files under TMPDIR.
    """
    import msgspec

    from kvcensus.daemon.moving.differing import FIELDS, differences
    from kvcensus.daemon.moving.location import content_of

    if unknown := set(ignored) - set(FIELDS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(FIELDS)}", param_hint="--ignore")
    encode = msgspec.json.Encoder().encode
    found = False
    with (
        _failures(),
        content_of(a) as ours,
        content_of(b) as theirs,
        tempfile.TemporaryDirectory(prefix="kvcensus-diff-") as folder,
        progress("records", ours.records_held() + theirs.records_held()) as advance,
    ):
        for one in differences(ours, theirs, Path(folder), cursors=cursors, ignored=ignored, advance=advance):
            found = True
            sys.stdout.buffer.write(encode(one) + b"\n")
    sys.stdout.flush()
    if found:
        raise SystemExit(EXIT_DIFFERENT)


@backend.command()
@click.argument("location", metavar="NAME:DIRECTORY", type=_LOCATION)
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line: each finding, then the summary.")
def verify(location: Location, as_json: bool) -> None:
    """Look at a whole index, change nothing, and exit with 65 when it is damaged.

    Of LMDB every page is read, as `kvcensus verify` does. Of others every record is looked up, and the sums are
    compared with what the backend says of itself.
    """
    from kvcensus.daemon.moving.checking import findings
    from kvcensus.daemon.moving.location import LMDB, at_rest

    if location.name == LMDB:
        show_lmdb(location.directory, as_json)
        return
    shown = 0
    with _failures(), at_rest(location) as index, progress("records", len(index)) as advance:
        records = len(index)
        for finding in islice(findings(index, advance), FINDINGS_MAX):
            shown += 1
            click.echo(json.dumps(finding._asdict()) if as_json else f"{finding.where}: {finding.what}")
    figures = {"records": records, "findings": shown}
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _say(", ".join(f"{name} {figure}" for name, figure in figures.items()))
    if shown:
        raise Failure(f"{location} is damaged", EXIT_DATA)


@backend.command()
@click.argument("location", metavar="NAME:DIRECTORY", type=_LOCATION)
def compact(location: Location) -> None:
    """Give back the disk that an index occupies and does not need, while no daemon runs."""
    from kvcensus.daemon.moving.location import opened

    with _failures(), opened(location) as index:
        before = index.stored_bytes()
        index.compact()
        _say(f"{location}: {before} bytes before, {index.stored_bytes()} after")


@backend.command()
@click.argument("location", metavar="NAME:DIRECTORY", type=_LOCATION)
@click.argument("directory", type=click.Path(path_type=Path))
def backup(location: Location, directory: Path) -> None:
    """Make DIRECTORY, a data directory of the same backend with the index as of one moment.

    While a daemon runs, too, but for backends of other packages. DIRECTORY appears when it is complete, and must not be
    there before.
    """
    from kvcensus.daemon.moving.copying import back_up

    with _failures(), progress("records", None) as advance:
        back_up(location, directory, advance)
    _say(f"{location} is backed up as {location.name}:{directory}")


def _say(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _failures() -> Iterator[None]:
    """Errors of backends and files as the end of the command."""
    from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat
    from kvcensus.daemon.moving.copying import TargetNotEmpty

    try:
        yield
    except BrokenPipeError:
        raise
    except BackendBusy as error:
        raise Failure(f"{error}; this needs an index that no daemon has", EXIT_BUSY) from error
    except (BackendFormat, BackendCorrupt) as error:
        raise Failure(str(error), EXIT_DATA) from error
    except (TargetNotEmpty, OSError) as error:
        raise Failure(str(error), EXIT_IO) from error
    except BackendError as error:
        raise Failure(str(error), EXIT_UNAVAILABLE) from error
