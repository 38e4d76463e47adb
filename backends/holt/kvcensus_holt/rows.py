"""How the index lies in a Holt tree: one tree, ordered by key.

    01 | name of the block | place                         row of a block at a place: its entries
    02 | name of the parent | name of the child | place    link to a child at a place; exactly while an entry says so

    name   := len digits hash
    digits := the last 2 bytes of the hash's CRC-32, 2 bits in each byte
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
empty; by digits it is one of four. They are of a checksum, for hashes need not be random where they begin. Rows and
links are two branches of the root, for a leaf hangs where its key begins to differ, and below a hash that has both a
prefix node of 128 bytes would stand.
"""

from __future__ import annotations

from zlib import crc32

from kvcensus.backends.placed_rows import CURSOR_KEY, LENGTH, META_KEY, NUMBER

SCHEMA = 1
"""Version of everything above. An index of another version is refused."""

ROW = b"\x01"
LINK = b"\x02"

_DIGITS = tuple(bytes((byte >> 6, byte >> 4 & 3, byte >> 2 & 3, byte & 3)) for byte in range(256))
"""What the tree branches by, for each byte."""
_HASH_AT = 1 + 2 * len(_DIGITS[0])
"""Where in its name a hash begins."""


def name_of(block_hash: bytes) -> bytes:
    """A hash as it stands in a key."""
    checksum = crc32(block_hash)
    return LENGTH[len(block_hash)] + _DIGITS[checksum >> 8 & 255] + _DIGITS[checksum & 255] + block_hash


def rows_of(block_hash: bytes) -> bytes:
    """What the keys of all rows of a block begin with."""
    return ROW + name_of(block_hash)


def links_of(parent: bytes) -> bytes:
    """What the keys of all links from a block, or from `ROOT`, begin with."""
    return LINK + name_of(parent)


def link_key(parent_row_key: bytes, row_key: bytes) -> bytes:
    """The key of the link from a parent to a block, by the keys of their rows at a place."""
    return LINK + parent_row_key[len(ROW) : -NUMBER.size] + row_key[len(ROW) :]


def row_linked(link: bytes) -> bytes:
    """The key of the row that a link leads to."""
    return ROW + link[len(LINK) + _HASH_AT + link[len(LINK)] :]


def place_of(key: bytes) -> int:
    """The place of a row or a link, by its key."""
    return int(NUMBER.unpack(key[-NUMBER.size :])[0])


def block_of(row_key: bytes) -> bytes:
    """The hash of a block, by the key of a row of it."""
    return row_key[len(ROW) + _HASH_AT : -NUMBER.size]


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
