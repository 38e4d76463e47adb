"""What there is to set of the filesystem backend."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvcensus.backends.filesystem.backend import SEGMENT_BYTES, SNAPSHOT_AFTER_BYTES, Durability, OnCorrupt

from .section import MIB, Section


class FilesystemConfig(Section, frozen=True):
    """The index as a journal in plain files, held in memory."""

    durability: Durability = Durability.PROCESS
    """What a commit survives. `process`: the blocks themselves die with the machine, so syncing would only cost."""
    segment_bytes: Annotated[int, msgspec.Meta(ge=MIB, le=1 << 32)] = SEGMENT_BYTES
    """The journal goes on in a new file after this many bytes: some 6 million blocks, in files that can be copied."""
    snapshot_after_bytes: Annotated[int, msgspec.Meta(ge=MIB, le=1 << 40)] = SNAPSHOT_AFTER_BYTES
    """A snapshot is made when the journal is larger than this and than the last one: 64 MiB are read in 3 seconds."""
    on_corrupt: OnCorrupt = OnCorrupt.REFUSE
    """What happens to a damaged index at the start. `rebuild`: moved aside, and made again from the engines."""
