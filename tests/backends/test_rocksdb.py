"""A RocksDB index while it is written, closed, copied, damaged, and out of room."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rocksdict")

from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat, BackendFull
from kvcensus.backends.model import ApplyResult, CacheResidency, Cursor, StoreRun
from kvcensus.backends.placed_backend import SUSPECT_FILE
from kvcensus.backends.placed_rows import META_KEY, NUMBER
from kvcensus.backends.rocksdb.backend import DATABASE, RocksdbBackend
from kvcensus.backends.rocksdb.options import Durability, OnCorrupt, Resources
from kvcensus.backends.rocksdb.rows import BLOCKS

from .building import DRAM, LORA, block, blocks, clear, remove, store

A, B, C = blocks(1, 2, 3)
SMALL = Resources(write_buffer_bytes=1 << 18)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[RocksdbBackend]:
    opened = RocksdbBackend(tmp_path)
    yield opened
    opened.close()


def chain(first: int, length: int) -> list[bytes]:
    return [block(number) for number in range(first, first + length)]


def runs(first: int, length: int) -> list[StoreRun]:
    return [store(*(os.urandom(24) for _ in range(64)), at_ms=number) for number in range(first, first + length)]


def hashes(found: Iterator[CacheResidency]) -> list[bytes]:
    return sorted(one.key.block_hash for one in found)


def keys_of_blocks(directory: Path) -> list[bytes]:
    """What stands in the files, without the backend."""
    database = Rdict(str(directory / DATABASE), Options(raw_mode=True))
    found = [key for key, _ in database.items() if isinstance(key, bytes) and key < BLOCKS[1]]
    database.close()
    return found


# who has it open


def test_a_second_process_is_told_who_has_the_index(backend: RocksdbBackend, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from kvcensus.backends.rocksdb.backend import RocksdbBackend
RocksdbBackend(Path({str(tmp_path)!r}))
"""
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"BackendBusy: data directory {tmp_path} is in use by process {os.getpid()}" in second.stderr


def test_a_database_that_something_else_has_open_is_busy(tmp_path: Path) -> None:
    other = Rdict(str(tmp_path / DATABASE), Options(raw_mode=True))
    with pytest.raises(BackendBusy):
        RocksdbBackend(tmp_path)
    other.close()


def test_a_snapshot_that_is_being_read_does_not_keep_a_closed_index_open(tmp_path: Path) -> None:
    first = RocksdbBackend(tmp_path)
    first.apply([store(*chain(0, 5000))])
    snapshot = first.snapshot()
    next(snapshot)
    first.close()

    second = RocksdbBackend(tmp_path)

    assert len(second) == 5000
    with pytest.raises(BackendError, match="closed while a snapshot"):
        list(snapshot)
    second.close()


def test_an_error_that_is_kept_does_not_keep_a_closed_index_open(tmp_path: Path) -> None:
    first = RocksdbBackend(tmp_path)

    def fail() -> None:
        with first._store.asking() as question:
            question.under(b"\x08" + A)
            raise Exception("IO error: as rocksdict raises it")

    with pytest.raises(BackendError) as kept:
        fail()
    first.close()
    RocksdbBackend(tmp_path).close()
    assert "as rocksdict raises it" in str(kept.value)


def test_close_waits_for_a_question_that_is_being_answered(tmp_path: Path) -> None:
    first = RocksdbBackend(tmp_path)
    with first._store.asking():
        closing = threading.Thread(target=first.close)
        closing.start()
        time.sleep(0.2)
        assert closing.is_alive()
    closing.join(timeout=10)
    RocksdbBackend(tmp_path).close()


def test_a_closed_index_says_so(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.close()
    for ask in (lambda: backend.find(A), backend.holdings, lambda: next(backend.snapshot())):
        with pytest.raises(BackendError, match="is closed"):
            ask()


# one moment


def test_a_snapshot_of_many_rows_is_of_one_moment(backend: RocksdbBackend) -> None:
    backend.apply([store(*chain(0, 5000))])
    snapshot = backend.snapshot()
    first = next(snapshot)

    backend.apply([clear(), store(*chain(1000, 9000))])
    backend.apply([remove(*chain(2000, 100))])
    while backend.reclaim(5000):
        pass

    assert sorted([first.key.block_hash, *hashes(snapshot)]) == chain(0, 5000)
    assert len(list(backend.snapshot())) == len(backend) == 8900


# what stays after a restart


def test_what_was_opened_with_is_used_by_an_index_that_exists(tmp_path: Path) -> None:
    """rocksdict takes the options of the last time unless it is told twice."""
    RocksdbBackend(tmp_path).close()
    backend = RocksdbBackend(tmp_path, resources=Resources(write_buffer_bytes=3 << 20, block_cache_bytes=5 << 20))
    assert backend._store.number("block-cache-capacity") == 5 << 20
    newest = max((tmp_path / DATABASE).glob("OPTIONS-*"))
    assert f"  write_buffer_size={3 << 20}\n" in newest.read_text()
    backend.close()


@pytest.mark.parametrize("durability", Durability)
def test_an_index_is_the_same_after_a_restart(tmp_path: Path, durability: Durability) -> None:
    backend = RocksdbBackend(tmp_path, durability=durability, resources=SMALL)
    for number in range(50):
        backend.apply([store(*chain(number * 64, 64), size=10), remove(block(number))], [Cursor("s", 0, number)])
    before = (sorted(map(repr, backend.snapshot())), backend.holdings(), backend.cursors(), len(backend))
    backend.close()

    backend = RocksdbBackend(tmp_path, durability=durability, resources=SMALL)
    assert (sorted(map(repr, backend.snapshot())), backend.holdings(), backend.cursors(), len(backend)) == before
    assert backend.apply([store(block(100))]) == ApplyResult(copies_added=1)
    backend.close()


def test_the_number_of_a_place_that_came_and_went_is_not_used_again(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(A, B), clear()])
    backend.close()

    backend = RocksdbBackend(tmp_path)
    backend.apply([store(C)])
    assert hashes(backend.snapshot()) == [C]
    assert backend.find(A) == []
    while backend.reclaim(1):
        pass
    assert hashes(backend.snapshot()) == [C]
    backend.close()


# what is left behind


def test_nothing_of_a_cleared_worker_is_left_when_it_is_reclaimed(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(*chain(0, 500)), store(*chain(0, 100), worker="other", tier=DRAM, scope=LORA)])
    backend.clear_worker("w")
    while backend.reclaim(70):
        pass
    backend.close()
    assert len(keys_of_blocks(tmp_path)) == 200


def test_rows_leave_with_their_links(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(*chain(0, 100)), store(*chain(0, 50), scope=LORA), store(*chain(20, 5), parent=A)])
    backend.apply([remove(*chain(0, 100))])
    backend.apply([remove(*chain(0, 100))])
    assert backend.is_empty()
    backend.close()
    assert keys_of_blocks(tmp_path) == []


def test_a_clear_of_everything_leaves_no_rows_and_nothing_to_reclaim(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(*chain(0, 100)), clear(), store(*chain(0, 100), worker="other")])
    backend.clear()
    assert not backend.reclaim(1)
    backend.close()
    assert keys_of_blocks(tmp_path) == []


def test_compacting_gives_the_room_of_what_was_deleted_back(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path, resources=SMALL)
    for part in range(10):
        backend.apply(runs(part * 10, 10))
    backend.apply([clear(), store(A)])
    while backend.reclaim(5000):
        pass
    backend.compact()
    assert sum(path.stat().st_size for path in (tmp_path / DATABASE).glob("*.sst")) < 10_000
    assert hashes(backend.snapshot()) == [A]
    backend.close()


# copies


def test_a_checkpoint_is_an_index_of_its_own(backend: RocksdbBackend, tmp_path: Path) -> None:
    backend.apply([store(A, B)], [Cursor("s", 0, 1)])
    backend.checkpoint(tmp_path / "copy")
    backend.apply([store(C)], [Cursor("s", 0, 2)])

    copy = RocksdbBackend(tmp_path / "copy")
    assert hashes(copy.snapshot()) == [A, B]
    assert copy.cursors() == {"s": Cursor("s", 0, 1)}
    copy.close()
    with pytest.raises(BackendError):
        backend.checkpoint(tmp_path / "copy")


# what is not ours, and what is damaged


def test_another_database_is_left_as_it_is(tmp_path: Path) -> None:
    other = Rdict(str(tmp_path / DATABASE), Options(raw_mode=True))
    other[b"key"] = b"value"
    other.close()
    with pytest.raises(BackendFormat, match="not an index of kvcensus"):
        RocksdbBackend(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    RocksdbBackend(tmp_path).close()
    database = Rdict(str(tmp_path / DATABASE), Options(raw_mode=True))
    batch = WriteBatch(raw_mode=True)
    batch.put(META_KEY + b"schema", NUMBER.pack(99))
    database.write(batch)
    database.close()
    with pytest.raises(BackendFormat, match="schema 99"):
        RocksdbBackend(tmp_path)


def damage_a_table(directory: Path) -> None:
    (table,) = (path for path in (directory / DATABASE).glob("*.sst") if path.stat().st_size > 100_000)
    with table.open("r+b") as file:
        file.seek(table.stat().st_size // 3)
        file.write(b"\xee" * 64)


def test_a_damaged_block_is_found_when_it_is_read_and_the_index_is_refused_from_then_on(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(*chain(0, 5000))])
    backend.close()
    # What only the log had is in a table after an opening.
    RocksdbBackend(tmp_path).close()
    damage_a_table(tmp_path)

    backend = RocksdbBackend(tmp_path)
    with pytest.raises(BackendCorrupt, match=f"mv {tmp_path}/rocksdb"):
        list(backend.snapshot())
    assert isinstance(backend.damage(), BackendCorrupt)
    backend.close()

    with pytest.raises(BackendCorrupt):
        RocksdbBackend(tmp_path)
    rebuilt = RocksdbBackend(tmp_path, on_corrupt=OnCorrupt.REBUILD)
    assert rebuilt.is_empty()
    assert rebuilt.moved_aside is not None
    assert rebuilt.moved_aside.is_dir()
    assert "damaged" in rebuilt.moved_for
    rebuilt.close()
    RocksdbBackend(tmp_path).close()


def test_an_index_that_was_suspected_for_nothing_is_used(tmp_path: Path) -> None:
    backend = RocksdbBackend(tmp_path)
    backend.apply([store(*chain(0, 5000))])
    backend.close()
    (tmp_path / SUSPECT_FILE).write_text("a bit of memory fell over\n")

    backend = RocksdbBackend(tmp_path)
    assert len(backend) == 5000
    backend.close()
    assert not (tmp_path / SUSPECT_FILE).exists()


def test_a_log_that_was_cut_gives_an_earlier_state_with_its_cursor(tmp_path: Path) -> None:
    """As a machine crash leaves it, with the durability `process`."""
    code = f"""
import os
from pathlib import Path
from kvcensus.backends.model import Cursor
from kvcensus.backends.rocksdb.backend import RocksdbBackend
from tests.backends.building import blocks, store
backend = RocksdbBackend(Path({str(tmp_path)!r}))
for number in range(100):
    backend.apply([store(*blocks(*range(number * 10, number * 10 + 10)))], [Cursor("s", 0, number)])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    log = max((tmp_path / DATABASE).glob("*.log"))
    os.truncate(log, log.stat().st_size // 2)

    backend = RocksdbBackend(tmp_path)
    reached = backend.cursors()["s"].seq
    assert 10 < reached < 90
    assert hashes(backend.snapshot()) == chain(0, reached * 10 + 10)
    assert len(backend) == reached * 10 + 10
    backend.close()


# opened again while it is used


def test_a_database_that_is_opened_again_has_everything(backend: RocksdbBackend) -> None:
    backend.apply([store(*chain(0, 5000))], [Cursor("s", 0, 1)])
    snapshot = backend.snapshot()
    next(snapshot)

    backend._store.reopen()

    assert len(list(backend.snapshot())) == 5000
    backend.apply([store(block(5000), parent=block(4999))], [Cursor("s", 0, 2)])
    assert backend.find(block(5000))[0].key.block_index == 5000
    with pytest.raises(BackendError, match="closed while a snapshot"):
        list(snapshot)


class Failing:
    """A database whose next write fails, before or after it was done."""

    def __init__(self, database: Rdict, done: bool) -> None:
        self._database, self._done = database, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def property_int_value(self, name: str) -> int:
        return 0

    def write(self, batch: WriteBatch, options: WriteOptions) -> None:
        if self._done:
            self._database.write(batch, options)
        del self._database
        raise Exception("IO error: No space left on device")

    def cancel_all_background(self, wait: bool) -> None:
        """It is gone already."""

    def close(self) -> None:
        """It is gone already."""


@pytest.mark.parametrize("done", [False, True])
def test_a_batch_of_which_it_is_not_known_whether_it_was_written_is_written_once(
    backend: RocksdbBackend, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    backend.apply([store(A)])
    monkeypatch.setattr("kvcensus.backends.rocksdb.store._OWN_RECOVERY_S", 0.0)
    backend._store._db = Failing(backend._store._db, done)  # type: ignore[assignment, arg-type]

    assert backend.apply([store(A, B)], [Cursor("s", 0, 7)]) == ApplyResult(stored=1, copies_added=1)

    assert [one.ref_count for one in backend.find(A)] == [2]
    assert len(backend) == len(list(backend.snapshot())) == 2
    assert backend.cursors()["s"].seq == 7


# no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def leave_no_room(disk: Path) -> Path:
    """Fill the disk with a file, and return its path."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return ballast


def fill(backend: RocksdbBackend) -> int:
    """Store 256 blocks in each batch until the disk is full. Returns the number of the batch that failed."""
    for number in range(10_000):
        try:
            backend.apply(runs(number, 4), [Cursor("s", 0, number)])
        except BackendFull:
            return number
    raise AssertionError("the disk is not small")


def wait_for_room(backend: RocksdbBackend, number: int) -> None:
    """Try to store a block in this batch until there is room."""
    deadline = time.monotonic() + 60
    while True:
        try:
            backend.apply([store(A)], [Cursor("s", 0, number)])
            return
        except BackendFull:
            assert time.monotonic() < deadline
            time.sleep(0.2)


ROOM = {"in the log alone": 32 << 20, "in the log and the files": 1 << 20}


@pytest.mark.parametrize("write_buffer_bytes", ROOM.values(), ids=ROOM)
def test_a_full_disk_changes_nothing_and_is_survived(small_disk: Path, write_buffer_bytes: int) -> None:
    backend = RocksdbBackend(small_disk, resources=Resources(write_buffer_bytes))
    database = backend._store._db
    assert database is not None
    # A merge that finds no room gives back what it had taken, and then the next batch has room.
    database.set_options({"disable_auto_compactions": "true"})
    del database
    applied = fill(backend)

    assert backend.cursors()["s"].seq == applied - 1
    assert len(backend) == len(list(backend.snapshot())) == applied * 256
    with pytest.raises(BackendFull, match="the disk is full"):
        backend.apply([clear(), store(A, worker="new", scope=LORA)], [Cursor("s", 0, 99_999)])
    assert [(one.worker_id, one.blocks) for one in backend.holdings()] == [("w", applied * 256)]
    assert backend.find(A) == []

    subprocess.run(["mount", "-o", "remount,size=128m", str(small_disk)], check=True)
    wait_for_room(backend, applied)
    assert len(list(backend.snapshot())) == applied * 256 + 1
    backend.close()

    backend = RocksdbBackend(small_disk)
    assert len(backend) == len(list(backend.snapshot())) == applied * 256 + 1
    assert backend.cursors()["s"].seq == applied
    backend.close()


def test_a_small_index_goes_on_in_less_room_than_it_may_grow_to(small_disk: Path) -> None:
    """Somebody else filled the disk, and left only some MiB when they went."""
    backend = RocksdbBackend(small_disk)
    ballast = leave_no_room(small_disk)
    applied = fill(backend)
    ballast.unlink()
    wait_for_room(backend, applied)
    assert len(backend) == len(list(backend.snapshot())) == applied * 256 + 1
    backend.close()


def test_an_index_on_a_full_disk_can_be_closed_and_opened_when_there_is_room(small_disk: Path) -> None:
    backend = RocksdbBackend(small_disk, resources=Resources(1 << 20))
    applied = fill(backend)
    backend.close()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    backend = RocksdbBackend(small_disk)
    assert backend.cursors()["s"].seq in (applied - 1, applied)
    assert len(backend) == len(list(backend.snapshot())) == (backend.cursors()["s"].seq + 1) * 256
    backend.close()


CLOSED_WHERE_FILES_CANNOT_BE_MERGED = """
import sys
from tests.backends.test_rocksdb import *

disk = Path(sys.argv[1])
backend = RocksdbBackend(disk, resources=SMALL)
database = backend._store._db
database.set_options({"level0_file_num_compaction_trigger": "1000", "level0_slowdown_writes_trigger": "2"})
for number in range(80):
    backend.apply(runs(number, 4))
leave_no_room(disk)
# RocksDB says that it cannot keep the option, and takes it.
with suppress(Exception):
    database.set_options({"level0_file_num_compaction_trigger": "2"})
del database
print("closes", flush=True)
backend.close()
"""


def test_a_close_does_not_wait_for_a_full_disk(small_disk: Path) -> None:
    """RocksDB does not write one more file while too many wait to be merged, and these need room."""
    closing = [sys.executable, "-c", CLOSED_WHERE_FILES_CANNOT_BE_MERGED, str(small_disk)]
    ended = subprocess.run(closing, stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    assert ended.stdout == "closes\n"
    (small_disk / "ballast").unlink()
    backend = RocksdbBackend(small_disk)
    assert len(list(backend.snapshot())) == 80 * 256
    backend.close()
