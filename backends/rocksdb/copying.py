"""A copy of a database as of one moment, while the process that owns it goes on writing.

Its files are not copied: they go and come as RocksDB merges them. A second instance reads along
(https://github.com/facebook/rocksdb/wiki/Read-only-and-Secondary-instances), and its rows make a new database.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rocksdict import AccessType, Rdict, RdictIter, ReadOptions, WriteBatch

from ..errors import BackendError
from .backend import DATABASE
from .options import Resources
from .store import let_go, options_for

_TRIES = 10
"""A file that is merged away before it is opened makes an attempt fail."""
_BATCH_ROWS = 16_384
_ALL_FILES = -1


def copy_database(directory: Path, into: Path) -> None:
    """Make `into` a data directory with the index that the data directory has now, synced. Raises BackendError."""
    options = options_for(Resources())
    with tempfile.TemporaryDirectory(prefix="reading-", dir=into) as own, _moment(directory, Path(own)) as rows:
        target = Rdict(str(into / DATABASE), options, {"default": options})
        try:
            _copy_rows(rows, target)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise BackendError(f"{directory / DATABASE} cannot be copied: {error}") from error
        finally:
            let_go(target)


@contextmanager
def _moment(directory: Path, own: Path) -> Iterator[list[RdictIter]]:
    """An iterator over a second instance of the database, in a list: it keeps the database open, so it has to go first.

    The second instance reads which files there are, and then the logs. When the first one has written a log to a file
    in between, and deleted it, those rows are in neither: so no log may have come or gone. `own` is for its own notes.
    """
    path = directory / DATABASE
    options = options_for(Resources())
    options.set_max_open_files(_ALL_FILES)
    problem = "its logs come and go faster than they can be read"
    for _ in range(_TRIES):
        logs = _logs(path)
        try:
            reading = Rdict(str(path), options, access_type=AccessType.secondary(str(own)))
        except Exception as error:
            if type(error) is not Exception:
                raise
            problem = str(error)
            continue
        rows = [reading.iter(_everything())]
        try:
            if _logs(path) == logs:
                yield rows
                return
        finally:
            rows.clear()
            reading.close()
    raise BackendError(f"{path} cannot be read: {problem}")


def _logs(path: Path) -> set[str]:
    return {one.name for one in path.glob("*.log")}


def _everything() -> ReadOptions:
    options = ReadOptions()
    options.set_total_order_seek(True)
    return options


def _copy_rows(rows: list[RdictIter], target: Rdict) -> None:
    rows[0].seek(b"")
    while rows[0].valid():
        batch = WriteBatch(raw_mode=True)
        while len(batch) < _BATCH_ROWS and rows[0].valid():
            batch.put(rows[0].key(), rows[0].value())
            rows[0].next()
        target.write(batch)
    rows[0].status()
    target.flush_wal(sync=True)
