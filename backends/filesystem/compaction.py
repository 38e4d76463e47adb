"""A process that makes the next snapshot out of the files while the daemon goes on.

It reads the last snapshot and the closed segments after it and writes what they come to: the daemon does not wait for
it, and nothing of the daemon's memory, locks or sockets is in it, as it would be in a fork. It takes as much memory as
the index, for as long as it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ..errors import BackendCorrupt, BackendError
from .journal import draft_path

CORRUPT = 65
"""What the process exits with when it finds damage. The text is on its stderr."""
_PROGRAM = f"{__package__}.compactor"


class Compaction:
    """A snapshot of the records before `sequence` being made. The segments with them are closed."""

    def __init__(self, directory: Path, sequence: int) -> None:
        """Raises OSError when no process can be started."""
        self.sequence = sequence
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM, str(directory), str(sequence), str(os.getpid())],
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
        said = self._ended()
        if code == CORRUPT:
            raise BackendCorrupt(said)
        if code:
            raise BackendError(f"no snapshot: {said or f'its process ended with {code}'}")
        return True

    def stop(self) -> None:
        """End it. What it has written so far is of no use."""
        self._process.kill()
        self._ended()

    def _ended(self) -> str:
        """What it said. A process that was killed has left its draft."""
        said = self._process.communicate()[1].decode(errors="replace").strip()
        with suppress(OSError):
            draft_path(self._directory, self.sequence, self._process.pid).unlink(missing_ok=True)
        return said
