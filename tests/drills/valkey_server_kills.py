"""kill -9 of the server of a valkey index, over and over, while a process writes: nothing answered is lost or doubled.

    .venv/bin/python -m tests.drills.valkey_server_kills --fsync always --kills 200

With `--fsync everysec` the server may lose the last seconds. Then the writer is fenced and begins again from the cursor
that is there, and the index is that of this cursor. After every kill the whole index is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from kvcensus.backends.errors import BackendLost, BackendUnavailable
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.valkey.backend import ValkeyBackend, open_valkey
from tests.backends.crashing import batch, content, position
from tests.valkey_servers import ValkeyServer, running_server

UP_S = 0.5


class Writing:
    """A writer, and a model of what its index must be."""

    def __init__(self, server: ValkeyServer, directory: Path) -> None:
        self._options = {"servers": [server.address], "timeout_ms": 2000}
        self._directory = directory
        self.backend: ValkeyBackend = open_valkey(directory, self._options)
        self.model = MemoryBackend()
        self.number = -1
        self.lost = 0

    def until_unavailable(self) -> None:
        """Apply batches until the server does not answer; the last one is to be made again."""
        while True:
            try:
                self._next()
            except BackendUnavailable:
                return

    def go_on(self) -> None:
        """Make the batch that failed again, or begin again from what the server has."""
        try:
            self._next()
        except BackendLost:
            self.backend.close()
            self.backend = open_valkey(self._directory, self._options)
            found = position(self.backend)
            assert found < self.number, (found, self.number)
            self.lost += self.number - found
            self.number, self.model = found, MemoryBackend()
            for number in range(found + 1):
                self.model.apply(*batch(number))

    def _next(self) -> None:
        operations, cursors = batch(self.number + 1)
        result = self.backend.apply(operations, cursors)
        assert result == self.model.apply(operations, cursors), self.number + 1
        self.number += 1

    def check(self) -> None:
        assert position(self.backend) == self.number
        assert content(self.backend) == content(self.model), f"after batch {self.number}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    began = time.monotonic()
    fenced = 0
    settings = {"appendonly": "yes", "appendfsync": arguments.fsync}
    with tempfile.TemporaryDirectory() as place, running_server(Path(place, "server"), settings) as server:
        writing = Writing(server, Path(place, "index"))
        for _ in range(arguments.kills):
            killer = threading.Timer(chance.uniform(0, UP_S), server.kill)
            killer.start()
            writing.until_unavailable()
            killer.join()
            server.start()
            before = writing.lost
            writing.go_on()
            fenced += writing.lost > before
            assert arguments.fsync == "everysec" or not fenced, "an answered commit is gone"
            writing.check()
        report = {
            "fsync": arguments.fsync,
            "kills": arguments.kills,
            "batches": writing.number + 1,
            "fenced": fenced,
            "batches_lost": writing.lost,
            "disagreements": 0,
            "seconds": round(time.monotonic() - began),
        }
        writing.backend.close()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
