"""Asks a daemon for all that is shown. Pure but for the clock: how it is asked is up to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol
from urllib.parse import urlencode

from .figures import NAMES
from .sample import Sample

_READY = "/readyz"
_PATHS = {
    _READY: _READY,
    "/v1/workers": "/v1/workers",
    "/v1/streams": "/v1/streams",
    "/metrics": f"/metrics?{urlencode([('name[]', name) for name in NAMES])}",
}


class Unreachable(Exception):
    """The daemon does not answer, refuses, or says what this version does not understand. The text is one sentence."""


Look = Callable[[], Sample]
"""One look at the daemon. Raises Unreachable."""


class Getter(Protocol):
    """The body of an answer. `also`: a status of an error with which it is one too."""

    def __call__(self, path: str, also: int | None = None) -> bytes: ...


def look(get: Getter) -> Sample:
    """One look. Raises what `get` raises, and NotUnderstood."""
    also = {_READY: HTTPStatus.SERVICE_UNAVAILABLE}
    answers = {name: get(path, also.get(name)) for name, path in _PATHS.items()}
    return Sample.read(time.monotonic(), time.time(), answers)
