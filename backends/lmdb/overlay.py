"""The rows and links of one write transaction: fetched together, changed in memory, written once in key order."""

from __future__ import annotations

from collections.abc import Iterable

import lmdb

from .rows import LENGTH, ROW, link_key


class Overlay:
    """What the transaction makes of the `blocks` table. `write` writes it; the caller commits."""

    def __init__(self, txn: lmdb.Transaction[bytes], blocks: lmdb._Database) -> None:
        self._txn = txn
        self._blocks = blocks
        self.rows: dict[bytes, bytes | None] = {}
        """By key, as they will be; None for no row. In key order, less the rows fetched one by one."""
        self._stored: dict[bytes, bytes] = {}
        self._links: dict[bytes, bool] = {}

    def fetch(self, keys: Iterable[bytes]) -> None:
        """Look up rows together. Called once, before anything else."""
        self.rows = dict.fromkeys(sorted(keys))
        self._stored = dict(self._txn.cursor(self._blocks).getmulti(list(self.rows)))
        self.rows.update(self._stored)

    def row(self, key: bytes) -> bytes | None:
        """One row, fetched if it was not yet."""
        try:
            return self.rows[key]
        except KeyError:
            row = self.rows[key] = self._txn.get(key, db=self._blocks)
            if row is not None:
                self._stored[key] = row
            return row

    def link(self, parent: bytes, child: bytes) -> None:
        """Make a child findable from its parent: in the parent's row if that is at hand and has room, else by a key."""
        key = LENGTH[len(parent)] + parent + ROW
        row = self.rows.get(key)
        if row is not None:
            if row[0] == 0:
                self.rows[key] = LENGTH[len(child)] + child + row[1:]
                return
            if row[1 : 1 + row[0]] == child:
                return
        self._links[link_key(parent, child)] = True

    def link_by_key(self, parent: bytes, child: bytes) -> None:
        """Make a child findable from a parent that has no row."""
        self._links[link_key(parent, child)] = True

    def unlink(self, parent: bytes, child: bytes) -> None:
        """Drop the link by key, if there is one."""
        self._links[link_key(parent, child)] = False

    def write(self) -> int:
        """Write what has changed. Returns the bytes of the keys and values written."""
        rows, stored = self.rows, self._stored
        puts = [key for key, row in rows.items() if row is not None and row is not stored.get(key)]
        deletes = [key for key in stored if rows[key] is None]
        for key, wanted in self._links.items():
            if wanted:
                rows[key] = b""
                puts.append(key)
            else:
                deletes.append(key)
        puts.sort()
        values = [row for row in map(rows.__getitem__, puts) if row is not None]
        if puts:
            self._txn.cursor(self._blocks).putmulti(zip(puts, values))
        for key in sorted(deletes):
            self._txn.delete(key, db=self._blocks)
        return sum(map(len, puts)) + sum(map(len, values))
