"""A process that changes an index without end until it is killed with -9, and what the index must be afterwards.

    python -m tests.backends.crashing NAME DIRECTORY OPTIONS_AS_JSON

Step n is the same in every process: sometimes a call without a cursor, then a batch whose cursor says n. So the index
that is found must be that of some n, or that and the one call before the batch of n + 1; and n cannot be lower than
what `apply` has returned from.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ROOT, CacheResidency, CacheTier, ClearBlocks, Cursor, Operation, RemoveBlocks
from kvcensus.backends.registry import open_backend, why_unusable

from .building import LORA, SCOPE, blocks, key, residency, store

STREAM = "crash"
_HASHES = 3000
_WORKERS = ("a", "b", "c")
_TIERS = (CacheTier.HBM, CacheTier.CPU_DRAM)
_ROOT = Path(__file__).parents[2]
_RETURNED = "returned"
"""Beside the index: the number of the last batch from which `apply` has returned. A write(2) survives kill -9."""


def call_before(number: int, backend: IndexBackend) -> None:
    """What step `number` calls before its batch: mostly nothing."""
    chance = random.Random(f"call {number}")
    block_hash, worker = blocks(chance.randrange(_HASHES))[0], chance.choice(_WORKERS)
    kind = chance.randrange(40)
    if kind == 0:
        backend.put(residency(key(block_hash, index=number), worker, ref_count=2, pinned=True))
    elif kind == 1:
        backend.remove_block(SCOPE, worker, block_hash)
    elif kind == 2:
        backend.forget_stream("other")
    elif kind == 3 and number % 10 == 0:
        backend.clear_worker(worker)


def batch(number: int) -> tuple[list[Operation], list[Cursor]]:
    """The operations of step `number`, small and large, and its cursors."""
    chance = random.Random(f"batch {number}")
    operations: list[Operation] = []
    for _ in range(chance.choice((1, 2, 5, 20))):
        first, worker, tier = chance.randrange(_HASHES), chance.choice(_WORKERS), chance.choice(_TIERS)
        kind = chance.randrange(100)
        if kind == 0:
            operations.append(ClearBlocks(worker, chance.choice((None, tier))))
        elif kind < 40:
            gone = blocks(*range(first, first + chance.choice((1, 10, 200))))
            operations.append(RemoveBlocks(worker, gone, chance.choice((None, tier)), chance.choice((None, 0))))
        else:
            run = blocks(*range(first, min(first + chance.choice((1, 8, 64, 600)), _HASHES)))
            operations.append(
                store(
                    *run,
                    parent=blocks(first - 1)[0] if first else ROOT,
                    worker=worker,
                    tier=tier,
                    scope=chance.choice((SCOPE, SCOPE, LORA)),
                    group=chance.choice((0, 0, 0, 1)),
                    at_ms=number,
                    size=chance.choice((0, 100)),
                    consecutive=chance.random() < 0.9,
                )
            )
    cursors = [Cursor(STREAM, 1, number, committed_ms=number)]
    if number % 7 == 0:
        cursors.append(Cursor("other", 1, number))
    return operations, cursors


def position(backend: IndexBackend) -> int:
    """The number of the last batch that the index has, -1 for none."""
    cursor = backend.cursors().get(STREAM)
    return -1 if cursor is None else cursor.seq


def content(backend: IndexBackend) -> tuple[list[bytes], list[bytes], dict[str, Cursor], int]:
    """All that an index holds, comparable between two of them."""
    encode = msgspec.msgpack.encode
    records: list[CacheResidency] = list(backend.snapshot())
    return sorted(map(encode, records)), sorted(map(encode, backend.holdings())), backend.cursors(), len(backend)


@dataclass
class CrashTest:
    """Kills of one backend in one directory. `expected` is a model of what it must hold after batch `reached`."""

    name: str
    directory: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: MemoryBackend = field(default_factory=MemoryBackend)
    reached: int = -1
    keeps_last: bool = True
    """Whether every batch from which `apply` has returned must be there."""
    lost: int = 0
    """Batches from which `apply` had returned and that were not there."""
    between: int = 0
    """Kills that hit between the call of a step and its batch."""

    def kill(self, after_s: float, *, opening: bool = False) -> None:
        """Let a process change the index, and kill it so long after it has opened it, or after it began to."""
        command = [sys.executable, "-m", "tests.backends.crashing", self.name, str(self.directory)]
        with subprocess.Popen([*command, json.dumps(dict(self.options))], cwd=_ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"opening\n"
            if not opening:
                assert child.stdout.readline() == b"open\n"
            time.sleep(after_s)
            assert child.poll() is None, "the process ended by itself"
            child.kill()

    def check(self) -> None:
        """Open the index: it is that of one moment, and no earlier one than was promised."""
        returned = self.directory / _RETURNED
        said = returned.read_bytes() if returned.exists() else b""
        promised = int.from_bytes(said, "big") if said else -1
        backend = open_backend(self.name, self.directory / "index", self.options)
        try:
            found = position(backend)
            assert found <= promised + 1, (promised, found)
            assert not self.keeps_last or promised <= found, (promised, found)
            self.lost += max(promised - found, 0)
            self._advance(found)
            held = content(backend)
        finally:
            backend.close()
        if held == content(self.expected):
            return
        # The next process makes this call again; once more changes nothing.
        call_before(found + 1, self.expected)
        assert held == content(self.expected), f"after batch {found}"
        self.between += 1

    def _advance(self, number: int) -> None:
        while self.reached < number:
            self.reached += 1
            call_before(self.reached, self.expected)
            self.expected.apply(*batch(self.reached))


def main() -> None:
    name, directory, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    directory.mkdir(exist_ok=True)
    assert not why_unusable(name), "its library is imported before anything may be killed"
    returned = os.open(directory / _RETURNED, os.O_RDWR | os.O_CREAT, 0o600)
    print("opening", flush=True)  # noqa: T201
    backend = open_backend(name, directory / "index", options)
    print("open", flush=True)  # noqa: T201
    number = position(backend)
    if number > int.from_bytes(os.pread(returned, 8, 0), "big"):
        os.pwrite(returned, number.to_bytes(8, "big"), 0)
    parent = os.getppid()
    while os.getppid() == parent:
        number += 1
        call_before(number, backend)
        backend.apply(*batch(number))
        os.pwrite(returned, number.to_bytes(8, "big"), 0)
        if number % 5 == 0:
            backend.reclaim(1000)


if __name__ == "__main__":
    main()
