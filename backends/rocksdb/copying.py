"""A copy of a database as of one moment, while the process that owns it goes on writing.

Its files are not copied: they go and come as RocksDB merges them. A second instance reads along
(https://github.com/facebook/rocksdb/wiki/Read-only-and-Secondary-instances), and its rows make a new database.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rocksdict import AccessType, Rdict, ReadOptions, WriteBatch

from ..errors import BackendError
from .backend import DATABASE
from .options import Resources
from .store import options_for

_TRIES = 10
"""A file that is merged away before it is opened makes an attempt fail."""
_BATCH_ROWS = 16_384
_ALL_FILES = -1


def copy_database(directory: Path, into: Path) -> None:
    """Make `into` a data directory with the index that the data directory has now, synced. Raises BackendError."""
    options = options_for(Resources())
    with tempfile.TemporaryDirectory(prefix="reading-", dir=into) as own, _following(directory, Path(own)) as reading:
        target = Rdict(str(into / DATABASE), options, {"default": options})
        try:
            _copy_rows(reading, target)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise BackendError(f"{directory / DATABASE} cannot be copied: {error}") from error
        finally:
            target.close()


@contextmanager
def _following(directory: Path, own: Path) -> Iterator[Rdict]:
    """A second instance of a database, which keeps every file open that it has. `own` is for its own log."""
    options = options_for(Resources())
    options.set_max_open_files(_ALL_FILES)
    for left in reversed(range(_TRIES)):
        try:
            reading = Rdict(str(directory / DATABASE), options, access_type=AccessType.secondary(str(own)))
            break
        except Exception as error:
            if type(error) is not Exception or not left:
                raise BackendError(f"{directory / DATABASE} cannot be read: {error}") from error
    try:
        yield reading
    finally:
        reading.close()


def _copy_rows(source: Rdict, target: Rdict) -> None:
    everything = ReadOptions()
    everything.set_total_order_seek(True)
    rows = source.iter(everything)
    try:
        rows.seek(b"")
        while rows.valid():
            batch = WriteBatch(raw_mode=True)
            while len(batch) < _BATCH_ROWS and rows.valid():
                batch.put(rows.key(), rows.value())
                rows.next()
            target.write(batch)
        rows.status()
    finally:
        # An iterator keeps the database open.
        del rows
    target.flush_wal(sync=True)
