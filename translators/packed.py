"""What can be read off msgpack without unpacking it."""

from __future__ import annotations

import msgspec

NIL = 0xC0

_FIXARRAY = 0x90
_FIXARRAY_ITEMS_MAX = 15
_ARRAY16 = 0xDC
_ARRAY32 = 0xDD
_FIXMAP = 0x80
_MAP16 = 0xDE
_MAP32 = 0xDF


def array_header(packed: bytes) -> tuple[int, int]:
    """The number of items of a msgpack array and where the first one starts. Raises ValueError if it is no array."""
    mark = packed[0]
    items = mark - _FIXARRAY
    if 0 <= items <= _FIXARRAY_ITEMS_MAX:
        return items, 1
    if mark == _ARRAY16:
        return packed[1] << 8 | packed[2], 3
    if mark == _ARRAY32:
        return int.from_bytes(packed[1:5], "big"), 5
    raise ValueError("no array")


def array_length(packed: msgspec.Raw) -> int:
    """The number of items of a msgpack array, 0 for nil or nothing. Raises ValueError if it is neither."""
    data = bytes(packed)
    if not data:
        return 0
    mark = data[0]
    if mark == _ARRAY16:
        return data[1] << 8 | data[2]
    return 0 if mark == NIL else array_header(data)[0]


def first_item_is_nil(packed: msgspec.Raw) -> bool:
    """Whether a msgpack array that is not empty begins with nil. Raises ValueError if it is no array."""
    data = bytes(packed)
    return data[array_header(data)[1]] == NIL


def is_array(packed: bytes | msgspec.Raw) -> bool:
    """Whether the value is a msgpack array."""
    mark = bytes(packed)[0]
    return _FIXARRAY <= mark <= _FIXARRAY + _FIXARRAY_ITEMS_MAX or mark in (_ARRAY16, _ARRAY32)


def is_map(packed: bytes | msgspec.Raw) -> bool:
    """Whether the value is a msgpack map."""
    mark = bytes(packed)[0]
    return mark in (_MAP16, _MAP32) or _FIXMAP <= mark < _FIXARRAY
