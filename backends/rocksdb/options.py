"""What a RocksDB index is opened with. Needs no RocksDB."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

MIB = 1 << 20


class Durability(StrEnum):
    """What a commit survives. `process`: the end of the process. `machine`: a crash of the machine too."""

    PROCESS = "process"
    MACHINE = "machine"


class OnCorrupt(StrEnum):
    """What happens at the start to an index that is damaged."""

    REFUSE = "refuse"
    REBUILD = "rebuild"


class Resources(NamedTuple):
    """What RocksDB may use, in bytes and threads. `[rocksdb]` of the configuration says why so much."""

    write_buffer_bytes: int = 32 * MIB
    block_cache_bytes: int = 128 * MIB
    background_jobs: int = 2
