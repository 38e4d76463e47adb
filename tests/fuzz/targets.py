"""Every target by name."""

from __future__ import annotations

from collections.abc import Callable

from . import decoders, http_side
from .decoders import Target

TARGETS: dict[str, Callable[[], Target]] = {
    "translator": decoders.translator,
    "index": decoders.index,
    "stream": decoders.stream,
    "recording": decoders.recording,
    "http": http_side.http,
}
