"""Freeing the rows of cleared workers, a bounded number of rows at a time.

A pass walks all buckets once and drops the entries of the places that were dead when it began. Where it stands is known
to this process alone: another one begins again.
"""

from __future__ import annotations

from typing import Any

from ..lmdb.batch import Batch
from ..lmdb.rows import PLACE, holders
from .layout import BUCKETS, Keys, pairs
from .transaction import Transaction


class Sweep:
    """The pass that is under way, if any. `has_dead` says that there is something to free, as of the last commit."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.has_dead = False
        self.restart()

    def restart(self) -> None:
        """Begin a new pass at the next step: the last one may not count, or the server may be another process.

        Where HSCAN stands is a place in the hash table of the process that was asked.
        """
        self._bucket = 0
        self._cursor: Any = 0
        self._dead: set[int] | None = None

    def step(self, txn: Transaction, batch: Batch, rows: int, *, empty: bool) -> bool:
        """Look at about `rows` rows. `empty`: no place is alive, everything goes at once. True while there is more."""
        keys = self._keys
        if self._dead is None or empty:
            stored = txn.ask([("HKEYS", keys.tables["dead"])])[0]
            self._dead = {PLACE.unpack(key)[0] for key in stored}
        if empty:
            txn.commands += [("UNLINK", *keys.buckets), ("UNLINK", keys.links)]
            return self._end(txn)
        looked = 0
        stale: list[bytes] = []
        while self._bucket < BUCKETS and looked < rows:
            [(self._cursor, flat)] = txn.ask(
                [("HSCAN", keys.buckets[self._bucket], self._cursor, "COUNT", max(1, rows - looked))]
            )
            stale += [key for key, row in pairs(flat) if any(place in self._dead for place, _ in holders(row))]
            looked += len(flat) // 2 or 1
            if int(self._cursor) == 0:
                self._bucket += 1
        batch.purge_all(stale)
        return self._end(txn) if self._bucket == BUCKETS else True

    def _end(self, txn: Transaction) -> bool:
        dead = self._dead or set()
        for place in dead:
            txn.delete(PLACE.pack(place), db="dead")
        left = txn.ask([("HLEN", self._keys.tables["dead"])])[0] - len(dead)
        self.restart()
        return bool(left > 0)
