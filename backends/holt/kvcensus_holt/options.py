"""What a Holt index is opened with."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

MIB = 1 << 20
GIB = 1 << 30
FRAME_BYTES = 512 << 10
"""What Holt reads and writes at a time."""


class Durability(StrEnum):
    """What a commit survives. `machine`: everything. `buffered`: not even the process, whose last batches may be lost.

    Either way the index is that of one batch, with its cursors.
    """

    MACHINE = "machine"
    BUFFERED = "buffered"


class Resources(NamedTuple):
    """What Holt may use, in bytes."""

    cache_bytes: int = 8 * GIB
    """Frames that are kept in memory, at the most. An index that is larger is slow to ask: a frame is read as a whole.
    Those that changed since the last checkpoint are kept whatever this says."""
    checkpoint_bytes: int = 256 * MIB
    """Bytes of keys and values after which what changed is written to the data file, and the log is emptied."""


class OnCorrupt(StrEnum):
    """What happens at the start to an index that is damaged."""

    REFUSE = "refuse"
    REBUILD = "rebuild"
