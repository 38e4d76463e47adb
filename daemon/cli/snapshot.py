"""`kvcensus snapshot`: the whole index as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from .asking import Daemon, http_option, timeout_option
from .ending import EXIT_DATA, EXIT_IO, EXIT_UNAVAILABLE, Failure
from .progress import progress

if TYPE_CHECKING:
    from kvcensus.backends.lmdb import LmdbReader

_LINES_AT_A_TIME = 1000


@click.command()
@http_option
@timeout_option
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Read the index in this directory instead, whether or not a daemon runs.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write here instead of to the standard output."
)
def snapshot(address: str, timeout_s: float, data_dir: Path | None, output: Path | None) -> None:
    """Write every residency as of one moment, one JSON object a line.

    The file of --output appears when it is complete, and replaces one of that name.
    """
    total, chunks = _from_directory(data_dir) if data_dir else _from_daemon(Daemon(address, timeout_s))
    try:
        with _opened(output) as file, progress("records", total) as advance:
            for chunk in chunks:
                file.write(chunk)
                advance(chunk.count(b"\n"))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"{output or 'standard output'}: {error.strerror}", EXIT_IO) from error


def _from_daemon(daemon: Daemon) -> tuple[int, Iterator[bytes]]:
    workers = json.loads(daemon.get("/v1/workers"))["workers"]
    return sum(one["blocks"] for one in workers), daemon.chunks("/v1/snapshot", "application/x-ndjson")


def _from_directory(data_dir: Path) -> tuple[int, Iterator[bytes]]:
    from kvcensus.backends.errors import BackendCorrupt, BackendError, BackendFormat
    from kvcensus.backends.lmdb import LmdbReader

    def failure(error: BackendError) -> Failure:
        return Failure(str(error), EXIT_DATA if isinstance(error, BackendFormat | BackendCorrupt) else EXIT_UNAVAILABLE)

    try:
        reader = LmdbReader.open(data_dir)
    except BackendError as error:
        raise failure(error) from error

    def lines() -> Iterator[bytes]:
        try:
            yield from _lines_of(reader, data_dir)
        except BackendError as error:
            raise failure(error) from error
        finally:
            reader.close()

    return sum(holding.blocks for holding in reader.holdings()), lines()


def _lines_of(reader: LmdbReader, data_dir: Path) -> Iterator[bytes]:
    import msgspec

    from ..http.bodies import Residency, fields_of

    encode = msgspec.json.Encoder().encode_lines
    records = reader.snapshot(data_dir)
    while batch := [Residency(*fields_of(record)) for record in islice(records, _LINES_AT_A_TIME)]:
        yield encode(batch)


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """The standard output, or a file that takes its name when all is written."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    draft = output.with_name(f".{output.name}.part")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
