"""A trace in a file: batches of operations, then what is asked of the index that they leave, then what is removed.

Each part is a length of 8 bytes, big endian, and msgpack. It is read batch by batch, so that the memory of whoever
reads it is that of the backend and not that of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kvcensus.backends.model import ClearBlocks, IdentityScope, KvBlockKey, Operation, RemoveBlocks, StoreRun

_LENGTH_BYTES = 8
_KINDS = (StoreRun, RemoveBlocks, ClearBlocks)
_encode = msgspec.msgpack.encode
_decode_batch = msgspec.msgpack.Decoder(list[tuple[int, msgspec.Raw]]).decode
_decoders: list[Callable[[msgspec.Raw], Any]] = [msgspec.msgpack.Decoder(kind).decode for kind in _KINDS]


class Chain(msgspec.Struct, frozen=True):
    """Consecutive blocks that are held, from the root of their chain."""

    scope: IdentityScope
    block_hashes: list[bytes]


class Questions(msgspec.Struct, frozen=True):
    """What is asked: exact blocks, parents of blocks that are held, chains. `worker_id` holds most and is cleared."""

    keys: list[KvBlockKey]
    parents: list[tuple[IdentityScope, bytes]]
    chains: list[Chain]
    worker_id: str


class Trace(msgspec.Struct, frozen=True):
    """What a file has. `blocks_stored` and `blocks_removed` are block hashes of its operations, `records` are left.

    `rejections` are events of a recording that the translator refused.
    """

    name: str
    path: str
    blocks_stored: int
    blocks_removed: int
    records: int
    messages: int
    rejections: int = 0


class TraceWriter:
    """Writes batches one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def batch(self, operations: Sequence[Operation]) -> None:
        """One call of `apply`."""
        self._part(_encode([(_KINDS.index(type(one)), one) for one in operations]))

    def end(self) -> None:
        """No more batches of this kind."""
        self._part(b"")

    def questions(self, questions: Questions) -> None:
        """What is asked between the batches of the trace and those that remove."""
        self._part(_encode(questions))

    def _part(self, data: bytes) -> None:
        self._file.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)


class TraceReader:
    """Reads what a TraceWriter wrote, in the same order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._scopes: dict[IdentityScope, IdentityScope] = {}
        self._workers: dict[str, str] = {}

    def batches(self) -> Iterator[list[Operation]]:
        """The batches up to the next end."""
        while data := self._part():
            yield [self._operation(kind, raw) for kind, raw in _decode_batch(data)]

    def questions(self) -> Questions:
        """What is asked, once the batches before it are read."""
        return msgspec.msgpack.decode(self._part(), type=Questions)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _part(self) -> bytes:
        return self._file.read(int.from_bytes(self._file.read(_LENGTH_BYTES), "big"))

    def _operation(self, kind: int, raw: msgspec.Raw) -> Operation:
        """As a translator makes it: operations of a stream share the objects of their scope and worker."""
        operation: Operation = _decoders[kind](raw)
        worker = self._workers.setdefault(operation.worker_id, operation.worker_id)
        if isinstance(operation, StoreRun):
            scope = self._scopes.setdefault(operation.scope, operation.scope)
            return msgspec.structs.replace(operation, worker_id=worker, scope=scope)
        return msgspec.structs.replace(operation, worker_id=worker)
