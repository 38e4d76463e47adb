"""What there is to set of the shadow."""

from __future__ import annotations

from typing import Any

import msgspec

from kvcensus.backends.registry import why_unusable

from .errors import InvalidValue
from .section import NotNegative, Section


class ShadowConfig(Section, frozen=True):
    """A second backend that is driven by the same streams and compared with the index."""

    backend: str = ""
    """Its name, "" for none: it costs the writer what the index costs, once more."""
    data_dir: str = "kvcensus-shadow"
    """Its directory, not that of the index. What is there is replaced."""
    sample_per_s: NotNegative = 10
    """Questions compared a second, at most: each is a look-up or two of the writer. 0 only writes."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """What the backend is opened with: the keys of its own table, where it has one."""

    def __post_init__(self) -> None:
        if self.backend and (problem := why_unusable(self.backend)):
            raise InvalidValue("backend", problem)
        if self.backend and not self.data_dir:
            raise InvalidValue("data_dir", "is empty")
