"""The long look at an index.

Every page is read without LMDB (`pages`), and then, when LMDB can walk it safely, every row: it decodes, its place and
its scope are known, its parent leads to it, and the counts of its place are those that are stored. There are no
checksums: a changed time, token count, index or number of copies of a block of unknown size is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

import lmdb

from ..entries import PlaceRow
from ..errors import BackendCorrupt, BackendError
from ..model import Cursor, IdentityScope
from .catalog import Tables, number_of, read_places
from .checks import UNDECODABLE, check_metas, corrupt, opened_file, pinned
from .files import named_errors, open_unchecked
from .pages import Finding, Meta, PageCheck
from .rows import COUNT, LINK, PLACE, ROW, link_key, pack_row, row_key, unpack_row


def refuse_if_damaged(path: Path) -> None:
    """The long look, which ends at the first finding with BackendCorrupt. A file that is not there is whole."""
    if path.exists():
        for finding in IndexCheck(path).findings():
            raise corrupt(path, f"{finding.where}: {finding.what}")


class IndexCheck:
    """Looks at the whole of an index, running or not, as of one moment. The figures grow as it goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pages = 0
        self.rows = 0
        self.records = 0
        self.links = 0
        self.stale_links = 0
        """Links that lead to a block which is not, or no longer, below the parent: harmless, readers check them."""

    def findings(self) -> Iterator[Finding]:
        """What is wrong, as it is found. Raises BackendError when it cannot be looked at."""
        if not self._path.exists():
            raise BackendError(f"{self._path}: there is no index here")
        with named_errors(self._path):
            try:
                check_metas(self._path)
            except BackendCorrupt as error:
                yield Finding(self._path.name, str(error.__cause__))
                return
            if not self._path.stat().st_size:
                return
            with opened_file(self._path) as file, open_unchecked(self._path) as env, pinned(file, env) as (txn, meta):
                if meta is not None:
                    yield from self._state(PageCheck(file, meta), meta, env, txn)

    def _state(
        self, pages: PageCheck, meta: Meta, env: lmdb.Environment, txn: lmdb.Transaction[bytes]
    ) -> Iterator[Finding]:
        self.pages = meta.last_page + 1
        sound = True
        for finding in pages.everything():
            sound = False
            yield finding
        missing = [name for name in Tables._fields if name.encode() not in pages.tables]
        if sound and missing and pages.tables:
            yield Finding("the tree of tables", f"has no {', '.join(missing)}")
        elif sound and not missing:
            tables = Tables(*(env.open_db(name.encode(), txn=txn, create=False) for name in Tables._fields))
            yield from self._contents(txn, tables)

    def _contents(self, txn: lmdb.Transaction[bytes], tables: Tables) -> Iterator[Finding]:
        try:
            places = read_places(txn, tables)
            counts = {PLACE.unpack(key)[0]: COUNT.unpack(value) for key, value in txn.cursor(tables.counts)}
            dead = {PLACE.unpack(key)[0] for key, _ in txn.cursor(tables.dead)}
            scopes = self._scopes(txn, tables)
            for key, value in txn.cursor(tables.streams):
                if msgspec.msgpack.decode(value, type=Cursor).stream.encode() != key:
                    yield Finding("table streams", f"{key!r} is under another name")
        except UNDECODABLE as error:
            yield Finding("a small table", f"does not decode: {error!r}")
            return
        if counts.keys() != places.keys() or dead & places.keys():
            yield Finding("table places", "does not fit the counts and the dead places")
        numbers = places.keys() | dead
        if numbers and max(numbers) >= number_of(txn, tables.meta, b"next_place"):
            yield Finding("table meta", "the next place was used already")
        if scopes and max(scopes) >= number_of(txn, tables.meta, b"next_scope"):
            yield Finding("table meta", "the next scope was used already")
        counted = {number: [0, 0] for number in places}
        yield from self._blocks(txn, tables, _Known(places, counts, dead, scopes, counted))

    def _scopes(self, txn: lmdb.Transaction[bytes], tables: Tables) -> set[int]:
        numbers = set()
        named = set()
        for key, value in txn.cursor(tables.scopes):
            if len(key) == PLACE.size:
                msgspec.msgpack.decode(value, type=IdentityScope)
                numbers.add(PLACE.unpack(key)[0])
            else:
                named.add(PLACE.unpack(value)[0])
        if numbers != named:
            raise KeyError("scopes and their names differ")
        return numbers

    def _blocks(self, txn: lmdb.Transaction[bytes], tables: Tables, known: _Known) -> Iterator[Finding]:
        get = partial(txn.get, db=tables.blocks)
        for key, row in txn.cursor(tables.blocks):
            length = key[0] if key else 0
            kind = key[1 + length : 2 + length]
            if kind == ROW and len(key) == 2 + length and length:
                self.rows += 1
                for what in self._row(key[1:-1], row, get, known):
                    yield Finding(f"block {key[1:-1].hex()}", what)
            elif kind == LINK and len(key) > 2 + length and not row:
                self.links += 1
                child = get(row_key(key[2 + length :]))
                self.stale_links += child is None or key[1 : 1 + length] not in child
            else:
                yield Finding(f"key {key.hex()}", "is neither a block nor a link")
        for number, place in known.places.items():
            found, said = tuple(known.counted[number]), known.counts.get(number)
            if found != said:
                where = f"place {number} ({place.worker_id} {place.tier} {place.group})"
                yield Finding(where, f"records and bytes are {found}, said to be {said}")

    def _row(self, block_hash: bytes, row: bytes, get: Callable[[bytes], bytes | None], known: _Known) -> Iterator[str]:
        try:
            child, entries = unpack_row(row)
            sound = bool(entries) and pack_row(child, entries) == row
        except UNDECODABLE:
            sound = False
        if not sound:
            yield f"does not decode: {row[:64].hex()}"
            return
        if len({entry[:2] for entry in entries}) < len(entries):
            yield "has two records of the same place and scope"
        for entry in entries:
            count = known.counted.get(entry.place)
            if entry.scope not in known.scopes or entry.copies < 1 or entry.block_index < -1:
                yield f"has an impossible record: {entry}"
            elif count is not None:
                self.records += 1
                count[0] += 1
                count[1] += entry.copies * entry.size
                if entry.parent is not None and not _leads(get, entry.parent, block_hash):
                    yield f"is not among the children of {entry.parent.hex() or 'the root'}"
            elif entry.place not in known.dead:
                yield f"is of place {entry.place}, which there is not"


class _Known(NamedTuple):
    """What the small tables say, and what of it was found in the rows."""

    places: dict[int, PlaceRow]
    counts: dict[int, tuple[int, int]]
    dead: set[int]
    scopes: set[int]
    counted: dict[int, list[int]]


def _leads(get: Callable[[bytes], bytes | None], parent: bytes, child: bytes) -> bool:
    row = get(row_key(parent)) if parent else None
    if row is not None and row[1 : 1 + row[0]] == child:
        return True
    return get(link_key(parent, child)) is not None
