"""A run of one block is stored by a shorter way than others, and leaves exactly what it would leave by theirs."""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import lmdb
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.batch import Batch
from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.backends.model import (
    ROOT,
    ApplyResult,
    CacheTier,
    ClearBlocks,
    GroupSpec,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from kvcensus.backends.placed_batch import PlacedBatch
from kvcensus.backends.rocksdb.backend import RocksdbBackend

USUAL = StoreRun("a", 0, IdentityScope("m", "t"), CacheTier.HBM, (), spec=GroupSpec(block_size=16))
UNUSUAL: tuple[dict[str, Any], ...] = (
    {"worker_id": "b"},
    {"scope": IdentityScope("m", "t", None, "tenant")},
    {"scope": IdentityScope("m", "t", None, "tenant"), "tenant_from_parent": True},
    {"tenant_from_parent": True},
    {"tier": CacheTier.CPU_DRAM},
    {"group": 1},
    {"spec": None},
    {"spec": GroupSpec(block_size=32)},
    {"consecutive": False},
    {"count_copies": False},
    {"start_index": 5},
    {"token_count": 16, "at_ms": 1, "bytes_per_block": 2},
)
HASHES = tuple(bytes((number,)) * (8 if number % 3 else 16) for number in range(1, 25))

Stored = tuple[list[ApplyResult], dict[bytes, list[tuple[bytes, bytes]]]]


@st.composite
def calls_of(draw: st.DrawFn) -> list[list[Operation]]:
    """Mostly stores of one new block under one that was stored before; everything else may come between."""
    hashes = st.sampled_from(HASHES)
    known: list[bytes] = []
    operations: list[Operation] = []
    for _ in range(draw(st.integers(1, 24))):
        kind = draw(st.integers(0, 9))
        known_hash = st.sampled_from(known) if known else hashes
        if kind == 0:
            operations.append(ClearBlocks(draw(st.sampled_from("ab")), draw(st.sampled_from((None, CacheTier.HBM)))))
        elif kind == 1:
            operations.append(RemoveBlocks(draw(st.sampled_from("ab")), (draw(known_hash),)))
        else:
            parent = draw(st.one_of(known_hash, known_hash, hashes, st.sampled_from((None, ROOT))))
            blocks = tuple(draw(st.lists(hashes, max_size=3))) if kind == 2 else (draw(hashes),)
            changed = draw(st.sampled_from(UNUSUAL)) if kind < 6 else {}
            operations.append(replace(USUAL, block_hashes=blocks, parent=parent, **changed))
            known += blocks
    cuts = sorted({0, len(operations), *draw(st.lists(st.integers(0, len(operations)), max_size=2))})
    return [operations[start:end] for start, end in pairwise(cuts)]


def lmdb_after(calls: Sequence[Sequence[Operation]]) -> Stored:
    with tempfile.TemporaryDirectory() as directory:
        backend = LmdbBackend(Path(directory, "index"))
        results = [backend.apply(call) for call in calls]
        backend.close()
        with lmdb.open(str(Path(directory, "index", INDEX_FILE)), subdir=False, readonly=True, max_dbs=8) as env:
            with env.begin() as txn:
                names = list(txn.cursor().iternext(values=False))
            tables = [env.open_db(name, create=False) for name in names]
            with env.begin() as txn:
                return results, {name: list(txn.cursor(table)) for name, table in zip(names, tables)}


def rocksdb_after(calls: Sequence[Sequence[Operation]]) -> Stored:
    with tempfile.TemporaryDirectory() as directory:
        backend = RocksdbBackend(Path(directory))
        results = [backend.apply(call) for call in calls]
        pinned = backend._store.pin()
        rows = list(backend._store.walk(pinned, b"", b"\xff\xff"))
        pinned.release()
        backend.close()
        return results, {b"": rows}


def by_the_way_of_all(batch: Batch, operations: Sequence[Operation], keys: list[bytes]) -> None:
    start = 0
    for operation in operations:
        start = batch._apply_any(operation, keys, start)


@settings(max_examples=300)
@given(calls_of())
def test_lmdb_has_the_same_tables_by_the_short_way_and_by_the_way_of_all(calls: list[list[Operation]]) -> None:
    by_the_short_way = lmdb_after(calls)
    with mock.patch.object(Batch, "_apply", by_the_way_of_all):
        assert lmdb_after(calls) == by_the_short_way


def as_if_it_had_a_row(
    batch: PlacedBatch, run: StoreRun, keys: list[bytes], place: int, scope: int, index: int, _: bytes
) -> None:
    batch._store_mixed(run, keys, place, scope, index)


@settings(max_examples=60)
@given(calls_of())
def test_rocksdb_has_the_same_rows_by_the_short_way_and_as_if_the_block_had_a_row(calls: list[list[Operation]]) -> None:
    by_the_short_way = rocksdb_after(calls)
    with mock.patch.object(PlacedBatch, "_store_one", as_if_it_had_a_row):
        assert rocksdb_after(calls) == by_the_short_way
