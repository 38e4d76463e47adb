"""An index that several daemons write, each its own part, as a router reads it: all parts whose writer is there.

A part is one transaction's worth of consistency, and an answer over several parts is of one moment for each of them. A
part whose lease has lapsed has nobody who keeps it up to date, so it is not read. Trust is in the cursors: a part whose
streams are not trusted is still read, and the reader decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from ..errors import BackendError
from ..model import CacheResidency, Cursor, Holding, IdentityScope, WorkerMatch
from .layout import Keys, parts_key
from .reader import ValkeyReader
from .server import Server, ValkeyOptions

T = TypeVar("T", CacheResidency, Holding, WorkerMatch)

_LOOK_EVERY_S = 1.0
"""How soon a new part is read, and one that was given up no longer: less than the lease adds to the latter."""


class _Part:
    def __init__(self, options: ValkeyOptions, name: str) -> None:
        self.keys = Keys(options.namespace, name)
        self.server = Server(options)
        self.reader = ValkeyReader(self.server, self.keys)
        self.is_kept = False

    def look(self) -> None:
        self.is_kept = self.server.ask([("EXISTS", self.keys.lease)])[0] == 1


class SharedReader:
    """Reads all parts of an index. For one thread at a time; the parts are asked one after another."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are those of the backend; its `part` does not matter. Raises BackendError."""
        try:
            self._options = msgspec.convert(dict(options), ValkeyOptions)
        except msgspec.ValidationError as error:
            raise BackendError(f"valkey: {error}") from error
        self._names = Server(self._options)
        self._parts: dict[str, _Part] = {}
        self._looked_s = -_LOOK_EVERY_S

    def parts(self) -> dict[str, bool]:
        """Every part by name, and whether somebody keeps it up to date."""
        if time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            stored = self._names.ask([("SMEMBERS", parts_key(self._options.namespace))])[0]
            for name in sorted(one.decode() for one in stored):
                if name not in self._parts:
                    self._parts[name] = _Part(self._options, name)
            for part in self._parts.values():
                part.look()
            self._looked_s = time.monotonic()
        return {name: self._parts[name].is_kept for name in sorted(self._parts)}

    def cursors(self) -> dict[str, dict[str, Cursor]]:
        """The cursors of each part that is kept, by the names of part and stream: how far it is, and how trusted."""
        return {name: part.reader.cursors() for name, part in self._kept()}

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        """As that of a backend, over the parts that are kept."""
        found = self._over_parts(lambda reader: reader.match(scope, block_hashes))
        return sorted(found, key=lambda match: (-match.blocks, -match.blocks_any_tier, match.worker_id))

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        """As that of a backend, over the parts that are kept."""
        return self._over_parts(lambda reader: reader.find(block_hash, scope))

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        """As that of a backend, over the parts that are kept."""
        return self._over_parts(lambda reader: reader.prefix_scan(scope, prefix_hash))

    def holdings(self) -> list[Holding]:
        """As those of a backend, over the parts that are kept."""
        return self._over_parts(lambda reader: reader.holdings())

    def close(self) -> None:
        """Give up the connections."""
        self._names.close()
        for part in self._parts.values():
            part.server.close()

    def _kept(self) -> Iterator[tuple[str, _Part]]:
        for name, is_kept in self.parts().items():
            if is_kept:
                yield name, self._parts[name]

    def _over_parts(self, question: Callable[[ValkeyReader], list[T]]) -> list[T]:
        """Answers of all parts. A worker that several parts have is read from the first one by name."""
        found: list[T] = []
        claimed: set[str] = set()
        for _, part in self._kept():
            found += [one for one in question(part.reader) if one.worker_id not in claimed]
            claimed |= part.reader.workers()
        return found
