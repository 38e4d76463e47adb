"""An index from one backend into another, and back-ups.

What is not finished is not taken for an index: until the cursors are there, the target has a marker for each worker,
the cursor of a stream that nobody follows. A daemon that starts on it drops those workers with their blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from kvcensus.backends.errors import BackendError, BackendUnsupported
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import Cursor, Holding, IdentityScope, Operation, StoreRun
from kvcensus.backends.ownership import sync_directory

from .location import COPIED_WHILE_WRITTEN, SERVER, Content, Location, content_of, copy_index, opened

_BATCH = 16_384
"""Records in one call: beyond it a larger transaction gains nothing."""
_MARKER = "unfinished copy of "


class TargetNotEmpty(BackendError):
    """There is something already where a copy should be made. It stays as it is."""

    problem = "not_empty"


def copy(source: Content, target: IndexBackend, advance: Callable[[int], None]) -> None:
    """Copy every record, place and cursor. `advance` is told of records.

    Raises TargetNotEmpty, and BackendError; the target is empty again then, if that is possible.
    """
    if len(target) or target.cursors() or target.holdings():
        raise TargetNotEmpty(f"{target.name()}: the target has an index already; nothing was copied")
    markers = [_marker(worker_id) for worker_id in sorted({one.worker_id for one in source.holdings})]
    try:
        target.apply([_place(one) for one in source.holdings], markers)
        records = source.records()
        while batch := list(islice(records, _BATCH)):
            target.put_all(batch)
            advance(len(batch))
        if len(target) != source.records_held():
            raise BackendError(f"{target.name()}: has {len(target)} records after a copy of {source.records_held()}")
        # In one call with the cursors, a marker becomes one of no worker: from here on it is only dropped.
        target.apply([], [*source.cursors.values(), *(Cursor(one.stream, 0, -1) for one in markers)])
    except BaseException:
        with suppress(BackendError):
            target.clear()
            for marker in markers:
                target.forget_stream(marker.stream)
        raise
    for marker in markers:
        target.forget_stream(marker.stream)


def back_up(location: Location, directory: Path, advance: Callable[[int], None]) -> None:
    """Make `directory` a data directory of the same backend with the same content, as of one moment.

    While a daemon writes it too, if its files can be copied. Raises BackendError, FileExistsError.
    """
    if directory.exists():
        raise FileExistsError(f"{directory}: exists already; it is not overwritten")
    if location.name == SERVER:
        raise BackendUnsupported(f"{location}: the data is on a server, which has its own ways to back it up")
    if not location.exists():
        raise BackendError(f"{location}: there is no index here")
    draft = directory.with_name(f".{directory.name}.part")
    draft.mkdir(mode=0o700, parents=True)
    try:
        target = location._replace(directory=draft)
        if location.name in COPIED_WHILE_WRITTEN:
            copy_index(location, draft)
            with content_of(target) as content:
                advance(content.records_held())
        else:
            with content_of(location) as content, opened(target, create=True) as backend:
                copy(content, backend, advance)
        sync_directory(draft)
        draft.rename(directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def _place(holding: Holding) -> Operation:
    """A run of no blocks: it tells the rank of a place and what is known of its group, and nothing else."""
    return StoreRun(
        holding.worker_id,
        holding.rank,
        IdentityScope("", ""),
        holding.tier,
        (),
        group=holding.group,
        spec=holding.spec,
    )


def _marker(worker_id: str) -> Cursor:
    return Cursor(f"{_MARKER}{worker_id}", 0, -1, worker_id=worker_id)
