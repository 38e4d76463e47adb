"""How the index lies in RocksDB: one column family, ordered by key.

    len | block hash  | 00 | place               row of a block at a place: its entries
    len | parent hash | 01 | place | child hash  link to a child of that place, no value; exactly while an entry says so
    00 | 01 | place | child hash                 link to the start of a chain

    row    := entry*, one for each scope, so nearly always one
    entry  := scope (4) copies (4) index (4, signed, -1 unknown) tokens (4) last access ms (8) bytes (8) flags (1)
              parent_len (1) parent

    ff | p | place   msgpack PlaceRow               ff | n | place   records (8) bytes (8)
    ff | d | place   dead, no value                 ff | m | name    schema, numbers, sweep position
    ff | s | scope   msgpack IdentityScope          ff | h | digest  number of the scope
    ff | c | stream  msgpack Cursor

All integers are big-endian. `place` numbers a (worker, tier, group), see `backends.entries`.

Why so: an LSM tree writes every changed value anew, several times, and answers "there is no such key" from a filter.
With a key of its own for each holder, a store writes its own record and not those of everybody else who holds the
block; whether the record exists costs no read of a file while it does not; removing it is a tombstone. The keys of one
block lie together under a prefix of 9 bytes, for which there is a filter too, and a scan never leaves the prefix: it
does not walk over the tombstones of other blocks.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named like one

from ..entries import Entry
from ..model import MAX_HASH_BYTES

SCHEMA = 1
"""Version of everything above. An index of another version is refused."""

ROW = b"\x00"
LINK = b"\x01"
PREFIX_SIZE = 9
"""The length of a hash and its first 8 bytes. Shorter hashes, and the root, have no such prefix."""

PLACE_KEY = b"\xffp"
COUNT_KEY = b"\xffn"
DEAD_KEY = b"\xffd"
META_KEY = b"\xffm"
SCOPE_KEY = b"\xffs"
DIGEST_KEY = b"\xffh"
CURSOR_KEY = b"\xffc"
BLOCKS = (b"\x00", b"\xff")
"""Where the keys of blocks begin, and before which key they end."""

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


def name_of(block_hash: bytes) -> bytes:
    """What every key of a block begins with. `ROOT` gives that of the root."""
    return LENGTH[len(block_hash)] + block_hash


def row_suffix(place: int) -> bytes:
    """What follows the name of a block in the key of its row at a place."""
    return ROW + NUMBER.pack(place)


def link_infix(place: int) -> bytes:
    """What stands between the name of the parent and the child's hash in the key of a link at a place."""
    return LINK + NUMBER.pack(place)


def place_of(key: bytes) -> int:
    """The place of a row or a link, by its key."""
    return int(NUMBER.unpack_from(key, 2 + key[0])[0])


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
