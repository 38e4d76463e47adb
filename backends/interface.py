"""The seam between the daemon and whatever stores the index.

The contract, which one conformance suite holds every backend to:

* A record is the residency of one block on one worker at one tier. Its identity is (scope, block hash, group, worker,
  tier). The parent, index and token count of a key describe the block and are not part of its identity.
* `apply` is all or nothing, with its cursors: after an error, or a crash at any moment, either every operation and
  every cursor of the call is there or none is. Operations take effect in order.
* A store of a record that exists adds a copy (`ref_count`), or only refreshes it when the run says not to count. What a
  run does not know (its parent, its index; a token count, size or time of 0) never overwrites what the record knows.
  A removal takes one copy of each record it concerns, whatever its scope; a record leaves with its last copy.
* The place of a run in its chain comes from the worker's own record of the parent: same group, own tier first, then the
  fastest tier, then the smallest scope. A record of the parent in another group tells the tenant and not the index.
  Where no record tells the index it is the run's own `start_index`; without one it is unknown, which is not 0.
* A block of a run that is not consecutive takes scope, parent and index from the worker's own record of the same hash,
  chosen in the same order; parent and index only if its token count is the same or was not told.
* Every record is among the children of its parent, whether or not the parent is held.
* The rank of a worker, and what a run says of a group, are those of a (worker, tier, group), from its first store until
  it is cleared; it stays in `holdings` when its last record leaves.
* `clear_worker` and ClearBlocks are visible at once, whatever the size; space may be reclaimed later by `reclaim`.
* `len` and `metrics` do not walk the index.
* One thread calls the methods that write (`apply`, `put`, `remove_block`, `clear*`, `forget_stream`, `reclaim`,
  `close`). Any thread may read at any time, and sees the state between two calls, never a half-applied one.
* The caller sees to it that hashes have 1 to MAX_HASH_BYTES bytes, that token counts fit 32 bits and indexes 31, that
  times and sizes fit 63, and that there is at least one copy of what is `put`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from heapq import nsmallest
from pathlib import Path

from .errors import BackendCorrupt, BackendUnsupported
from .model import (
    ApplyResult,
    CacheResidency,
    Cursor,
    Holding,
    IdentityScope,
    IndexMetrics,
    KvBlockKey,
    Operation,
    StoreHealth,
    WorkerMatch,
)


class IndexBackend(ABC):
    """An index of residencies. See the module for the contract; errors are those of `backends.errors`."""

    moved_aside: Path | None = None
    """Where a damaged index was moved when this one was opened in its place, None when there was none."""
    moved_for: str = ""
    """What was damaged."""
    discarded_after_crash: bool = False
    """Whether an index was dropped at opening because the machine went down while it was written without syncing."""
    reads_wait: bool = False
    """Whether a read waits for something outside this process, such as a server, which may take seconds to answer."""
    torn_bytes: int = 0
    """Bytes of a write that a crash left unfinished, cut off at opening: nobody was told that it was done."""

    @abstractmethod
    def name(self) -> str:
        """The stable name used in reports: memory, lmdb, …"""

    @abstractmethod
    def persistent(self) -> bool:
        """Whether the index survives a restart of the process."""

    @abstractmethod
    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        """Apply operations in order and store the cursors, atomically."""

    @abstractmethod
    def cursors(self) -> dict[str, Cursor]:
        """Every stored cursor by its stream's name."""

    @abstractmethod
    def forget_stream(self, stream: str) -> None:
        """Drop the cursor of a stream that is no longer configured."""

    @abstractmethod
    def put(self, residency: CacheResidency) -> None:
        """Insert the record or replace the one of the same identity."""

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        """`put` each of them, in order. After an error some of them may be there."""
        for residency in residencies:
            self.put(residency)

    @abstractmethod
    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        """Remove the worker's records of a block in `scope`, over copies, tiers and groups. Returns how many."""

    @abstractmethod
    def clear_worker(self, worker_id: str) -> int:
        """Drop all that one worker holds. Returns the number of records."""

    @abstractmethod
    def clear(self) -> None:
        """Drop every record. Cursors stay."""

    def locate(self, key: KvBlockKey) -> list[CacheResidency]:
        """Every residency of one exact block (scope, hash, group), over workers and tiers."""
        return [one for one in self.find(key.block_hash, key.scope) if one.key.group == key.group]

    @abstractmethod
    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        """Every residency under a block hash, in one scope or in all."""

    @abstractmethod
    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        """The residencies in `scope` whose parent is `prefix_hash`: the children of a block, or of `ROOT`."""

    def first_children(self, scope: IdentityScope, prefix_hash: bytes, limit: int) -> tuple[list[CacheResidency], bool]:
        """Those of `prefix_scan` that are of the first `limit` blocks by hash, and whether there are more blocks.

        For a backend that finds children in the order of their hashes, to read no further than it has to.
        """
        found = self.prefix_scan(scope, prefix_hash)
        hashes = {one.key.block_hash for one in found}
        if len(hashes) <= limit:
            return found, False
        first = set(nsmallest(limit, hashes))
        return [one for one in found if one.key.block_hash in first], True

    @abstractmethod
    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        """How many of these consecutive blocks each worker could serve, by tier. Who could serve none is left out."""

    @abstractmethod
    def holdings(self) -> list[Holding]:
        """What each worker holds by tier and group. Costs O(workers), not O(blocks)."""

    @abstractmethod
    def snapshot(self) -> Iterator[CacheResidency]:
        """Every record as of the moment of the first `next`, in no order. Close the iterator if it is not exhausted.

        Raises BackendError when a persistent backend has no room for what it needs to keep that moment.
        """

    @abstractmethod
    def __len__(self) -> int:
        """The number of records."""

    def is_empty(self) -> bool:
        """Whether there is no record."""
        return len(self) == 0

    @abstractmethod
    def metrics(self) -> IndexMetrics:
        """Comparable figures, O(1)."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes that the store occupies on disk; 0 when it has no file."""

    def health(self) -> StoreHealth:
        """How near the store is to its limits. Cheap, from any thread."""
        return StoreHealth()

    def damage(self) -> BackendCorrupt | None:
        """The damage that a call has found, for whoever decides to stop: the index is not to be believed any more."""
        return None

    @abstractmethod
    def reclaim(self, rows: int) -> bool:
        """Free space of cleared workers, looking at no more than `rows` rows. True while there is more to do.

        Cheap when there is nothing to do; called now and then even so, it frees what killed readers held.
        """

    def compact(self) -> None:
        """Give back the disk that the store occupies and does not need. All stays as it is when that fails.

        Raises BackendUnsupported where there is nothing that could be done, BackendBusy when it is read meanwhile.
        """
        raise BackendUnsupported(f"{self.name()} has no way to compact what it stores")

    @abstractmethod
    def close(self) -> None:
        """Flush and release everything. The backend is not used afterwards."""
