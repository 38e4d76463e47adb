"""The Holt backend: what its log promises, and what is made of the crate's errors."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import pytest

from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat, BackendFull
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import ROOT, Cursor
from kvcensus.backends.registry import open_backend, why_unusable

from .building import blocks, key, residency, store
from .crashing import CrashTest, content

pytestmark = pytest.mark.skipif(bool(why_unusable("holt")), reason=why_unusable("holt"))


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[IndexBackend]:
    opened = open_backend("holt", tmp_path)
    yield opened
    opened.close()


def fill(backend: IndexBackend, batches: int) -> None:
    for number in range(batches):
        run = blocks(*range(number * 8, number * 8 + 8))
        backend.apply([store(*run, parent=blocks(number * 8 - 1)[0] if number else ROOT)], [Cursor("s", 1, number)])


def killed(directory: Path, wal: bytes) -> IndexBackend:
    """The index in a directory whose log is what a killed process has left."""
    (directory / "holt" / "journal.wal").write_bytes(wal)
    return open_backend("holt", directory)


def log_of(directory: Path, batches: int) -> bytes:
    """The log of an index that was filled and never checkpointed; its data file has nothing yet."""
    backend = open_backend("holt", directory)
    backend._store.checkpoint()  # type: ignore[attr-defined]
    fill(backend, batches)
    log = (directory / "holt" / "journal.wal").read_bytes()
    backend._store._close_tree()  # type: ignore[attr-defined]
    backend._owner.release()  # type: ignore[attr-defined]
    return log


def test_a_log_that_ends_within_a_record_gives_the_batch_before(tmp_path: Path) -> None:
    log = log_of(tmp_path, 5)
    backend = killed(tmp_path, log[:-3])
    assert backend.cursors()["s"].seq == 3
    assert len(backend) == len(list(backend.snapshot())) == 32
    fill(backend, 5)
    assert len(backend) == 40
    backend.close()


def test_damage_within_the_log_is_not_served(tmp_path: Path) -> None:
    log = bytearray(log_of(tmp_path, 5))
    log[4096 + 200] ^= 0xFF
    with pytest.raises(BackendCorrupt, match="To rebuild it from the engines"):
        killed(tmp_path, bytes(log))
    rebuilt = open_backend("holt", tmp_path, {"on_corrupt": "rebuild"})
    assert rebuilt.is_empty()
    assert rebuilt.moved_aside is not None
    rebuilt.close()


def test_a_batch_that_fails_half_way_is_forgotten(backend: IndexBackend) -> None:
    fill(backend, 2)
    before = content(backend)
    store_ = backend._store  # type: ignore[attr-defined]
    reader = backend.snapshot()
    next(reader)
    # The tree has no way to hold both of the last two keys, and finds it out when it has changed its memory.
    with pytest.raises(BackendError, match="strict prefix"):
        store_.write({b"\xfex": b"1", b"\xfey": b"2", b"\xfey\x00": b"3"}, lambda: None)
    assert store_.get(b"\xfex") is None
    assert content(backend) == before
    fill(backend, 3)
    assert backend.cursors()["s"].seq == 2


def test_a_batch_beyond_the_limit_of_the_log_changes_nothing(backend: IndexBackend) -> None:
    chance = random.Random(1)
    before = content(backend)
    with pytest.raises(BackendError, match="WAL record is too large"):
        backend.apply([store(*(chance.randbytes(32) for _ in range(100_000)))], [Cursor("s", 1, 1)])
    assert content(backend) == before
    backend.apply([store(*blocks(1, 2))])
    assert len(backend) == 2


def test_put_all_has_no_such_limit(backend: IndexBackend) -> None:
    chance = random.Random(1)
    backend.put_all([residency(key(chance.randbytes(32)), "w") for _ in range(25_000)])
    assert len(backend) == 25_000


@pytest.mark.parametrize("size", [1, 4, 8, 32])
def test_random_hashes_of_any_length_fill_more_than_one_frame(backend: IndexBackend, size: int) -> None:
    chance = random.Random(size)
    hashes = sorted({chance.randbytes(size) for _ in range(8_000)})
    for at in range(0, len(hashes), 1000):
        backend.apply([store(*hashes[at : at + 1000])])
    assert sorted(one.key.block_hash for one in backend.snapshot()) == hashes
    assert all(backend.find(one) for one in hashes[::50])


def test_hashes_that_are_numbers_take_no_more_room_than_others(tmp_path: Path) -> None:
    chance = random.Random(1)
    sizes = []
    for name, hashes in (("numbers", blocks(*range(20_000))), ("random", [chance.randbytes(8) for _ in range(20_000)])):
        backend = open_backend("holt", tmp_path / name)
        for at in range(0, len(hashes), 1000):
            backend.apply([store(*hashes[at : at + 1000])])
        backend.close()
        sizes.append((tmp_path / name / "holt" / "blobs.dat").stat().st_size)
    assert sizes[0] < 1.5 * sizes[1]


@pytest.mark.parametrize("pairs", range(1600, 2500, 100))
def test_what_is_left_of_a_full_frame_can_be_packed(tmp_path: Path, pairs: int) -> None:
    from kvcensus_holt._native import Tree

    def keys(last: bytes) -> list[bytes]:
        return [bytes(digits) + last for digits in islice(product(range(4), repeat=6), pairs)]

    tree = Tree(tmp_path, False, 64)
    for last in (b"a", b"b"):
        tree.atomic([(one, b"") for one in keys(last)])
    # Each inner node is left with one child, and packed that takes more than it did.
    tree.atomic([(one, None) for one in keys(b"b")])
    for inserted in keys(b"c"):
        tree.atomic([(inserted, b"")])
    assert len(tree.scan_keys(b"", None, 0)) == 2 * pairs
    tree.compact()
    tree.close()


def test_what_is_checkpointed_and_what_is_only_in_the_log_make_one_index(tmp_path: Path) -> None:
    backend = open_backend("holt", tmp_path, {"checkpoint_bytes": 1 << 12})
    fill(backend, 20)
    before = content(backend)
    backend._store._close_tree()  # type: ignore[attr-defined]
    backend._owner.release()  # type: ignore[attr-defined]
    backend = open_backend("holt", tmp_path)
    assert content(backend) == before
    backend.close()


def test_a_second_process_is_refused(backend: IndexBackend, tmp_path: Path) -> None:
    with pytest.raises(BackendBusy, match="in use by process"):
        open_backend("holt", tmp_path)


def test_a_tree_of_another_schema_is_left_alone(tmp_path: Path) -> None:
    backend = open_backend("holt", tmp_path)
    store_ = backend._store  # type: ignore[attr-defined]
    store_.write({b"\xffm\x06schema": b"\x00\x00\x00\x63"}, lambda: None)
    backend.close()
    with pytest.raises(BackendFormat, match="has schema 99"):
        open_backend("holt", tmp_path)


def test_space_of_what_was_cleared_is_given_back(backend: IndexBackend) -> None:
    chance = random.Random(1)
    for _ in range(10):
        backend.apply([store(*(chance.randbytes(8) for _ in range(1000)))])
    backend.compact()
    full = backend.stored_bytes()
    backend.clear_worker("w")
    while backend.reclaim(4000):
        pass
    backend.compact()
    assert backend.stored_bytes() < full / 2


def test_buffered_may_lose_the_last_batches_with_the_process_and_nothing_else(tmp_path: Path) -> None:
    options = {"durability": "buffered", "checkpoint_bytes": 1 << 20}
    test = CrashTest("holt", tmp_path, options, keeps_last=False)
    for number in range(3):
        test.kill(random.Random(number).uniform(0.2, 0.6))
        test.check()
    assert test.reached > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("checkpoint_bytes", [1 << 30, 1 << 22], ids=["in the log", "in a checkpoint"])
def test_a_full_disk_changes_nothing_and_is_survived(small_disk: Path, checkpoint_bytes: int) -> None:
    chance = random.Random(1)
    try:
        backend = open_backend("holt", small_disk, {"checkpoint_bytes": checkpoint_bytes})
    except BackendError as error:
        pytest.skip(f"a file system in memory is not enough for Holt here: {error}")
    applied = 0
    while True:
        assert applied < 1000, "the disk is not small"
        run = [chance.randbytes(32) for _ in range(1024)]
        try:
            backend.apply([store(*run)], [Cursor("s", 1, applied)])
        except BackendFull:
            break
        applied += 1
    with pytest.raises(BackendFull, match="the disk is full"):
        backend.apply([store(*run)], [Cursor("s", 1, applied)])
    assert backend.cursors()["s"].seq == applied - 1
    assert len(backend) == len(list(backend.snapshot())) == applied * 1024

    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    backend.apply([store(*run)], [Cursor("s", 1, applied)])
    backend.close()
    backend = open_backend("holt", small_disk)
    assert backend.cursors()["s"].seq == applied
    assert len(backend) == len(list(backend.snapshot())) == (applied + 1) * 1024
    backend.close()
