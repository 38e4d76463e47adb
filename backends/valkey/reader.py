"""Questions to an index on a server, each answered from the state of one moment, from any thread and any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import msgspec

from ..entries import Entry, LivePlaces, PlaceRow, live_places, residency
from ..errors import BackendCorrupt, BackendError
from ..lmdb.catalog import ScopeNames, decode_places
from ..lmdb.checks import UNDECODABLE
from ..lmdb.rows import COUNT, HOLDER, LENGTH, PLACE, ROW, link_prefix, masks_by_head, row_key
from ..lmdb.rows import unpack_row as unpack
from ..matching import Held, worker_matches
from ..model import CacheResidency, Cursor, Holding, IdentityScope, WorkerMatch
from .layout import BUCKETS, TABLES, VERSION, Command, Keys, bucket_of, found_rows, pairs
from .server import Server

_MATCH_FIRST = 64
"""Hashes looked up at first in `match`: most chains end or fit within it. The second time it is all of them."""
_SCAN_TRIES = 5
_MOMENT_TRIES = 3
_SNAPSHOT_ROWS = 16_384
"""About how many rows of a snapshot are read at a time, in whole buckets: 2 MB."""

_decode_cursor = msgspec.msgpack.Decoder(Cursor).decode


class _Seen(NamedTuple):
    """The places of one state of one index, and the scopes of that index.

    `state` is its instance, session and version of the places. What a server lost has used numbers that a later session
    gives again, so nothing is kept from one session to the next.
    """

    state: tuple[bytes | None, bytes | None, bytes | None]
    places: LivePlaces
    scopes: ScopeNames


class Frozen:
    """The rows as they were when a snapshot began, of the buckets that it has not read yet and that have changed."""

    def __init__(self) -> None:
        self._before: list[dict[bytes, bytes | None] | None] = [{} for _ in range(BUCKETS)]

    def keep(self, key: bytes, row: bytes | None) -> None:
        """Note a row that is about to be changed."""
        kept = self._before[bucket_of(key)]
        if kept is not None:
            kept.setdefault(key, row)

    def take(self, bucket: int) -> dict[bytes, bytes | None]:
        """What was kept of a bucket. It has been read: nothing of it is kept from now on."""
        kept, self._before[bucket] = self._before[bucket] or {}, None
        return kept


class ValkeyReader:
    """Reads one index."""

    def __init__(self, server: Server, keys: Keys) -> None:
        self._server = server
        self._keys = keys
        self._seen: _Seen | None = None
        self.prefix_scans = 0
        self.damage: BackendCorrupt | None = None

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except UNDECODABLE as error:
            self.damage = BackendCorrupt(f"valkey {self._server.address}: the index is damaged ({error!r})")
            raise self.damage from error

    def _at_once(self, commands: Sequence[Command]) -> list[Any]:
        """Replies of one moment: no commit was in between. A transaction comes last: a full server refuses it."""
        at: Command = ("HGET", self._keys.meta, b"commit")
        for _ in range(_MOMENT_TRIES):
            before, *replies, after = self._server.ask([at, *commands, at])
            if before == after:
                return replies
        return self._server.ask_at_once(commands)

    def _ask(self, commands: Sequence[Command]) -> tuple[_Seen, list[Any]]:
        """Replies, and the places of the same moment."""
        head: Command = ("HMGET", self._keys.meta, b"instance", b"session", VERSION)
        seen = self._seen
        if seen is not None:
            state, *replies = self._at_once([head, *commands])
            if tuple(state) == seen.state:
                return seen, replies
        state, stored, *replies = self._at_once([head, ("HGETALL", self._keys.places), *commands])
        places = live_places(int.from_bytes(state[2] or b"", "big"), decode_places(pairs(stored)))
        same_session = seen is not None and seen.state[:2] == (state[0], state[1])
        scopes = seen.scopes if seen is not None and same_session else ScopeNames(cast("Any", TABLES.scopes))
        seen = self._seen = _Seen((state[0], state[1], state[2]), places, scopes)
        return seen, replies

    def get(self, key: bytes, default: bytes | None = None, *, db: str) -> bytes | None:
        """What `ScopeNames` asks of a transaction: the scopes only grow, so they are read when they are needed."""
        value: bytes | None = self._server.ask([("HGET", self._keys.tables[db], key)])[0]
        return default if value is None else value

    def cursors(self) -> dict[str, Cursor]:
        with self._decoding():
            stored = self._server.ask([("HGETALL", self._keys.tables["streams"])])[0]
            return {name.decode(): _decode_cursor(value) for name, value in pairs(stored)}

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        with self._decoding():
            commands, _ = self._keys.fetch([row_key(block_hash)])
            seen, [[row]] = self._ask(commands)
            if row is None:
                return []
            found = (self._residency(seen, block_hash, entry) for entry in unpack(row)[1])
            return [one for one in found if one is not None and (scope is None or one.key.scope == scope)]

    def prefix_scan(
        self,
        scope: IdentityScope,
        prefix_hash: bytes,
        unchanging: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[CacheResidency]:
        """Children are looked up before their rows: again when there was a commit in between, at last `unchanging`."""
        self.prefix_scans += 1
        with self._decoding():
            for _ in range(_SCAN_TRIES):
                found = self._children(scope, prefix_hash)
                if found is not None:
                    return found
            with unchanging():
                found = self._children(scope, prefix_hash)
            if found is None:
                raise BackendError("the index changes too fast for this question: ask again")
            return found

    def _children(self, scope: IdentityScope, parent: bytes) -> list[CacheResidency] | None:
        keys = self._keys
        at: Command = ("HGET", keys.meta, b"commit")
        prefix = link_prefix(parent)
        after = prefix[:-1] + b"\x02"
        asked: list[Command] = [at, ("ZRANGEBYLEX", keys.links, b"[" + prefix, b"(" + after)]
        if parent:
            asked += keys.fetch([row_key(parent)])[0]
        _, [commit, links, *row] = self._ask(asked)
        children = {link[len(prefix) :] for link in links}
        if row and row[0][0]:
            inline = unpack(row[0][0])[0]
            if inline:
                children.add(inline)
        if not children:
            return []
        commands, groups = keys.fetch([row_key(child) for child in sorted(children)])
        seen, [commit_then, *replies] = self._ask([at, *commands])
        if commit_then != commit:
            return None
        number = seen.scopes.number(cast("Any", self), scope)
        residencies = (
            self._residency(seen, key[1:-1], entry)
            for key, stored in found_rows(groups, replies).items()
            for entry in unpack(stored)[1]
            if entry.scope == number and entry.parent == parent
        )
        return [one for one in residencies if one is not None]

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        with self._decoding():
            keys = [LENGTH[len(one)] + one + ROW for one in block_hashes]
            seen, masks = self._masks(scope, keys[:_MATCH_FIRST])
            if len(keys) > _MATCH_FIRST:
                last_held = max((mask.bit_length() - 1 for mask in masks.values()), default=-1)
                if last_held >= _MATCH_FIRST - seen.places.patience:
                    seen, masks = self._masks(scope, keys)
            held = [
                Held(row.worker_id, row.rank, row.tier, row.group, mask)
                for row, mask in ((seen.places.rows[place], mask) for place, mask in masks.items())
            ]
            return worker_matches(held, seen.places.specs)

    def _masks(self, scope: IdentityScope | None, keys: Sequence[bytes]) -> tuple[_Seen, dict[int, int]]:
        """Which of the rows each place has an entry in, as bits."""
        commands, groups = self._keys.fetch(keys)
        seen, replies = self._ask(commands)
        number = None if scope is None else seen.scopes.number(cast("Any", self), scope)
        masks: dict[int, int] = {}
        if scope is not None and number is None:
            return seen, masks
        found = found_rows(groups, replies)
        for head, mask in masks_by_head([found.get(key, b"") for key in keys]).items():
            place, holder_scope = HOLDER.unpack(head)
            if (number is None or holder_scope == number) and place in seen.places.rows:
                masks[place] = masks.get(place, 0) | mask
        return seen, masks

    def holdings(self) -> list[Holding]:
        with self._decoding():
            seen, [stored] = self._ask([("HGETALL", self._keys.tables["counts"])])
            counts = {PLACE.unpack(key)[0]: COUNT.unpack(value) for key, value in pairs(stored)}
            return [
                Holding(row.worker_id, row.rank, row.tier, row.group, row.spec, *counts.get(number, (0, 0)))
                for number, row in seen.places.rows.items()
            ]

    def places(self) -> dict[int, PlaceRow]:
        """The live places."""
        return self._ask(())[0].places.rows

    def workers(self) -> set[str]:
        """Who had places at the last question."""
        return set() if self._seen is None else {row.worker_id for row in self._seen.places.rows.values()}

    def records(self, places: dict[int, PlaceRow], frozen: Frozen, count: int) -> Iterator[CacheResidency]:
        """Every record, some `count`, of the moment when `frozen` began to keep what changes and `places` were read."""
        step = max(1, min(BUCKETS, BUCKETS * _SNAPSHOT_ROWS // max(count, 1)))
        for start in range(0, BUCKETS, step):
            with self._decoding():
                buckets = range(start, min(start + step, BUCKETS))
                seen, replies = self._ask([("HGETALL", self._keys.buckets[bucket]) for bucket in buckets])
                for bucket, stored in zip(buckets, replies):
                    rows: dict[bytes, bytes | None] = dict(pairs(stored))
                    rows.update(frozen.take(bucket))
                    for key, row in rows.items():
                        for entry in unpack(row)[1] if row is not None else ():
                            one = self._residency(seen, key[1:-1], entry, places)
                            if one is not None:
                                yield one

    def _residency(
        self, seen: _Seen, block_hash: bytes, entry: Entry, places: dict[int, PlaceRow] | None = None
    ) -> CacheResidency | None:
        place = (seen.places.rows if places is None else places).get(entry.place)
        if place is None:
            return None
        return residency(place, seen.scopes.scope(cast("Any", self), entry.scope), block_hash, entry)
