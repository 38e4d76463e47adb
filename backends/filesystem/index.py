"""The index in memory: changed by records of the journal, written to a snapshot and read from one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ..memory import MemoryBackend
from ..memory_place import Place, Record, Run
from .records import (
    AllCleared,
    Applied,
    BlockRemoved,
    Blocks,
    Change,
    Content,
    Operations,
    OwnRecord,
    PlaceBegins,
    Put,
    Scope,
    SharedRun,
    SnapshotEnds,
    fields_of,
)

_CHUNK = 4096
"""Blocks in one record of a snapshot: some 50 kB."""


class Index(MemoryBackend):
    """A memory backend that can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self._made = Operations()

    def change(self, record: Change) -> None:
        """Do again what a record of the journal tells."""
        if isinstance(record, Applied):
            self.apply(self._made.of(record), record.cursors)
        elif isinstance(record, Put):
            self.put(record.residency)
        elif isinstance(record, BlockRemoved):
            self.remove_block(record.scope, record.worker_id, record.block_hash)
        elif isinstance(record, AllCleared):
            self.clear()
        else:
            self.forget_stream(record.stream)

    def recovered(self) -> None:
        """What comes now is counted, what was done again is not."""
        self._made = Operations()
        self._puts = self._removes = 0

    def dump(self) -> Iterator[Content]:
        """The whole content. Nothing may change meanwhile."""
        for place in self._every_place():
            yield PlaceBegins(place.worker_id, place.rank, place.tier, place.group, place.spec)
            yield from _dump_blocks(place)
        yield SnapshotEnds(len(self), list(self._cursors.values()))

    def load(self, contents: Iterable[Content]) -> bool:
        """Take a dump into an empty index. Returns whether it was complete. Raises IndexError for one that is wrong."""
        place: Place | None = None
        for content in contents:
            if isinstance(content, PlaceBegins):
                place = self._place(content.worker_id, content.rank, content.tier, content.group)
                place.spec = content.spec
            elif isinstance(content, SnapshotEnds):
                self._cursors = {cursor.stream: cursor for cursor in content.cursors}
                return len(self) == content.records
            elif place is None:
                return False
            else:
                self._load_blocks(place, content)
        return False

    def _load_blocks(self, place: Place, blocks: Blocks) -> None:
        scopes = [self._made.scope(fields) for fields in blocks.scopes]
        for run in blocks.runs:
            place.store_run(
                Run(scopes[run.scope], run.hashes, run.parent, run.base, run.token_count, run.at_ms, run.size)
            )
        for block_hash, records in groupby(blocks.records, key=lambda record: record.block_hash):
            known = tuple(
                Record(
                    scopes[one.scope],
                    one.parent,
                    one.block_index,
                    one.token_count,
                    one.ref_count,
                    one.at_ms,
                    one.size,
                    one.pinned,
                )
                for one in records
            )
            place.replace(block_hash, (), known)


def _dump_blocks(place: Place) -> Iterator[Blocks]:
    scopes: dict[Scope, int] = {}
    runs: list[SharedRun] = []
    records: list[OwnRecord] = []
    written: set[int] = set()
    count = 0
    for block_hash, known in place.blocks.items():
        if isinstance(known, Run):
            if id(known) not in written:
                if len(known.hashes) > 1:
                    written.add(id(known))
                scope = scopes.setdefault(fields_of(known.scope), len(scopes))
                runs += _what_is_left(place, known, scope)
                count += len(known.hashes)
        else:
            for one in known:
                scope = scopes.setdefault(fields_of(one.scope), len(scopes))
                records.append(OwnRecord(block_hash, scope, *one[1:]))
            count += len(known)
        if count >= _CHUNK:
            yield Blocks(list(scopes), runs, records)
            scopes, runs, records, count = {}, [], [], 0
    if count:
        yield Blocks(list(scopes), runs, records)


def _what_is_left(place: Place, run: Run, scope: int) -> Iterator[SharedRun]:
    """The parts of a run that still share it, each a run of its own."""
    hashes, blocks = run.hashes, place.blocks
    start = 0
    for end in range(len(hashes) + 1):
        if end < len(hashes) and blocks.get(hashes[end]) is run:
            continue
        if start < end:
            yield SharedRun(
                scope,
                hashes[start:end],
                hashes[start - 1] if start else run.parent,
                None if run.base is None else run.base + start,
                run.token_count,
                run.at_ms,
                run.size,
            )
        start = end + 1
