"""A process that makes the next snapshot out of the files while the daemon goes on.

It reads the last snapshot and the closed segments after it and writes what they come to: the daemon does not wait for
it, and nothing of the daemon's memory, locks or sockets is in it, as it would be in a fork. It takes as much memory as
the index, for as long as it runs.

    python -P -m kvcensus.backends.filesystem.compaction DIRECTORY SEQUENCE PARENT
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..errors import BackendCorrupt, BackendError
from .framing import corrupt
from .index import Index
from .journal import recover, write_snapshot

_CORRUPT = 65
_NICENESS = 10


class Compaction:
    """A snapshot of the records before `sequence` being made. The segments with them are closed."""

    def __init__(self, directory: Path, sequence: int) -> None:
        """Raises OSError when no process can be started."""
        self.sequence = sequence
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(directory), str(sequence), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )

    def done(self) -> bool:
        """Whether it has ended well; False while it runs. Raises BackendCorrupt or BackendError when it failed."""
        code = self._process.poll()
        if code is None:
            return False
        said = self._said()
        if code == _CORRUPT:
            raise BackendCorrupt(said)
        if code:
            raise BackendError(f"no snapshot: {said or f'its process ended with {code}'}")
        return True

    def stop(self) -> None:
        """End it. What it has written so far is of no use."""
        self._process.kill()
        self._said()

    def _said(self) -> str:
        return self._process.communicate()[1].decode(errors="replace").strip()


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
        return _CORRUPT
    except (BackendError, OSError, MemoryError) as error:
        sys.stderr.write(f"{error!r}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
