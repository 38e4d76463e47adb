"""Questions to the index, each answered in one short read transaction, from any thread and any process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path

import msgspec

import lmdb

from ..entries import Entry, LivePlaces, PlaceRow, residency
from ..errors import BackendCorrupt, BackendError
from ..matching import Held, worker_matches
from ..model import (
    CacheResidency,
    Cursor,
    Holding,
    IdentityScope,
    WorkerMatch,
)
from ..ownership import lost_in_machine_crash
from .catalog import PlaceCache, ScopeNames, Tables
from .checks import UNDECODABLE, corrupt
from .files import DAMAGE, INDEX_FILE, open_reader, pid_clash
from .rows import (
    COUNT,
    HOLDER,
    LENGTH,
    PLACE,
    ROW,
    link_prefix,
    masks_by_head,
    row_key,
    unpack_row,
)

_MATCH_CHUNK = 64
"""Hashes looked up at a time in `match`: most chains end or fit within it."""
_CHILDREN_CHUNK = 1024
"""Children looked up at a time."""

_decode_cursor = msgspec.msgpack.Decoder(Cursor).decode


class LmdbReader:
    """Reads an index. `close` it, unless the environment belongs to a backend."""

    def __init__(self, env: lmdb.Environment, tables: Tables) -> None:
        self._env = env
        self._tables = tables
        self._places = PlaceCache(tables)
        self._scopes = ScopeNames(tables.scopes)
        self.prefix_scans = 0
        self.damage: BackendCorrupt | None = None
        """What a question found. The index is not to be asked again."""

    @classmethod
    def open(cls, directory: Path) -> LmdbReader:
        """Open the index in a daemon's data directory. Raises BackendFormat, BackendCorrupt, BackendError.

        What the next writer will discard is not read either.
        """
        if lost_in_machine_crash(directory):
            raise BackendError(
                f"{directory / INDEX_FILE}: the machine went down while it was written without syncing: "
                "it is not to be believed"
            )
        return cls(*open_reader(directory / INDEX_FILE))

    def close(self) -> None:
        """Release the environment."""
        self._env.close()

    @contextmanager
    def reading(self, table: lmdb._Database | None = None) -> Iterator[lmdb.Transaction[bytes]]:
        """A read transaction. Raises BackendCorrupt or BackendError for what LMDB says meanwhile."""
        try:
            with self._env.begin(db=table) as txn:
                yield txn
        except (*DAMAGE, *UNDECODABLE) as error:
            self.damage = damage = corrupt(self._env.path(), repr(error))
            raise damage from error
        except lmdb.LockError as error:
            raise pid_clash(self._env.path()) from error
        except lmdb.Error as error:
            raise BackendError(f"{self._env.path()} cannot be read: {error}") from error

    def cursors(self) -> dict[str, Cursor]:
        with self.reading() as txn:
            return {key.decode(): _decode_cursor(value) for key, value in txn.cursor(self._tables.streams)}

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        with self.reading() as txn:
            places = self._places.places(txn).rows
            row = txn.get(row_key(block_hash), db=self._tables.blocks)
            if row is None:
                return []
            found = (self._residency(txn, places, block_hash, entry) for entry in unpack_row(row)[1])
            return [one for one in found if one is not None and (scope is None or one.key.scope == scope)]

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        with self.reading() as txn:
            return list(chain.from_iterable(self._by_child(txn, scope, prefix_hash, _CHILDREN_CHUNK)))

    def first_children(self, scope: IdentityScope, prefix_hash: bytes, limit: int) -> tuple[list[CacheResidency], bool]:
        with self.reading() as txn:
            children = self._by_child(txn, scope, prefix_hash, min(limit + 1, _CHILDREN_CHUNK))
            found = list(chain.from_iterable(islice(children, limit)))
            return found, next(children, None) is not None

    def _by_child(
        self, txn: lmdb.Transaction[bytes], scope: IdentityScope, parent: bytes, at_a_time: int
    ) -> Iterator[list[CacheResidency]]:
        """The residencies of each child in a scope, in the order of the children; so many are looked up together."""
        self.prefix_scans += 1
        number = self._scopes.number(txn, scope)
        if number is None:
            return
        places = self._places.places(txn).rows
        children = self._children(txn, parent)
        while keys := [row_key(child) for child in islice(children, at_a_time)]:
            for key, row in txn.cursor(self._tables.blocks).getmulti(keys):
                entries = [one for one in unpack_row(row)[1] if one.scope == number and one.parent == parent]
                found = [self._residency(txn, places, key[1:-1], entry) for entry in entries]
                if living := [one for one in found if one is not None]:
                    yield living

    def _children(self, txn: lmdb.Transaction[bytes], parent: bytes) -> Iterator[bytes]:
        """Blocks that have, or had, this parent, in the order of their hashes."""
        row = txn.get(row_key(parent), db=self._tables.blocks) if parent else None
        in_row = row[1 : 1 + row[0]] if row is not None else b""
        prefix = link_prefix(parent)
        cursor = txn.cursor(self._tables.blocks)
        if cursor.set_range(prefix):
            for key in cursor.iternext(values=False):
                if not key.startswith(prefix):
                    break
                child = key[len(prefix) :]
                if in_row and in_row <= child:
                    if in_row != child:
                        yield in_row
                    in_row = b""
                yield child
        if in_row:
            yield in_row

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        with self.reading(self._tables.blocks) as txn:
            places = self._places.places(txn)
            number = None
            if scope is not None:
                number = self._scopes.number(txn, scope)
                if number is None:
                    return []
            masks = self._masks(txn, places, number, block_hashes)
        held = [
            Held(row.worker_id, row.rank, row.tier, row.group, mask)
            for row, mask in ((places.rows[place], mask) for place, mask in masks.items())
        ]
        return worker_matches(held, places.specs)

    def _masks(
        self, txn: lmdb.Transaction[bytes], places: LivePlaces, scope: int | None, block_hashes: Sequence[bytes]
    ) -> dict[int, int]:
        """Which of the hashes each place holds, as bits. Stops after a chunk at whose end nobody holds any."""
        masks: dict[int, int] = {}
        for start in range(0, len(block_hashes), _MATCH_CHUNK):
            keys = [LENGTH[len(one)] + one + ROW for one in block_hashes[start : start + _MATCH_CHUNK]]
            last_held = start - 1
            for head, mask in masks_by_head(map(txn.get, keys, repeat(b""))).items():
                place, holder_scope = HOLDER.unpack(head)
                if (scope is None or holder_scope == scope) and place in places.rows:
                    masks[place] = masks.get(place, 0) | mask << start
                    last_held = max(last_held, start + mask.bit_length() - 1)
            if last_held < start + len(keys) - places.patience:
                break
        return masks

    def holdings(self) -> list[Holding]:
        with self.reading() as txn:
            counts = {PLACE.unpack(key)[0]: COUNT.unpack(value) for key, value in txn.cursor(self._tables.counts)}
            return [
                Holding(row.worker_id, row.rank, row.tier, row.group, row.spec, *counts.get(number, (0, 0)))
                for number, row in self._places.places(txn).rows.items()
            ]

    def snapshot(self, directory: Path) -> Iterator[CacheResidency]:
        """Every record as of now, read from a compacted copy under `directory`, so that no transaction stays open.

        The copy takes as much disk as the live index. Raises BackendError when there is no room for it.
        """
        with self.frozen(directory) as reader:
            yield from reader.records()

    @contextmanager
    def frozen(self, directory: Path) -> Iterator[LmdbReader]:
        """A reader of this moment, for as long as it takes. What it needs, and raises, is that of `snapshot`."""
        with tempfile.TemporaryDirectory(prefix="snapshot-", dir=directory) as copy:
            path = Path(copy, INDEX_FILE)
            self.copy_to(path)
            env, tables = open_reader(path, lock=False)
            reader = LmdbReader(env, tables)
            try:
                yield reader
            finally:
                self.damage = self.damage or reader.damage
                env.close()

    def copy_to(self, path: Path) -> None:
        """Write the index of this moment, compacted, to a new file. Raises BackendError."""
        try:
            with path.open("xb") as file:
                self._env.copyfd(file.fileno(), compact=True)
        except DAMAGE as error:
            self.damage = damage = corrupt(self._env.path(), repr(error))
            raise damage from error
        except (lmdb.Error, OSError) as error:
            raise BackendError(f"no snapshot: cannot copy the index to {path.parent}: {error}") from error

    def records(self) -> Iterator[CacheResidency]:
        """Every record, in one read transaction."""
        with self.reading() as txn:
            places = self._places.places(txn).rows
            for key, row in txn.cursor(self._tables.blocks):
                if len(key) == 2 + key[0] and row:
                    for entry in unpack_row(row)[1]:
                        one = self._residency(txn, places, key[1:-1], entry)
                        if one is not None:
                            yield one

    def _residency(
        self, txn: lmdb.Transaction[bytes], places: dict[int, PlaceRow], block_hash: bytes, entry: Entry
    ) -> CacheResidency | None:
        place = places.get(entry.place)
        if place is None:
            return None
        return residency(place, self._scopes.scope(txn, entry.scope), block_hash, entry)
