"""Any sequence of calls gives the same answers from the oracle, in memory and from files that are reopened."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcensus.backends.filesystem import FilesystemBackend
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import (
    ROOT,
    CacheResidency,
    CacheTier,
    ClearBlocks,
    Cursor,
    GroupKind,
    GroupSpec,
    IdentityScope,
    KvBlockKey,
    RemoveBlocks,
    StoreRun,
)
from kvcensus.backends.registry import open_backend
from tests.valkey_servers import why_untested, with_server

from .oracle import Oracle

PERSISTENT = [name for name in ("lmdb", "filesystem", "rocksdb", "valkey", "holt") if not why_untested(name)]

HASHES = (
    b"\x00" * 8,
    b"abcdefgh",
    b"abcdefgh" + b"\x00" * 8,
    b"abcdefgh" + b"\x01ijklmno",
    b"a\x00cdefgh",
    b"\x01" * 8,
    b"\xff" * 8,
    b"\x08" * 32,
    b"\x00\x01",
)
SCOPES = (
    IdentityScope("m", "t"),
    IdentityScope("m", "t", ""),
    IdentityScope("m", "t", "lora", "tenant"),
    IdentityScope("m", "t", None, "tenant"),
)
SPECS = {
    ("plain", 0): None,
    ("plain", 1): None,
    ("hybrid", 0): GroupSpec(GroupKind.FULL, 0, 16),
    ("hybrid", 1): GroupSpec(GroupKind.WINDOW, 33, 16),
    ("state", 0): GroupSpec(GroupKind.FULL, 0, 32),
    ("state", 1): GroupSpec(GroupKind.STATE, 0, 16),
    ("window", 0): GroupSpec(GroupKind.WINDOW, 20, 16),
    ("window", 1): GroupSpec(GroupKind.OTHER, 0, 16),
}
RANKS = {"plain": None, "hybrid": 0, "state": 1, "window": None}

hashes = st.sampled_from(HASHES)
runs_of_hashes = st.lists(hashes, min_size=0, max_size=5).map(tuple)
scopes = st.sampled_from(SCOPES)
workers = st.sampled_from(sorted(RANKS))
tiers = st.sampled_from([CacheTier.HBM, CacheTier.CPU_DRAM, CacheTier.LOCAL_SSD])
parents = st.one_of(st.none(), st.just(ROOT), hashes, hashes, hashes)


@st.composite
def stores(draw: st.DrawFn) -> StoreRun:
    worker, group = draw(workers), draw(st.integers(0, 1))
    return StoreRun(
        worker_id=worker,
        rank=RANKS[worker],
        scope=draw(scopes),
        tier=draw(tiers),
        block_hashes=draw(runs_of_hashes),
        parent=draw(parents),
        group=group,
        token_count=draw(st.sampled_from([0, 16, 32])),
        at_ms=draw(st.integers(0, 3)),
        bytes_per_block=draw(st.sampled_from([0, 100, 200])),
        consecutive=draw(st.sampled_from([True, True, True, False])),
        tenant_from_parent=draw(st.booleans()),
        count_copies=draw(st.sampled_from([True, True, False])),
        spec=SPECS[worker, group] if draw(st.booleans()) else None,
        start_index=draw(st.sampled_from([None, None, 0, 5])),
    )


removals = st.builds(
    RemoveBlocks,
    worker_id=workers,
    block_hashes=runs_of_hashes,
    tier=st.one_of(st.none(), tiers),
    group=st.sampled_from([None, 0, 1]),
)
clears = st.builds(ClearBlocks, worker_id=workers, tier=st.one_of(st.none(), tiers))
operations = st.one_of(stores(), stores(), stores(), removals, removals, clears)
cursors = st.builds(Cursor, stream=st.sampled_from(["a", "b"]), epoch=st.integers(0, 2), seq=st.integers(-1, 9))
keys = st.builds(
    KvBlockKey.within,
    scopes,
    hashes,
    prefix_hash=parents,
    block_index=st.sampled_from([None, 0, 3]),
    token_count=st.sampled_from([0, 16]),
    group=st.integers(0, 1),
)


@st.composite
def residencies(draw: st.DrawFn) -> CacheResidency:
    worker = draw(workers)
    return CacheResidency(
        draw(keys),
        worker,
        draw(tiers),
        bytes=draw(st.sampled_from([0, 100])),
        last_access_ms=draw(st.integers(0, 3)),
        ref_count=draw(st.integers(1, 3)),
        pinned=draw(st.booleans()),
        rank=RANKS[worker],
    )


class Backends(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.oracle = Oracle()
        self.memory = MemoryBackend()
        self.options = {name: with_server(name, {}) for name in PERSISTENT}
        self.persistent = {name: open_backend(name, self.directory / name, self.options[name]) for name in PERSISTENT}
        self.question = list(HASHES)

    @property
    def every(self) -> list[IndexBackend]:
        return [self.memory, *self.persistent.values()]

    def teardown(self) -> None:
        for backend in self.every:
            backend.close()
        shutil.rmtree(self.directory)

    @initialize(question=st.permutations(HASHES))
    def ask_about(self, question: list[bytes]) -> None:
        self.question = question

    @rule(batch=st.lists(operations, max_size=6), at=st.lists(cursors, max_size=2))
    def apply(self, batch: list[StoreRun | RemoveBlocks | ClearBlocks], at: list[Cursor]) -> None:
        wanted = self.oracle.apply(batch, at)
        for backend in self.every:
            assert backend.apply(batch, at) == wanted

    @rule(one=residencies())
    def put(self, one: CacheResidency) -> None:
        self.oracle.put(one)
        for backend in self.every:
            backend.put(one)

    @rule(scope=scopes, worker=workers, block_hash=hashes)
    def remove_block(self, scope: IdentityScope, worker: str, block_hash: bytes) -> None:
        wanted = self.oracle.remove_block(scope, worker, block_hash)
        for backend in self.every:
            assert backend.remove_block(scope, worker, block_hash) == wanted

    @rule(worker=workers)
    def clear_worker(self, worker: str) -> None:
        wanted = self.oracle.clear_worker(worker)
        for backend in self.every:
            assert backend.clear_worker(worker) == wanted

    @rule(certain=st.sampled_from([False, False, False, True]))
    def clear(self, certain: bool) -> None:
        if certain:
            self.oracle.clear()
            for backend in self.every:
                backend.clear()

    @rule(stream=st.sampled_from(["a", "b"]))
    def forget_stream(self, stream: str) -> None:
        self.oracle.cursors.pop(stream, None)
        for backend in self.every:
            backend.forget_stream(stream)

    @rule(rows=st.integers(1, 8))
    def reclaim(self, rows: int) -> None:
        for backend in self.every:
            backend.reclaim(rows)

    @rule()
    def reclaim_all(self) -> None:
        for backend in self.every:
            while backend.reclaim(5):
                pass

    @rule()
    def write_snapshot(self) -> None:
        filesystem = self.persistent["filesystem"]
        assert isinstance(filesystem, FilesystemBackend)
        filesystem.compact()

    @rule()
    def reopen(self) -> None:
        for name, backend in self.persistent.items():
            backend.close()
            self.persistent[name] = open_backend(name, self.directory / name, self.options[name])

    @invariant()
    def answers_are_the_same(self) -> None:
        records = self.oracle.residencies()
        holdings = counted(self.oracle.holdings())
        for backend in self.every:
            assert len(backend) == len(records)
            assert backend.metrics().resident_blocks == len(records)
            assert backend.metrics().resident_bytes == sum(one.bytes * one.ref_count for one in records)
            assert counted(backend.snapshot()) == counted(records)
            assert counted(backend.holdings()) == holdings
            assert backend.cursors() == self.oracle.cursors
            for block_hash in HASHES:
                under_hash = {one for one in records if one.key.block_hash == block_hash}
                assert counted(backend.find(block_hash)) == counted(under_hash)
                scope, group = SCOPES[len(block_hash) % 4], len(records) % 2
                exact = {one for one in under_hash if one.key.scope == scope and one.key.group == group}
                assert counted(backend.locate(KvBlockKey.within(scope, block_hash, group=group))) == counted(exact)
            for scope in SCOPES:
                for parent in (ROOT, *HASHES):
                    children = {one for one in records if (one.key.scope, one.key.prefix_hash) == (scope, parent)}
                    assert counted(backend.prefix_scan(scope, parent)) == counted(children)
            for asked in (None, *SCOPES):
                assert backend.match(asked, self.question) == self.oracle.match(asked, self.question)


def counted(found: Iterable[object]) -> Counter[object]:
    return Counter(found)


TestBackends = Backends.TestCase
TestBackends.settings = settings(
    max_examples=int(os.environ.get("KVCENSUS_STATE_MACHINE_EXAMPLES", "60")),
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
