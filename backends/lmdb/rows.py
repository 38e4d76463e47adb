"""How the index lies in the LMDB file.

One B-tree (`blocks`) has all that is per block. A key starts with the length of a hash and the hash, so everything
about one block is on one leaf page:

    len | block hash | 00                  row of a block: its holders
    len | parent hash | 01 | child hash    link from a parent to a child, no value
    00 | 01 | child hash                   link from the root to the start of a chain

    row    := child_len (1) child  entry*
    entry  := place (4) scope (4) copies (4) index (4, signed, -1 unknown) tokens (4) last access ms (8) bytes (8)
              flags (1) parent_len (1) parent

All integers are big-endian. `child` is one child of the block: a link that costs no key of its own. Other children, and
those of a block without a row, have links by key.
A reader checks a child found by either link against the child's own row, so a link may outlive what it points to.

`place` numbers a (worker, tier, group). Clearing a worker ends its places: entries under their numbers are dead from
that commit on and are swept later. Numbers are never used twice. The small tables beside `blocks`:

    places   place (4)  -> msgpack PlaceRow         counts   place (4) -> records (8) bytes (8)
    scopes   scope (4)  -> msgpack IdentityScope     dead     place (4) -> nothing
    streams  name       -> msgpack Cursor            meta     schema, numbers, versions, sweep position
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named like one

from ..entries import Entry
from ..model import MAX_HASH_BYTES

SCHEMA = 1
"""Version of everything above. A file of another version is refused."""

ROW = b"\x00"
LINK = b"\x01"
ROOT_LINK = b"\x00\x01"

ENTRY = Struct(">IIIiIQQBB")
ENTRY_SIZE = ENTRY.size
PARENT_LEN_AT = ENTRY_SIZE - 1
ROW_OF_ONE = Struct(">BIIIiIQQBB")
"""A row of one entry without a child, up to the parent."""
_PLACE_SCOPE_INDEX = Struct(">II4xi")
HOLDER = Struct(">II")
HOLDER_SIZE = HOLDER.size
PLACE = Struct(">I")
COUNT = Struct(">QQ")

_TOGETHER_MIN = 8
"""Rows of one size in a row from which on it pays to compare them as one."""

LENGTH = tuple(bytes((length,)) for length in range(MAX_HASH_BYTES + 1))
"""What a hash of each length is preceded by."""

NOBODY = (-1, -1, -1)
"""The (place, scope, index) of no entry."""

PINNED = 1
PARENT_KNOWN = 2


def row_key(block_hash: bytes) -> bytes:
    """The key of a block's row."""
    return LENGTH[len(block_hash)] + block_hash + ROW


def link_prefix(parent: bytes) -> bytes:
    """What the keys of all links from a parent start with; `ROOT` gives the starts of chains."""
    return b"%c%b\x01" % (len(parent), parent)


def link_key(parent: bytes, child: bytes) -> bytes:
    """The key of the link from a parent to a child."""
    return b"%c%b\x01%b" % (len(parent), parent, child)


def pack_entry(entry: Entry) -> bytes:
    """An entry as bytes."""
    parent = entry.parent
    flags = (PINNED if entry.pinned else 0) | (0 if parent is None else PARENT_KNOWN)
    return ENTRY.pack(*entry[:7], flags, len(parent or b"")) + (parent or b"")


def pack_row(child: bytes, entries: list[Entry]) -> bytes:
    """A row as bytes."""
    return b"".join((bytes((len(child),)), child, *map(pack_entry, entries)))


def unpack_row(row: bytes) -> tuple[bytes, list[Entry]]:
    """The inline child (b"" for none) and the entries of a row. Raises struct.error for a row that was cut."""
    at = 1 + row[0]
    child = row[1:at]
    entries = []
    end = len(row)
    while at < end:
        place, scope, copies, index, tokens, at_ms, size, flags, parent_len = ENTRY.unpack_from(row, at)
        at += ENTRY_SIZE
        parent = row[at : at + parent_len] if flags & PARENT_KNOWN else None
        entries.append(Entry(place, scope, copies, index, tokens, at_ms, size, bool(flags & PINNED), parent))
        at += parent_len
    if at > end:
        raise StructError("the row ends within an entry")
    return child, entries


def sole_entry(row: bytes) -> Entry | None:
    """The only entry of a row, None when there are more."""
    at = 1 + row[0]
    place, scope, copies, index, tokens, at_ms, size, flags, parent_len = ENTRY.unpack_from(row, at)
    at += ENTRY_SIZE
    if at + parent_len != len(row):
        return None
    parent = row[at:] if flags & PARENT_KNOWN else None
    return Entry(place, scope, copies, index, tokens, at_ms, size, bool(flags & PINNED), parent)


def sole_holder(row: bytes) -> tuple[int, int, int]:
    """The (place, scope, index) of the only entry of a row; `NOBODY` when there are more."""
    at = 1 + row[0]
    if at + ENTRY_SIZE + row[at + PARENT_LEN_AT] == len(row):
        return _PLACE_SCOPE_INDEX.unpack_from(row, at)
    return NOBODY


def holders(row: bytes) -> list[tuple[int, int]]:
    """The (place, scope) of each entry of a row: all that `match` needs."""
    at = 1 + row[0]
    end = len(row)
    found = []
    while at < end:
        found.append(HOLDER.unpack_from(row, at))
        at += ENTRY_SIZE + row[at + PARENT_LEN_AT]
    return found


def masks_by_head(rows: Iterable[bytes]) -> dict[bytes, int]:
    """In which of the rows there is an entry of a place and scope, as bits; by the bytes of the two. b"" is no row."""
    masks: dict[bytes, int] = {}
    bit = 1
    for size, group in groupby(rows, len):
        alike = list(group)
        heads = _heads_of_all(alike, size) if size and len(alike) >= _TOGETHER_MIN else None
        if heads is not None:
            every = ((1 << len(alike)) - 1) * bit
            for head in heads:
                masks[head] = masks.get(head, 0) | every
        elif size:
            _mask_one_by_one(alike, bit, masks)
        bit <<= len(alike)
    return masks


def _heads_of_all(rows: Sequence[bytes], size: int) -> list[bytes] | None:
    """The heads of the entries of each of these rows of one size, None when they are not the same in every row.

    A chain is held by the same workers for most of its length, and then its rows differ only in hashes and indexes.
    """
    first = rows[0]
    heads = []
    decisive = [0]
    at = 1 + first[0]
    while at < size:
        heads.append(first[at : at + HOLDER_SIZE])
        decisive += range(at, at + HOLDER_SIZE)
        at += PARENT_LEN_AT
        decisive.append(at)
        at += 1 + first[at]
    packed = b"".join(rows)
    count = len(rows)
    if all(packed[column::size].count(first[column]) == count for column in decisive):
        return heads
    return None


def _mask_one_by_one(rows: Sequence[bytes], bit: int, masks: dict[bytes, int]) -> None:
    for row in rows:
        at = 1 + row[0]
        end = len(row)
        while at < end:
            head = row[at : at + HOLDER_SIZE]
            masks[head] = masks.get(head, 0) | bit
            at += ENTRY_SIZE + row[at + PARENT_LEN_AT]
        bit <<= 1
