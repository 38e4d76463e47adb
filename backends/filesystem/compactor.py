"""The process that makes a snapshot; see `compaction`.

python -P -m kvcensus.backends.filesystem.compactor DIRECTORY SEQUENCE PARENT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import BackendCorrupt, BackendError
from .compaction import CORRUPT
from .framing import corrupt
from .index import Index
from .journal import recover, write_snapshot

_NICENESS = 10


class _Orphaned(Exception):
    """The daemon is gone, and another one may be here."""


def compact(directory: Path, sequence: int, parent: int) -> None:
    """Make the snapshot, as long as `parent` lives. Raises BackendFormat, BackendCorrupt, OSError."""

    def stop_if_orphaned() -> None:
        if os.getppid() != parent:
            raise _Orphaned

    index = Index()
    found = recover(directory, index, sequence, stop_if_orphaned)
    if found.next != sequence:
        raise corrupt(directory, f"the journal ends at record {found.next}, before {sequence}")
    write_snapshot(directory, found.history, sequence, index.dump(), stop_if_orphaned)


def main() -> int:
    """The process."""
    directory, sequence, parent = sys.argv[1:]
    os.nice(_NICENESS)
    try:
        compact(Path(directory), int(sequence), int(parent))
    except _Orphaned:
        return 1
    except BackendCorrupt as error:
        sys.stderr.write(f"{error}\n")
        return CORRUPT
    except (BackendError, OSError, MemoryError) as error:
        sys.stderr.write(f"{error!r}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
