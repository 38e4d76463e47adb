"""Freeing the rows of cleared workers, a bounded number of rows at a time.

A pass walks the whole tree once and drops the entries of the places that were dead when it began. Its position and its
places are stored, so a pass goes on after a restart; places that die during it wait for the next one.
"""

from __future__ import annotations

from itertools import islice

import lmdb

from .batch import Batch
from .catalog import Tables
from .rows import PLACE, holders

_POSITION = b"sweep_position"
_PLACES = b"sweep_places"


def sweep(txn: lmdb.Transaction[bytes], tables: Tables, batch: Batch, rows: int) -> bool:
    """Look at the next `rows` keys. Returns whether there is more to do."""
    position = txn.get(_POSITION, db=tables.meta)
    if position is None:
        packed = b"".join(txn.cursor(tables.dead).iternext(values=False))
        txn.put(_PLACES, packed, db=tables.meta)
        position = b"\x00"
    packed = txn.get(_PLACES, b"", db=tables.meta)
    dead = {place for (place,) in PLACE.iter_unpack(packed)}
    cursor = txn.cursor(tables.blocks)
    last = None
    stale = []
    if cursor.set_range(position):
        for key, row in islice(cursor.iternext(), rows):
            last = key
            if row and any(place in dead for place, _ in holders(row)):
                stale.append(key)
    for key in stale:
        batch.purge(key, key[1:-1])
    if last is not None:
        txn.put(_POSITION, last + b"\x00", db=tables.meta)
        return True
    txn.delete(_POSITION, db=tables.meta)
    txn.delete(_PLACES, db=tables.meta)
    for place in dead:
        txn.delete(PLACE.pack(place), db=tables.dead)
    return bool(txn.stat(tables.dead)["entries"])
