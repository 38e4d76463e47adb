"""The index in this process's memory: the fastest, and gone with the process.

Each (worker, tier, group) is a `Place` with a dictionary from block hash to what is known of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .entries import scope_order
from .interface import IndexBackend
from .matching import Held, patience, worker_matches
from .memory_place import Known, Place, Record, Run
from .model import (
    ROOT,
    TIER_NUMBER,
    ApplyResult,
    CacheResidency,
    CacheTier,
    ClearBlocks,
    Cursor,
    GroupSpec,
    Holding,
    IdentityScope,
    IndexMetrics,
    KvBlockKey,
    Operation,
    RemoveBlocks,
    StoreRun,
    WorkerMatch,
)

_RUN_BLOCKS_MAX = 256
"""Blocks that share a run at the most: finding a block within its run takes a walk along it."""


class MemoryBackend(IndexBackend):
    """The index in dictionaries, guarded by one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._places: dict[str, dict[tuple[CacheTier, int], Place]] = {}
        self._cursors: dict[str, Cursor] = {}
        self._puts = self._removes = self._scans = 0

    def name(self) -> str:
        return "memory"

    def persistent(self) -> bool:
        return False

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        result = ApplyResult()
        with self._lock:
            for operation in operations:
                if isinstance(operation, StoreRun):
                    self._store(operation, result)
                elif isinstance(operation, RemoveBlocks):
                    self._remove(operation, result)
                else:
                    result.cleared += self._clear(operation)
            for cursor in cursors:
                self._cursors[cursor.stream] = cursor
        self._puts += result.stored + result.copies_added + result.refreshed
        self._removes += result.copies_removed
        return result

    def cursors(self) -> dict[str, Cursor]:
        with self._lock:
            return dict(self._cursors)

    def forget_stream(self, stream: str) -> None:
        with self._lock:
            self._cursors.pop(stream, None)

    def put(self, residency: CacheResidency) -> None:
        key = residency.key
        record = Record(
            key.scope,
            key.prefix_hash,
            key.block_index,
            key.token_count,
            residency.ref_count,
            residency.last_access_ms,
            residency.bytes,
            residency.pinned,
        )
        with self._lock:
            place = self._place(residency.worker_id, residency.rank, residency.tier, key.group)
            old = place.records_of(key.block_hash)
            others = tuple(other for other in old if other.scope != record.scope)
            place.replace(key.block_hash, old, (*others, record))
            self._puts += 1

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        removed = 0
        with self._lock:
            for place in self._places.get(worker_id, {}).values():
                old = place.records_of(block_hash)
                kept = tuple(record for record in old if record.scope != scope)
                if len(kept) != len(old):
                    place.replace(block_hash, old, kept)
                    removed += len(old) - len(kept)
            self._removes += removed
        return removed

    def clear_worker(self, worker_id: str) -> int:
        with self._lock:
            return self._clear(ClearBlocks(worker_id))

    def clear(self) -> None:
        with self._lock:
            self._places.clear()

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        with self._lock:
            return [
                _residency(place, block_hash, record)
                for place in self._every_place()
                for record in place.records_of(block_hash)
                if scope is None or record.scope == scope
            ]

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        with self._lock:
            self._scans += 1
            return [
                _residency(place, child, record)
                for place in self._every_place()
                for child in place.children_of(prefix_hash)
                for record in place.records_of(child)
                if record.scope == scope and record.parent == prefix_hash
            ]

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        with self._lock:
            specs = self._specs()
            stop = patience(specs)
            held = [
                one
                for places in self._places.values()
                for one in _held_by(list(places.values()), scope, block_hashes, stop)
            ]
            return worker_matches(held, specs)

    def holdings(self) -> list[Holding]:
        with self._lock:
            return [
                Holding(place.worker_id, place.rank, place.tier, place.group, place.spec, place.records, place.bytes)
                for place in self._every_place()
            ]

    def snapshot(self) -> Iterator[CacheResidency]:
        with self._lock:
            frozen = [(place, list(place.blocks.items())) for place in self._every_place()]
        for place, blocks in frozen:
            for block_hash, known in blocks:
                records = (known.record(block_hash),) if isinstance(known, Run) else known
                for record in records:
                    yield _residency(place, block_hash, record)

    def __len__(self) -> int:
        with self._lock:
            return sum(place.records for place in self._every_place())

    def metrics(self) -> IndexMetrics:
        with self._lock:
            resident_bytes = sum(place.bytes for place in self._every_place())
            return IndexMetrics(len(self), resident_bytes, self._puts, self._removes, self._scans, 0)

    def stored_bytes(self) -> int:
        return 0

    def reclaim(self, rows: int) -> bool:
        return False

    def close(self) -> None:
        self.clear()

    def _every_place(self) -> Iterator[Place]:
        for places in self._places.values():
            yield from places.values()

    def _place(self, worker_id: str, rank: int | None, tier: CacheTier, group: int) -> Place:
        places = self._places.get(worker_id)
        if places is None:
            places = self._places[worker_id] = {}
        place = places.get((tier, group))
        if place is None:
            place = places[tier, group] = Place(worker_id, rank, tier, group)
        return place

    def _specs(self) -> dict[tuple[str, int], GroupSpec]:
        specs: dict[tuple[str, int], GroupSpec] = {}
        for place in self._every_place():
            if place.spec != GroupSpec() or (place.worker_id, place.group) not in specs:
                specs[place.worker_id, place.group] = place.spec
        return specs

    def _store(self, run: StoreRun, result: ApplyResult) -> None:
        place = self._place(run.worker_id, run.rank, run.tier, run.group)
        if run.spec is not None and run.spec is not place.spec and run.spec != place.spec:
            place.spec = place.spec.after(run.spec)
        if not run.block_hashes:
            return
        if not run.consecutive:
            for block_hash in run.block_hashes:
                self._store_block(place, block_hash, self._placed_by_sibling(run, block_hash), run, result)
            return
        scope, base = self._chain_of(run, place)
        hashes, parent = run.block_hashes, run.parent
        if len(hashes) <= _RUN_BLOCKS_MAX:
            self._store_part(place, run, hashes, scope, parent, base, result)
            return
        for start in range(0, len(hashes), _RUN_BLOCKS_MAX):
            part = hashes[start : start + _RUN_BLOCKS_MAX]
            self._store_part(place, run, part, scope, parent, None if base is None else base + start, result)
            parent = part[-1]

    def _store_part(
        self,
        place: Place,
        run: StoreRun,
        hashes: tuple[bytes, ...],
        scope: IdentityScope,
        parent: bytes | None,
        base: int | None,
        result: ApplyResult,
    ) -> None:
        new, known = place.store_run(Run(scope, hashes, parent, base, run.token_count, run.at_ms, run.bytes_per_block))
        result.stored += new
        for at in known:
            record = Record(
                scope,
                hashes[at - 1] if at else parent,
                None if base is None else base + at,
                run.token_count,
                1,
                run.at_ms,
                run.bytes_per_block,
                False,
            )
            self._store_block(place, hashes[at], record, run, result)

    def _chain_of(self, run: StoreRun, place: Place) -> tuple[IdentityScope, int | None]:
        """The scope of a run and the index of its first block, from the worker's own record of the parent."""
        if run.parent is None:
            return run.scope, run.start_index
        if run.parent == ROOT:
            return run.scope, 0
        known = place.blocks.get(run.parent)
        if isinstance(known, Run) and (known.scope is run.scope or known.scope == run.scope):
            return run.scope, run.start_index if known.base is None else known.index_after(run.parent)
        found = self._own_record(run, run.parent)
        if found is None:
            return run.scope, run.start_index
        place, own = found
        scope = run.scope
        if run.tenant_from_parent and own.scope.tenant_id != scope.tenant_id:
            scope = IdentityScope(scope.model_id, scope.tokenizer_id, scope.adapter_id, own.scope.tenant_id)
        if place.group != run.group or own.block_index is None:
            return scope, run.start_index
        return scope, own.block_index + 1

    def _own_record(self, run: StoreRun, block_hash: bytes) -> tuple[Place, Record] | None:
        """The worker's record of a block that says most about a run: same group, then own tier, then the fastest."""
        places = self._places.get(run.worker_id, {})
        best = None
        for place in places.values():
            known = place.blocks.get(block_hash)
            if known is None:
                continue
            order = (place.group != run.group, place.tier is not run.tier, TIER_NUMBER[place.tier], place.group)
            if best is None or order < best[0]:
                best = (order, place)
        if best is None:
            return None
        records = best[1].records_of(block_hash)
        return best[1], min(records, key=lambda record: scope_order(record.scope))

    def _placed_by_sibling(self, run: StoreRun, block_hash: bytes) -> Record:
        found = self._own_record(run, block_hash)
        if found is None:
            return Record(run.scope, None, None, run.token_count, 1, run.at_ms, run.bytes_per_block, False)
        _, own = found
        same_size = run.token_count in (0, own.token_count)
        return Record(
            own.scope,
            own.parent if same_size else None,
            own.block_index if same_size else None,
            own.token_count if same_size else run.token_count,
            1,
            run.at_ms,
            run.bytes_per_block,
            False,
        )

    def _store_block(self, place: Place, block_hash: bytes, record: Record, run: StoreRun, result: ApplyResult) -> None:
        old = place.records_of(block_hash)
        same = next((other for other in old if other.scope == record.scope), None)
        if same is None:
            place.replace(block_hash, old, (*old, record))
            result.stored += 1
            return
        if run.count_copies:
            result.copies_added += 1
        else:
            result.refreshed += 1
        merged = Record(
            record.scope,
            same.parent if record.parent is None else record.parent,
            same.block_index if record.block_index is None else record.block_index,
            record.token_count or same.token_count,
            same.ref_count + run.count_copies,
            record.at_ms or same.at_ms,
            record.size or same.size,
            same.pinned,
        )
        place.replace(block_hash, old, tuple(merged if other is same else other for other in old))

    def _remove(self, removal: RemoveBlocks, result: ApplyResult) -> None:
        places = [
            place
            for (tier, group), place in self._places.get(removal.worker_id, {}).items()
            if (removal.tier is None or tier is removal.tier) and (removal.group is None or group == removal.group)
        ]
        for block_hash in removal.block_hashes:
            found = 0
            for place in places:
                old = place.records_of(block_hash)
                if not old:
                    continue
                found += len(old)
                kept = tuple(r._replace(ref_count=r.ref_count - 1) for r in old if r.ref_count > 1)
                place.replace(block_hash, old, kept)
                result.removed += len(old) - len(kept)
            result.copies_removed += found
            result.unknown_removals += not found

    def _clear(self, clear: ClearBlocks) -> int:
        places = self._places.get(clear.worker_id, {})
        gone = [at for at in places if clear.tier is None or at[0] is clear.tier]
        cleared = sum(places.pop(at).records for at in gone)
        if not places:
            self._places.pop(clear.worker_id, None)
        return cleared


def _held_by(
    places: Sequence[Place], scope: IdentityScope | None, block_hashes: Sequence[bytes], stop: int
) -> Iterator[Held]:
    """Which of the hashes one worker holds, up to where it misses `stop` of them in a row."""
    masks = [0] * len(places)
    missed = 0
    for number, block_hash in enumerate(block_hashes):
        missed += 1
        for at, place in enumerate(places):
            known = place.blocks.get(block_hash)
            if known is not None and (scope is None or _in_scope(known, scope)):
                masks[at] |= 1 << number
                missed = 0
        if missed >= stop:
            break
    for place, mask in zip(places, masks):
        if mask:
            yield Held(place.worker_id, place.rank, place.tier, place.group, mask)


def _in_scope(known: Known, scope: IdentityScope) -> bool:
    if isinstance(known, Run):
        return known.scope == scope
    return any(record.scope == scope for record in known)


def _residency(place: Place, block_hash: bytes, record: Record) -> CacheResidency:
    key = KvBlockKey.within(
        record.scope,
        block_hash,
        prefix_hash=record.parent,
        block_index=record.block_index,
        token_count=record.token_count,
        group=place.group,
    )
    return CacheResidency(
        key, place.worker_id, place.tier, record.size, record.at_ms, record.ref_count, record.pinned, place.rank
    )


def open_memory(directory: Path, options: Mapping[str, Any]) -> MemoryBackend:
    """For the registry. There is nothing to choose, and no file."""
    return MemoryBackend()
