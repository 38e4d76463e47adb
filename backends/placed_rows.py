"""What stores have in common that keep a row of its own for each (block, place): the row, and small tables beside them.

    row    := entry*, one for each scope, so nearly always one
    entry  := scope (4) copies (4) index (4, signed, -1 unknown) tokens (4) last access ms (8) bytes (8) flags (1)
              parent_len (1) parent

All integers are big-endian. The place is in the key: what the keys are, of blocks and within the tables, is each
store's own, see `rocksdb.rows`.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named like one

from .entries import Entry
from .model import MAX_HASH_BYTES

PLACE_KEY = b"\xffp"
COUNT_KEY = b"\xffn"
DEAD_KEY = b"\xffd"
META_KEY = b"\xffm"
SCOPE_KEY = b"\xffs"
DIGEST_KEY = b"\xffh"
CURSOR_KEY = b"\xffc"

ENTRY = Struct(">IIiIQQBB")
ENTRY_SIZE = ENTRY.size
PARENT_LEN_AT = ENTRY_SIZE - 1
SCOPE_AND_INDEX = Struct(">I4xi")
NUMBER = Struct(">I")
COUNT = Struct(">QQ")

LENGTH = tuple(bytes((length,)) for length in range(MAX_HASH_BYTES + 1))
"""What a hash of each length is preceded by."""

PINNED = 1
PARENT_KNOWN = 2


def pack_entry(entry: Entry) -> bytes:
    """An entry as bytes; its place is in the key."""
    parent = entry.parent
    flags = (PINNED if entry.pinned else 0) | (0 if parent is None else PARENT_KNOWN)
    return ENTRY.pack(*entry[1:7], flags, len(parent or b"")) + (parent or b"")


def unpack_row(place: int, row: bytes) -> list[Entry]:
    """The entries of a row. Raises struct.error for a row that was cut."""
    entries = []
    at, end = 0, len(row)
    while at < end:
        scope, copies, index, tokens, at_ms, size, flags, parent_len = ENTRY.unpack_from(row, at)
        at += ENTRY_SIZE
        parent = row[at : at + parent_len] if flags & PARENT_KNOWN else None
        entries.append(Entry(place, scope, copies, index, tokens, at_ms, size, bool(flags & PINNED), parent))
        at += parent_len
    if at > end:
        raise StructError("the row ends within an entry")
    return entries


def is_sole(row: bytes) -> bool:
    """Whether a row has one entry."""
    return ENTRY_SIZE + row[PARENT_LEN_AT] == len(row)


def scopes_in(row: bytes) -> list[bytes]:
    """The packed scope number of each entry of a row: all that `match` needs."""
    if ENTRY_SIZE + row[PARENT_LEN_AT] == len(row):
        return [row[:4]]
    found = []
    at, end = 0, len(row)
    while at < end:
        found.append(row[at : at + 4])
        at += ENTRY_SIZE + row[at + PARENT_LEN_AT]
    return found
