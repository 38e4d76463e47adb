"""Every target by name."""

from __future__ import annotations

from collections.abc import Callable

from . import decoders, http_side
from .decoders import Target
from .dynamo import dynamo

TARGETS: dict[str, Callable[[], Target]] = {
    "translator": decoders.translator,
    "index": decoders.index,
    "stream": decoders.stream,
    "recording": decoders.recording,
    "dynamo": dynamo,
    "http": http_side.http,
}
