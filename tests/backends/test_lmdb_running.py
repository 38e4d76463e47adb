"""An LMDB index while it is written: full, cleared, killed, and read from another process."""

import random
import signal
import struct
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from kvcensus.backends.errors import BackendError, BackendFull
from kvcensus.backends.lmdb import LmdbBackend, reader
from kvcensus.backends.lmdb.rows import unpack_row
from kvcensus.backends.model import ROOT, Cursor, StoreRun

from .building import LORA, SCOPE, blocks, clear, remove, store

A, B = blocks(1, 2)


def runs(number: int, length: int = 64, worker: str = "w", seed: int = 1) -> list[StoreRun]:
    """Chains of random hashes."""
    random_bytes = random.Random(seed).randbytes
    return [store(*(random_bytes(8) for _ in range(length)), worker=worker) for _ in range(number)]


def fill(backend: LmdbBackend, batches: list[StoreRun]) -> None:
    for number, batch in enumerate(batches):
        backend.apply([batch], [Cursor("s", 0, number)])


def pages_in_use(backend: LmdbBackend) -> int:
    """Pages of the tree of blocks."""
    with backend._env.begin() as txn:
        stat = txn.stat(backend._tables.blocks)
    return int(stat["leaf_pages"] + stat["branch_pages"])


# questions


def test_the_first_children_are_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LmdbBackend(tmp_path, map_size=64 << 20)
    backend.apply(runs(2_000, length=1))
    every = sorted(one.key.block_hash for one in backend.snapshot())
    read = []
    monkeypatch.setattr(reader, "unpack_row", lambda row: (read.append(row), unpack_row(row))[1])

    found, more = backend.first_children(SCOPE, ROOT, 5)

    assert ([one.key.block_hash for one in found], more) == (every[:5], True)
    assert len(read) == 6
    backend.close()


# all or nothing


def test_a_full_map_changes_nothing_and_is_survived(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path, map_size=2 << 20)
    backend.apply([store(A, scope=LORA)])
    with pytest.raises(BackendFull, match="map size"):
        fill(backend, runs(1000))
    applied = backend.cursors()["s"].seq + 1

    assert applied > 10
    assert (
        len(backend)
        == applied * 64 + 1
        == len(list(backend.snapshot()))
        == sum(one.blocks for one in backend.holdings())
    )

    with pytest.raises(BackendFull):
        backend.apply([clear(), store(B, worker="new", scope=LORA), *runs(1000, seed=2)], [Cursor("s", 0, 9999)])
    assert len(backend) == applied * 64 + 1
    assert backend.find(B) == []
    assert [one.worker_id for one in backend.holdings()] == ["w"]

    assert backend.clear_worker("w") == applied * 64 + 1
    while backend.reclaim(500):
        pass
    fill(backend, runs(applied // 2, seed=3))
    assert len(backend) == applied // 2 * 64
    backend.close()


def test_a_full_map_has_room_after_reopening_with_a_larger_one(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path, map_size=1 << 20)
    with pytest.raises(BackendFull):
        fill(backend, runs(1000))
    held = len(backend)
    backend.close()

    backend = LmdbBackend(tmp_path, map_size=64 << 20)
    assert len(backend) == held
    backend.apply(runs(1000, seed=2))
    assert len(backend) == held + 64_000
    backend.close()


def test_a_failed_apply_changes_nothing(lmdb_backend: LmdbBackend) -> None:
    """Whatever the error: here a hash that LMDB cannot have as a key, and a number that has no room in a row."""
    lmdb_backend.apply([store(A)], [Cursor("s", 0, 1)])
    known = lmdb_backend.holdings()

    for bad in (store(b"x" * 1000), store(B, tokens=1 << 40)):
        with pytest.raises((IndexError, struct.error)):
            lmdb_backend.apply([clear(), store(B, worker="new", scope=LORA), bad], [Cursor("s", 0, 2)])

    assert lmdb_backend.holdings() == known
    assert lmdb_backend.cursors() == {"s": Cursor("s", 0, 1)}
    lmdb_backend.apply([store(B, worker="new", scope=LORA)])
    assert [one.key.scope for one in lmdb_backend.find(B)] == [LORA]
    assert len(lmdb_backend) == 2


WRITER = """
import pathlib, sys
from itertools import count
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.model import *

def block(seq, at):
    return (seq * 1000 + at).to_bytes(8, "big")

backend = LmdbBackend(pathlib.Path(sys.argv[1]))
known = backend.cursors().get("s")
for seq in count(0 if known is None else known.seq + 1):
    run = [block(seq, at) for at in range(100)]
    operations = [StoreRun("w", None, IdentityScope("m", "t"), CacheTier.HBM, tuple(run[at:at + 20]),
                           run[at - 1] if at else ROOT) for at in range(0, 100, 20)]
    if seq >= 10:
        operations.append(RemoveBlocks("w", tuple(block(seq - 10, at) for at in range(100))))
    if seq % 50 == 49:
        operations[:0] = [ClearBlocks("w")]
    backend.apply(operations, [Cursor("s", 0, seq)])
    backend.reclaim(50)
    if seq % 10 == 0:
        print(seq, flush=True)
"""


def held_after(seq: int) -> set[int]:
    """The numbers whose 100 blocks the writer above holds once `seq` is applied."""
    cleared = (seq + 1) // 50 * 50 - 1
    return {number for number in range(seq - 9, seq + 1) if number >= max(cleared, 0)}


def test_killed_at_any_moment_state_and_cursor_agree(tmp_path: Path) -> None:
    last = -1
    for turn in range(25):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.Random(turn).random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()

        backend = LmdbBackend(tmp_path)
        seq = backend.cursors()["s"].seq
        records = list(backend.snapshot())
        numbers = {int.from_bytes(one.key.block_hash, "big") for one in records}
        assert numbers == {number * 1000 + at for number in held_after(seq) for at in range(100)}
        assert all(one.ref_count == 1 for one in records)
        assert all(one.key.block_index == int.from_bytes(one.key.block_hash, "big") % 1000 for one in records)
        assert len(backend) == len(records) == sum(one.blocks for one in backend.holdings())
        for number in held_after(seq):
            chain = [(number * 1000 + at).to_bytes(8, "big") for at in range(100)]
            assert backend.match(None, chain)[0].blocks == 100
        backend.close()
        assert seq > last
        last = seq


# clearing


def test_clearing_a_large_worker_is_seen_at_once_and_its_pages_come_back(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    batches = runs(3125)
    for at in range(0, len(batches), 500):
        backend.apply(batches[at : at + 500])
    backend.apply([store(A, B, worker="other")])
    full = pages_in_use(backend)

    begin = time.perf_counter()
    assert backend.clear_worker("w") == 200_000
    assert backend.match(None, batches[0].block_hashes) == []
    assert backend.find(batches[0].block_hashes[0]) == []
    assert len(backend) == 2
    assert len(backend.prefix_scan(SCOPE, ROOT)) == 1
    took = time.perf_counter() - begin

    assert took < 1.0
    for chunks in count():  # noqa: B007
        if not backend.reclaim(20_000):
            break
    assert chunks <= 12
    assert pages_in_use(backend) < full / 100
    assert [one.worker_id for one in backend.prefix_scan(SCOPE, ROOT)] == ["other"]
    size = backend.stored_bytes()
    for at in range(0, len(batches), 500):
        backend.apply(batches[at : at + 500])
    assert backend.stored_bytes() < size * 1.1
    backend.close()


def test_reclaim_goes_on_after_reopening(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    backend.apply(runs(100, worker="gone"))
    backend.apply([*runs(20, worker="w", seed=2), clear("gone")])
    assert backend.reclaim(1000)
    backend.close()

    backend = LmdbBackend(tmp_path)
    turns = 0
    while backend.reclaim(1000):
        turns += 1
    with backend._env.begin() as txn:
        assert txn.stat(backend._tables.dead)["entries"] == 0
        assert txn.stat(backend._tables.blocks)["entries"] == 20 * 64 + 20
    assert 4 <= turns <= 8
    assert len(list(backend.snapshot())) == 20 * 64
    backend.close()


def test_removing_every_block_leaves_no_row_and_no_link(lmdb_backend: LmdbBackend) -> None:
    batches = runs(50)
    lmdb_backend.apply(batches)
    lmdb_backend.apply([store(A, parent=batches[0].block_hashes[5]), store(B, parent=A)])
    hashes = [one for batch in batches for one in batch.block_hashes]
    random.Random(1).shuffle(hashes)
    lmdb_backend.apply([remove(A)])
    for block_hash in hashes:
        lmdb_backend.apply([remove(block_hash)])
    lmdb_backend.apply([remove(B)])

    with lmdb_backend._env.begin() as txn:
        assert txn.stat(lmdb_backend._tables.blocks)["entries"] == 0
    assert lmdb_backend.metrics().resident_blocks == 0


# other processes

READER = """
import pathlib, sys
from kvcensus.backends.lmdb import LmdbReader
reader = LmdbReader.open(pathlib.Path(sys.argv[1]))
chain = [bytes.fromhex(one) for one in sys.argv[2].split(",")]
print("ready", flush=True)
turns = steps = 0
longest = 0
while longest < len(chain):
    turns += 1
    before = reader.cursors()["s"].seq
    matches = reader.match(None, chain)
    after = reader.cursors()["s"].seq
    blocks = matches[0].blocks if matches else 0
    assert before <= blocks <= after, (before, blocks, after)
    assert blocks >= longest
    steps += blocks > longest
    longest = blocks
print(turns, steps, len(reader.find(chain[-1])), reader.holdings()[0].blocks)
reader.close()
"""


def test_a_reader_in_another_process_sees_every_commit_as_it_is_made(tmp_path: Path) -> None:
    chain = blocks(*range(1, 401))
    backend = LmdbBackend(tmp_path)
    backend.apply([], [Cursor("s", 0, 0)])
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path), ",".join(one.hex() for one in chain)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"

    for seq, block_hash in enumerate(chain, 1):
        backend.apply([store(block_hash, parent=chain[seq - 2] if seq > 1 else ROOT)], [Cursor("s", 0, seq)])
        time.sleep(0.001)

    report, _ = reader.communicate(timeout=30)
    assert reader.returncode == 0
    turns, steps, found, held = map(int, report.split())
    assert turns >= steps > 20
    assert (found, held) == (1, 400)
    backend.close()


def test_a_reader_learns_of_clears_new_places_and_scopes(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    backend.apply([store(A, B)])
    code = """
import pathlib, sys
from kvcensus.backends.lmdb import LmdbReader
from kvcensus.backends.model import *
reader = LmdbReader.open(pathlib.Path(sys.argv[1]))
chain = [(1).to_bytes(8, "big"), (2).to_bytes(8, "big")]
for line in sys.stdin:
    print([(one.worker_id, one.blocks) for one in reader.match(None, chain)],
          [one.key.adapter_id for one in reader.find(chain[0])],
          len(reader.prefix_scan(IdentityScope("model", "tokenizer"), ROOT)), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def asked() -> str:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("?\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip()

        assert asked() == "[('w', 2)] [None] 1"
        backend.apply([clear()])
        assert asked() == "[] [] 0"
        backend.apply([store(A, worker="other", scope=LORA)])
        assert asked() == "[('other', 1)] ['lora'] 0"
        backend.close()
        assert asked() == "[('other', 1)] ['lora'] 0"
        reader.stdin.close()


def test_the_read_transaction_of_a_killed_reader_is_ended_by_reclaim(tmp_path: Path) -> None:
    """It would keep every page freed from then on."""
    backend = LmdbBackend(tmp_path)
    backend.apply(runs(10))
    code = """
import pathlib, sys, time
from kvcensus.backends.lmdb import LmdbReader
reader = LmdbReader.open(pathlib.Path(sys.argv[1]))
txn = reader._env.begin()
print("pinned", flush=True)
time.sleep(60)
"""
    reader = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.readline()
    reader.kill()
    reader.wait()
    reader.stdout.close()
    assert str(reader.pid) in backend._env.readers()

    backend.reclaim(1)

    assert str(reader.pid) not in backend._env.readers()
    backend.close()


def test_a_snapshot_leaves_nothing_behind(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    backend.apply(runs(10))
    snapshot = backend.snapshot()
    next(snapshot)
    assert len(list(tmp_path.glob("snapshot-*"))) == 1
    snapshot.close()  # type: ignore[attr-defined]
    assert list(tmp_path.glob("snapshot-*")) == []
    assert len(list(backend.snapshot())) == 640
    assert list(tmp_path.glob("snapshot-*")) == []
    backend.close()


def test_no_room_for_a_snapshot_is_an_error_and_the_index_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LmdbBackend(tmp_path)
    backend.apply(runs(10))
    monkeypatch.setattr("kvcensus.backends.lmdb.reader.INDEX_FILE", "no/such/folder/index.mdb")
    with pytest.raises(BackendError, match="no snapshot"):
        next(backend.snapshot())
    monkeypatch.undo()
    assert len(list(backend.snapshot())) == 640
    backend.close()
