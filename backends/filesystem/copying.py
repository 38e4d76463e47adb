"""A copy of a journal as of one moment, while the process that owns it goes on writing."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from ..errors import BackendError
from ..ownership import lost_in_machine_crash, sync_directory, sync_file
from .journal import FOLDER, segments, snapshots

_TRIES = 10
"""Files go when a snapshot replaces them: as a rule minutes lie between two snapshots."""


def copy_journal(directory: Path, into: Path) -> None:
    """Make `into` a data directory with the index that `directory` has now, synced.

    Records are only ever appended, each of them one call with its cursors: any beginning of the journal is an index.
    Raises BackendError, OSError.
    """
    source = directory / FOLDER
    if lost_in_machine_crash(source):
        raise BackendError(
            f"{source}: the machine went down while it was written without syncing: it is not to be believed"
        )
    with ExitStack() as stack:
        files = _opened(source, stack)
        target = into / FOLDER
        target.mkdir(mode=0o700)
        for name, file in files:
            _copy(file, target / name)
        sync_directory(target)


def _opened(source: Path, stack: ExitStack) -> list[tuple[str, BinaryIO]]:
    """The newest snapshot and the segments, open: they can be read even when they are deleted meanwhile."""
    for _ in range(_TRIES):
        with ExitStack() as trying:
            # In this order: a snapshot made in between has all that the segments have, or they go on from it.
            journal = segments(source)
            paths = [path for _, path in [*journal, *snapshots(source)[-1:]]]
            try:
                files: list[tuple[str, BinaryIO]] = [
                    (path.name, trying.enter_context(path.open("rb"))) for path in paths
                ]
            except FileNotFoundError:
                continue
            stack.push(trying.pop_all())
            return files
    raise BackendError(f"{source}: its files are replaced faster than they can be opened")


def _copy(file: BinaryIO, path: Path) -> None:
    with path.open("xb") as copy:
        path.chmod(0o600)
        shutil.copyfileobj(file, copy, 1 << 20)
    sync_file(path)
