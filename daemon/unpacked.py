"""What is in bytes of msgpack, as JSON can say it."""

from __future__ import annotations

import math
from typing import Any

import msgspec

_UNREADABLE = (msgspec.DecodeError, ValueError, TypeError, RecursionError, MemoryError)


def unpacked(raw: bytes) -> tuple[Any, str]:
    """The value and "", or None and why the bytes cannot be read. Bytes within become 0x and hex."""
    try:
        return _plain(msgspec.msgpack.decode(raw)), ""
    except _UNREADABLE as error:
        return None, f"cannot be read: {error}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
