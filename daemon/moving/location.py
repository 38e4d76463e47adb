"""Where an index is, as it is named on the command line, and how it is opened for reading or for writing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from kvcensus.backends.errors import BackendBusy, BackendError
from kvcensus.backends.filesystem.copying import copy_journal
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbReader
from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.backends.model import CacheResidency, Cursor, Holding
from kvcensus.backends.ownership import sync_file
from kvcensus.backends.registry import backend_names, open_backend

LMDB = "lmdb"
ROCKSDB = "rocksdb"
COPIED_WHILE_WRITTEN = (LMDB, ROCKSDB, "filesystem")
"""Backends whose index another process can copy while it is written."""
SERVER = "valkey"
"""The backend whose directory has nothing of the index."""

_INSIDE = {LMDB: INDEX_FILE, "filesystem": "journal", "rocksdb": "rocksdb"}
"""What a backend makes in its directory: without it there is no index to read, and none is to be made."""


class Location(NamedTuple):
    """A backend's name, its data directory, and options as of its table in the configuration."""

    name: str
    directory: Path
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Location:
        """From NAME:DIRECTORY, or NAME:DIRECTORY?OPTION=VALUE&… Raises ValueError."""
        name, colon, rest = text.partition(":")
        directory, _, options = rest.partition("?")
        if not colon or not directory:
            raise ValueError(f"{text!r} is not NAME:DIRECTORY, as in lmdb:/var/lib/kvcensus")
        if name not in backend_names():
            raise ValueError(f"there is no backend {name!r}; there are {', '.join(backend_names())}")
        if name == "memory":
            raise ValueError("memory has no index that another process could open")
        return cls(name, Path(directory), {key: _value(value) for key, value in parse_qsl(options)})

    def __str__(self) -> str:
        return f"{self.name}:{self.directory}"

    def exists(self) -> bool:
        """Whether there is an index, as far as that can be told without opening it."""
        inside = _INSIDE.get(self.name)
        return inside is None or (self.directory / inside).exists()


class Content(NamedTuple):
    """All of an index as of one moment. `records` in no order."""

    records: Callable[[], Iterator[CacheResidency]]
    cursors: dict[str, Cursor]
    holdings: list[Holding]

    def records_held(self) -> int:
        """The number of records."""
        return sum(holding.blocks for holding in self.holdings)


@contextmanager
def content_of(location: Location) -> Iterator[Content]:
    """What is in an index, while a daemon writes it too, if its files can be copied. Raises BackendError."""
    if location.name == LMDB:
        with _lmdb_reader(location.directory) as reader, reader.frozen(location.directory) as frozen:
            yield Content(frozen.records, frozen.cursors(), frozen.holdings())
        return
    with at_rest(location) as backend:
        yield Content(backend.snapshot, backend.cursors(), backend.holdings())


@contextmanager
def at_rest(location: Location) -> Iterator[IndexBackend]:
    """A backend to read that nobody writes: the index itself, or while a daemon has it a copy, if that can be made.

    Raises BackendError.
    """
    with ExitStack() as stack:
        try:
            backend = stack.enter_context(opened(location))
        except BackendBusy:
            if location.name not in COPIED_WHILE_WRITTEN:
                raise
            backend = stack.enter_context(_copied(location))
        yield backend


@contextmanager
def opened(location: Location, *, create: bool = False) -> Iterator[IndexBackend]:
    """The backend itself, which nobody else has meanwhile. Raises BackendError, BackendBusy when a daemon runs."""
    if not create and not location.exists():
        raise BackendError(f"{location}: there is no index here")
    backend = open_backend(location.name, location.directory, location.options)
    try:
        yield backend
    finally:
        backend.close()


def copy_index(location: Location, into: Path) -> None:
    """Make `into`, an empty directory, a data directory with the index as of one moment, synced.

    The index may be written meanwhile. Only for `COPIED_WHILE_WRITTEN`. Raises BackendError, OSError.
    """
    if location.name == LMDB:
        file = into / INDEX_FILE
        with _lmdb_reader(location.directory) as reader:
            reader.copy_to(file)
        file.chmod(0o600)
        sync_file(file)
    elif location.name == ROCKSDB:
        from kvcensus.backends.rocksdb.copying import copy_database

        copy_database(location.directory, into)
    else:
        copy_journal(location.directory, into)


@contextmanager
def _copied(location: Location) -> Iterator[IndexBackend]:
    """A copy of an index that another process writes, next to it."""
    with tempfile.TemporaryDirectory(prefix="snapshot-", dir=location.directory) as folder:
        copy = location._replace(directory=Path(folder))
        copy_index(location, copy.directory)
        with opened(copy) as backend:
            yield backend


@contextmanager
def _lmdb_reader(directory: Path) -> Iterator[LmdbReader]:
    reader = LmdbReader.open(directory)
    try:
        yield reader
    finally:
        reader.close()


def _value(text: str) -> Any:
    """A number, true, false or null where it is one, text otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text
