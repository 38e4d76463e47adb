"""What there is to set of the rocksdb backend. Needs no RocksDB."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvcensus.backends.rocksdb.options import Durability, OnCorrupt, Resources

from .section import MIB, Section

_DEFAULTS = Resources()
_MAX_BYTES = 1 << 40


class RocksdbConfig(Section, frozen=True):
    """The index in RocksDB."""

    durability: Durability = Durability.PROCESS
    """What a commit survives. `process`: the blocks themselves die with the machine, so syncing would only cost."""
    write_buffer_bytes: Annotated[int, msgspec.Meta(ge=MIB, le=_MAX_BYTES)] = _DEFAULTS.write_buffer_bytes
    """New records are gathered in memory up to this, some 250,000 blocks, then go to a file. Up to three at a time."""
    block_cache_bytes: Annotated[int, msgspec.Meta(ge=MIB, le=_MAX_BYTES)] = _DEFAULTS.block_cache_bytes
    """Memory for parts of files that were read: about 1.5 million blocks. The system's own cache holds the rest."""
    background_jobs: Annotated[int, msgspec.Meta(ge=2, le=64)] = _DEFAULTS.background_jobs
    """Threads that write and merge files: one of each is enough for 250,000 blocks a second."""
    on_corrupt: OnCorrupt = OnCorrupt.REFUSE
    """What happens to a damaged index at the start. `rebuild`: moved aside, and made again from the engines."""
