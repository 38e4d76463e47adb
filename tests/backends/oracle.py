"""The contract of a backend, written for the reader and not for speed: every record is an entry of one dictionary."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvcensus.backends.model import (
    ROOT,
    TIERS,
    ApplyResult,
    CacheResidency,
    CacheTier,
    ClearBlocks,
    Cursor,
    GroupKind,
    GroupSpec,
    Holding,
    IdentityScope,
    KvBlockKey,
    Operation,
    RemoveBlocks,
    StoreRun,
    WorkerMatch,
)


class Identity(NamedTuple):
    scope: IdentityScope
    block_hash: bytes
    group: int
    worker_id: str
    tier: CacheTier


@dataclass(frozen=True)
class Record:
    parent: bytes | None
    index: int | None
    tokens: int
    bytes: int
    at_ms: int
    copies: int
    pinned: bool = False


Place = tuple[str, CacheTier, int]


@dataclass
class Oracle:
    records: dict[Identity, Record] = field(default_factory=dict)
    places: dict[Place, tuple[int | None, GroupSpec]] = field(default_factory=dict)
    cursors: dict[str, Cursor] = field(default_factory=dict)

    def apply(self, operations: Iterable[Operation], cursors: Iterable[Cursor] = ()) -> ApplyResult:
        result = ApplyResult()
        for operation in operations:
            if isinstance(operation, StoreRun):
                self._store(operation, result)
            elif isinstance(operation, RemoveBlocks):
                self._remove(operation, result)
            else:
                result.cleared += self._clear(operation)
        self.cursors.update((cursor.stream, cursor) for cursor in cursors)
        return result

    def put(self, one: CacheResidency) -> None:
        self.places.setdefault((one.worker_id, one.tier, one.key.group), (one.rank, GroupSpec()))
        block = one.key
        self.records[Identity(block.scope, block.block_hash, block.group, one.worker_id, one.tier)] = Record(
            block.prefix_hash,
            block.block_index,
            block.token_count,
            one.bytes,
            one.last_access_ms,
            one.ref_count,
            one.pinned,
        )

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        gone = [at for at in self.records if (at.scope, at.worker_id, at.block_hash) == (scope, worker_id, block_hash)]
        for at in gone:
            del self.records[at]
        return len(gone)

    def clear_worker(self, worker_id: str) -> int:
        return self._clear(ClearBlocks(worker_id))

    def clear(self) -> None:
        self.records.clear()
        self.places.clear()

    def residencies(self) -> set[CacheResidency]:
        return {self._residency(at, record) for at, record in self.records.items()}

    def holdings(self) -> list[Holding]:
        return [
            Holding(worker_id, rank, tier, group, spec, *self._totals((worker_id, tier, group)))
            for (worker_id, tier, group), (rank, spec) in self.places.items()
        ]

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        matches = []
        for worker_id in {worker_id for worker_id, _, _ in self.places}:
            specs: dict[int, GroupSpec] = {}
            ranks = []
            for (other, _, group), (rank, spec) in self.places.items():
                if other == worker_id:
                    ranks.append(rank)
                    if spec != GroupSpec() or group not in specs:
                        specs[group] = spec
            tiers = {
                tier: blocks
                for tier in TIERS
                if (blocks := self._prefix(scope, block_hashes, worker_id, {tier}, specs))
            }
            any_tier = self._prefix(scope, block_hashes, worker_id, set(TIERS), specs)
            if any_tier:
                matches.append(WorkerMatch(worker_id, ranks[0], tiers, max(tiers.values(), default=0), any_tier))
        return sorted(matches, key=lambda match: (-match.blocks, -match.blocks_any_tier, match.worker_id))

    def _prefix(
        self,
        scope: IdentityScope | None,
        block_hashes: Sequence[bytes],
        worker_id: str,
        tiers: set[CacheTier],
        specs: dict[int, GroupSpec],
    ) -> int:
        """The longest k that every group of the worker allows, tried from the longest."""
        unit = min((spec.block_size for spec in specs.values() if spec.block_size), default=0)
        steps = {group: spec.block_size // unit if spec.block_size else 1 for group, spec in specs.items()}
        held = {
            (at.block_hash, at.group)
            for at in self.records
            if at.worker_id == worker_id and at.tier in tiers and (scope is None or at.scope == scope)
        }

        def allows(group: int, spec: GroupSpec, length: int) -> bool:
            step = steps[group]
            if length % step:
                return False
            own = [(block_hash, group) in held for block_hash in block_hashes[step - 1 : length : step]]
            if spec.kind is GroupKind.FULL:
                return all(own)
            if spec.kind is GroupKind.WINDOW:
                tokens = spec.window - 1 if spec.window else 1
                size = spec.block_size or unit or 1
                return all(own[max(0, len(own) - -(-tokens // size)) :])
            return spec.kind is GroupKind.OTHER or own[-1]

        if all(spec.kind is GroupKind.OTHER for spec in specs.values()):
            return 0
        lengths = range(len(block_hashes), 0, -1)
        return next((k for k in lengths if all(allows(group, spec, k) for group, spec in specs.items())), 0)

    def _store(self, run: StoreRun, result: ApplyResult) -> None:
        place = (run.worker_id, run.tier, run.group)
        rank, spec = self.places.setdefault(place, (run.rank, GroupSpec()))
        self.places[place] = (rank, spec.after(run.spec) if run.spec else spec)
        if not run.consecutive:
            for block_hash in run.block_hashes:
                self._store_alone(run, block_hash, result)
            return
        scope, index = self._chain(run)
        parent = run.parent
        for block_hash in run.block_hashes:
            record = Record(parent, index, run.token_count, run.bytes_per_block, run.at_ms, 1)
            self._merge(Identity(scope, block_hash, run.group, run.worker_id, run.tier), record, run, result)
            parent = block_hash
            index = None if index is None else index + 1

    def _chain(self, run: StoreRun) -> tuple[IdentityScope, int | None]:
        if run.parent is None:
            return run.scope, run.start_index
        if run.parent == ROOT:
            return run.scope, 0
        own = self._own(run, run.parent)
        if own is None:
            return run.scope, run.start_index
        scope = run.scope
        if run.tenant_from_parent:
            scope = IdentityScope(scope.model_id, scope.tokenizer_id, scope.adapter_id, own.scope.tenant_id)
        index = self.records[own].index
        return scope, run.start_index if own.group != run.group or index is None else index + 1

    def _own(self, run: StoreRun, block_hash: bytes) -> Identity | None:
        """The worker's own record of a block: same group first, then own tier, then the fastest tier."""
        own = [at for at in self.records if at.worker_id == run.worker_id and at.block_hash == block_hash]
        return min(
            own,
            default=None,
            key=lambda at: (
                at.group != run.group,
                at.tier is not run.tier,
                TIERS.index(at.tier),
                at.group,
                at.scope.model_id,
                at.scope.tokenizer_id,
                at.scope.adapter_id is not None,
                at.scope.adapter_id or "",
                at.scope.tenant_id,
            ),
        )

    def _store_alone(self, run: StoreRun, block_hash: bytes, result: ApplyResult) -> None:
        own = self._own(run, block_hash)
        scope = run.scope if own is None else own.scope
        record = Record(None, None, run.token_count, run.bytes_per_block, run.at_ms, 1)
        if own is not None and run.token_count in (0, self.records[own].tokens):
            known = self.records[own]
            record = replace(record, parent=known.parent, index=known.index, tokens=known.tokens)
        self._merge(Identity(scope, block_hash, run.group, run.worker_id, run.tier), record, run, result)

    def _merge(self, at: Identity, record: Record, run: StoreRun, result: ApplyResult) -> None:
        known = self.records.get(at)
        if known is None:
            self.records[at] = record
            result.stored += 1
            return
        if run.count_copies:
            result.copies_added += 1
        else:
            result.refreshed += 1
        self.records[at] = Record(
            known.parent if record.parent is None else record.parent,
            known.index if record.index is None else record.index,
            record.tokens or known.tokens,
            record.bytes or known.bytes,
            record.at_ms or known.at_ms,
            known.copies + run.count_copies,
            known.pinned,
        )

    def _remove(self, removal: RemoveBlocks, result: ApplyResult) -> None:
        for block_hash in removal.block_hashes:
            found = [
                at
                for at in self.records
                if (at.worker_id, at.block_hash) == (removal.worker_id, block_hash)
                and removal.tier in (None, at.tier)
                and removal.group in (None, at.group)
            ]
            for at in found:
                record = self.records.pop(at)
                if record.copies > 1:
                    self.records[at] = replace(record, copies=record.copies - 1)
                else:
                    result.removed += 1
            result.copies_removed += len(found)
            result.unknown_removals += not found

    def _clear(self, clear: ClearBlocks) -> int:
        def concerned(worker_id: str, tier: CacheTier) -> bool:
            return worker_id == clear.worker_id and clear.tier in (None, tier)

        for place in [place for place in self.places if concerned(place[0], place[1])]:
            del self.places[place]
        gone = [at for at in self.records if concerned(at.worker_id, at.tier)]
        for at in gone:
            del self.records[at]
        return len(gone)

    def _totals(self, place: Place) -> tuple[int, int]:
        held = [record for at, record in self.records.items() if (at.worker_id, at.tier, at.group) == place]
        return len(held), sum(record.bytes * record.copies for record in held)

    def _residency(self, at: Identity, record: Record) -> CacheResidency:
        key = KvBlockKey.within(
            at.scope,
            at.block_hash,
            prefix_hash=record.parent,
            block_index=record.index,
            token_count=record.tokens,
            group=at.group,
        )
        rank, _ = self.places[at.worker_id, at.tier, at.group]
        return CacheResidency(
            key, at.worker_id, at.tier, record.bytes, record.at_ms, record.copies, record.pinned, rank
        )
