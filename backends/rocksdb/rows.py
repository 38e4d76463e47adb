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

from ..placed_rows import CURSOR_KEY, LENGTH, META_KEY, NUMBER

SCHEMA = 1
"""Version of everything above. An index of another version is refused."""

ROW = b"\x00"
LINK = b"\x01"
SUFFIX_SIZE = len(ROW) + NUMBER.size
"""What follows the name of a block in the key of a row."""
PREFIX_SIZE = 9
"""The length of a hash and its first 8 bytes. Shorter hashes, and the root, have no such prefix."""
BLOCKS = (b"\x00", b"\xff")
"""Where the keys of blocks begin, and before which key they end."""


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


def meta_key(name: str) -> bytes:
    """The key of one of the few values that belong to the whole index."""
    return META_KEY + name.encode()


def cursor_key(stream: str) -> bytes:
    """The key of a stream's cursor."""
    return CURSOR_KEY + stream.encode()


def stream_of(key: bytes) -> str:
    """The name of a stream, by the key of its cursor."""
    return key[len(CURSOR_KEY) :].decode()
