"""Block hashes of the wire as the opaque bytes of the index.

An integer becomes 8 bytes, big-endian two's complement: the signed and the unsigned form of one 64-bit pattern are the
same block. A byte string stays as it is. msgpack writes nearly every hash as a one-byte mark and those very 8 bytes, or
as a two-byte mark and 16 or 32 bytes; a list of such equal items is cut up without making an integer of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct

import msgspec

from kvcensus.backends.model import MAX_HASH_BYTES

from .packed import array_header

HASHES_MAX = 1 << 20
"""Hashes of one event, and of one payload: 16 million tokens in blocks of 16. A byte on the wire may become fifty."""

PATTERN_BYTES = 8
"""The length of a hash that came as an integer."""

_WIDE_INTEGERS = b"\xcf\xd3"
_WIDE = 1 + PATTERN_BYTES
_BIN8 = 0xC4
_ONE_ITEM = 0x91
_LAYOUT_ITEMS_MAX = 512
_decode_list = msgspec.msgpack.Decoder(list[int | bytes]).decode


class BadHash(ValueError):
    """A block hash that cannot be one. `position` is its place in the list, None for a hash that stands alone."""

    def __init__(self, detail: str, position: int | None = None) -> None:
        super().__init__(detail)
        self.position = position


def hash_bytes(value: int | bytes, cut: bool = False) -> bytes:
    """One hash. `cut` leaves of a longer byte string its last 8 bytes: what vLLM would have sent as an integer.

    Raises BadHash for an integer of more than 64 bits and for a byte string of 0 or more than MAX_HASH_BYTES bytes.
    """
    if isinstance(value, bytes):
        if not 1 <= len(value) <= MAX_HASH_BYTES:
            raise BadHash(f"a block hash of {len(value)} bytes; 1 to {MAX_HASH_BYTES} are accepted")
        return value[-PATTERN_BYTES:] if cut else value
    try:
        return value.to_bytes(PATTERN_BYTES, "big", signed=value < 0)
    except OverflowError:
        raise BadHash(f"the block hash {value} does not fit in 64 bits") from None


def hashes_bytes(values: Sequence[int | bytes], cut: bool = False) -> tuple[bytes, ...]:
    """Many hashes, as `hash_bytes` does each. Raises BadHash with the position of the first bad one."""
    hashes = []
    for position, value in enumerate(values):
        try:
            hashes.append(hash_bytes(value, cut))
        except BadHash as bad:
            raise BadHash(str(bad), position) from None
    return tuple(hashes)


def unpack_hashes(raw: msgspec.Raw, cut: bool = False) -> tuple[tuple[bytes, ...], bool]:
    """The hashes of a msgpack array of integers and byte strings, and whether any was an integer.

    `raw` is well-formed msgpack. Raises BadHash for a bad element, ValueError if it is no array.
    """
    packed = bytes(raw)
    if packed[0] == _ONE_ITEM and packed[1] in _WIDE_INTEGERS:
        return (packed[2:],), True
    count, start = array_header(packed)
    if not count:
        return (), False
    if count > HASHES_MAX:
        raise BadHash(f"{count} block hashes; at most {HASHES_MAX} are taken", HASHES_MAX)
    mark = packed[start]
    if mark in _WIDE_INTEGERS:
        if not packed[start::_WIDE].strip(_WIDE_INTEGERS):
            return _pieces(packed, start, count, 1, PATTERN_BYTES), True
    elif mark == _BIN8:
        size = packed[start + 1]
        if 1 <= size <= MAX_HASH_BYTES and _all_bin8(packed, start, count, size):
            kept = PATTERN_BYTES if cut and size > PATTERN_BYTES else size
            return _pieces(packed, start, count, 2 + size - kept, kept), False
    return _unpack_one_by_one(packed, cut)


def _all_bin8(packed: bytes, start: int, count: int, size: int) -> bool:
    width = 2 + size
    if len(packed) - start != count * width:
        return False
    return packed[start::width].count(_BIN8) == count and packed[start + 1 :: width].count(size) == count


def _pieces(packed: bytes, start: int, count: int, skip: int, size: int) -> tuple[bytes, ...]:
    """`count` times: skip some bytes, take some."""
    if count <= _LAYOUT_ITEMS_MAX:
        return _layout(count, skip, size).unpack_from(packed, start)
    width = skip + size
    return tuple([packed[at : at + size] for at in range(start + skip, start + count * width, width)])


@lru_cache(maxsize=2 * _LAYOUT_ITEMS_MAX)
def _layout(count: int, skip: int, size: int) -> Struct:
    return Struct(f"{skip}x{size}s" * count)


def _unpack_one_by_one(packed: bytes, cut: bool) -> tuple[tuple[bytes, ...], bool]:
    try:
        values = _decode_list(packed)
    except msgspec.DecodeError:
        raise _first_bad(packed) from None
    return hashes_bytes(values, cut), any(isinstance(value, int) for value in values)


def _first_bad(packed: bytes) -> BadHash:
    for position, item in enumerate(msgspec.msgpack.decode(packed, type=list[msgspec.Raw])):
        try:
            msgspec.msgpack.decode(item, type=int | bytes)
        except msgspec.DecodeError as error:
            return BadHash(str(error), position)
    return BadHash("a block hash that is neither an integer nor a byte string")
