"""How the index lies in a Holt tree: one tree, ordered by key.

    01 | name of the block | place                         row of a block at a place: its entries
    02 | name of the parent | place | name of the child    link to a child of that place; exactly while an entry says so

    name   := len digits hash
    digits := the first 4 bytes of the hash, 2 bits in each byte
    row    := entry*, one for each scope, so nearly always one
    entry  := scope (4) copies (4) index (4, signed, -1 unknown) tokens (4) last access ms (8) bytes (8) flags (1)
              parent_len (1) parent

    ff | p | place   msgpack PlaceRow               ff | n | place         records (8) bytes (8)
    ff | d | place   dead                           ff | m | len | name    schema, numbers, number of the last batch
    ff | s | scope   msgpack IdentityScope          ff | h | digest        number of the scope
    ff | c | len | stream   msgpack Cursor

All integers are big-endian; `len` is 1 byte, that of a stream 4. `place` numbers a (worker, tier, group), see
`kvcensus.backends.entries`. A key is a path: all that is asked for lies under one, the holders of a block under its
hash, the children of a block under theirs.

No key is the beginning of another one, which is why a length stands before everything whose length varies: the tree
ends a key with a zero byte, and cannot tell `x` from `x 00` where both are there.

The digits are for the tree to branch by. It keeps whole subtrees in frames of 512 KiB, and divides a full frame by
giving one branch a frame of its own. By the bytes of a hash that is one of 256 branches, and most of each frame stays
empty; by digits it is one of four. Rows and links are two branches of the root, for a leaf hangs where its key begins
to differ, and below a hash that has both a prefix node of 128 bytes would stand.
"""

from __future__ import annotations

from kvcensus.backends.model import MAX_HASH_BYTES
from kvcensus.backends.placed_rows import CURSOR_KEY, LENGTH, META_KEY, NUMBER

SCHEMA = 1
"""Version of everything above. An index of another version is refused."""

ROW = b"\x01"
LINK = b"\x02"

DIGITS = tuple(bytes((byte >> 6, byte >> 4 & 3, byte >> 2 & 3, byte & 3)) for byte in range(256))
"""What the tree branches by, for each byte."""
_SPREAD = 4
"""Bytes at the beginning of a hash that are spread: 16 digits tell 4 billion hashes apart."""
HASH_AT = tuple(1 + len(DIGITS[0]) * min(length, _SPREAD) for length in range(MAX_HASH_BYTES + 1))
"""Where in its name a hash of each length begins."""


def short_name(block_hash: bytes) -> bytes:
    """A hash and its length before it, as it stands in a row."""
    return LENGTH[len(block_hash)] + block_hash


def name_of(block_hash: bytes) -> bytes:
    """A hash as it stands in a key."""
    digits = map(DIGITS.__getitem__, block_hash[:_SPREAD])
    return b"".join((LENGTH[len(block_hash)], *digits, block_hash))


def rows_of(block_hash: bytes) -> bytes:
    """What the keys of all rows of a block begin with."""
    return ROW + name_of(block_hash)


def links_of(parent: bytes) -> bytes:
    """What the keys of all links from a block, or from `ROOT`, begin with."""
    return LINK + name_of(parent)


def link_key(parent_name: bytes, place: bytes, child_name: bytes) -> bytes:
    """The key of a link, of two names and a packed place."""
    return LINK + parent_name + place + child_name


def _place_at(key: bytes) -> int:
    return 1 + HASH_AT[key[1]] + key[1]


def place_of(key: bytes) -> int:
    """The place of a row or a link, by its key."""
    return int(NUMBER.unpack_from(key, _place_at(key))[0])


def block_of(row_key: bytes) -> bytes:
    """The hash of a block, by the key of a row of it."""
    return row_key[1 + HASH_AT[row_key[1]] : -NUMBER.size]


def child_of(key: bytes) -> bytes:
    """The hash of the child, by the key of a link."""
    at = _place_at(key) + NUMBER.size
    return key[at + HASH_AT[key[at]] :]


def meta_key(name: str) -> bytes:
    """The key of one of the few values that belong to the whole index."""
    return META_KEY + bytes((len(name),)) + name.encode()


def cursor_key(stream: str) -> bytes:
    """The key of a stream's cursor."""
    name = stream.encode()
    return CURSOR_KEY + NUMBER.pack(len(name)) + name


def stream_of(key: bytes) -> str:
    """The name of a stream, by the key of its cursor."""
    return key[len(CURSOR_KEY) + NUMBER.size :].decode()
