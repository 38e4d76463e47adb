"""What the tables of the file have in common: their base, and the ranges of their numbers."""

from __future__ import annotations

from typing import Annotated

import msgspec

_INT_MAX = (1 << 31) - 1
MIB = 1 << 20

Positive = Annotated[int, msgspec.Meta(ge=1, le=_INT_MAX)]
NotNegative = Annotated[int, msgspec.Meta(ge=0, le=_INT_MAX)]
PositiveBytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: a misspelt key is an error, never ignored."""
