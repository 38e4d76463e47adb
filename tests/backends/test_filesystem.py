"""The files of the filesystem backend: what is cut, what is refused, what a snapshot replaces."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcensus.backends import ownership
from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat, BackendFull
from kvcensus.backends.filesystem import Durability, FilesystemBackend, framing
from kvcensus.backends.filesystem import backend as backend_module
from kvcensus.backends.filesystem.backend import OnCorrupt
from kvcensus.backends.filesystem.index import Index
from kvcensus.backends.filesystem.journal import Recovered, recover, segments, snapshots, sync_journal
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheTier, Cursor, StoreRun

from .building import DRAM, LORA, SCOPE, block, blocks, clear, key, remove, residency, store
from .crashing import batch, content

A, B, C = blocks(1, 2, 3)
DEADLINE_S = 60


def small(directory: Path) -> FilesystemBackend:
    """With segments and snapshots after a few batches."""
    return FilesystemBackend(directory, segment_bytes=4096, snapshot_after_bytes=16384)


def folder(directory: Path) -> Path:
    return directory / "journal"


def a_few_changes(backend: FilesystemBackend) -> None:
    """One record of each kind: six of them."""
    backend.apply([store(A, B, C, size=10), store(A, tier=DRAM, scope=LORA)], [Cursor("s", 1, 0)])
    backend.put(residency(key(block(9)), ref_count=2, pinned=True))
    backend.apply([remove(B)], [Cursor("s", 1, 1), Cursor("other", 1, 5)])
    backend.remove_block(SCOPE, "w", C)
    backend.forget_stream("other")
    backend.clear()


def filled(directory: Path) -> Path:
    """The only segment of an index with `a_few_changes`, closed."""
    backend = FilesystemBackend(directory)
    a_few_changes(backend)
    backend.close()
    ((_, path),) = segments(folder(directory))
    return path


def busy(backend: FilesystemBackend, first: int, last: int) -> MemoryBackend:
    """Apply batches, and return what must have come of them."""
    wanted = MemoryBackend()
    for number in range(last):
        wanted.apply(*batch(number))
        if number >= first:
            backend.apply(*batch(number))
    return wanted


def read(directory: Path) -> tuple[Index, Recovered]:
    index = Index()
    return index, recover(directory, index)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends_of_records(path: Path) -> list[int]:
    """The length of a segment before its first record, after it, and after each that follows."""
    file = framing.RecordFile(path, framing.JOURNAL)
    ends = [file.sound_bytes, *(file.sound_bytes for _ in file.records(file.sequence))]
    file.close()
    return ends


# the end of the journal


def test_wherever_the_journal_ends_the_whole_records_count_and_the_rest_is_cut(tmp_path: Path) -> None:
    path = filled(tmp_path)
    data, ends = path.read_bytes(), ends_of_records(path)
    assert len(ends) == 7
    assert ends[-1] == len(data)
    states = []
    for end in ends:
        path.write_bytes(data[:end])
        states.append(content(read(path.parent)[0]))

    for length in range(len(data)):
        path.write_bytes(data[:length])
        index, found = read(path.parent)
        whole = [end for end in ends if end <= length]
        assert found.torn_bytes == length - (whole[-1] if whole else 0)
        assert content(index) == states[max(0, len(whole) - 1)]


def test_zeros_in_place_of_a_head_that_records_follow_are_damage(tmp_path: Path) -> None:
    path = filled(tmp_path)
    data = path.read_bytes()
    path.write_bytes(bytes(framing.FILE_HEAD_BYTES) + data[framing.FILE_HEAD_BYTES :])
    with pytest.raises(BackendCorrupt, match="its head is gone"):
        FilesystemBackend(tmp_path)


@pytest.mark.parametrize("torn", [b"\x01", b"\0" * 11, b"\0" * 5000, b"\x09\0\0\0\xff" + b"\0" * 4096])
def test_an_unfinished_record_is_cut_at_opening_and_the_bytes_are_said(tmp_path: Path, torn: bytes) -> None:
    path = filled(tmp_path)
    before = path.read_bytes()
    path.write_bytes(before + torn)

    backend = FilesystemBackend(tmp_path)

    assert backend.torn_bytes == len(torn)
    assert path.read_bytes() == before
    backend.apply([store(A)], [Cursor("s", 1, 2)])
    backend.close()
    backend = FilesystemBackend(tmp_path)
    assert backend.torn_bytes == 0
    assert backend.cursors()["s"].seq == 2
    backend.close()


def test_a_segment_that_was_only_begun_is_begun_again(tmp_path: Path) -> None:
    backend = small(tmp_path)
    wanted = busy(backend, 0, 3)
    backend._appender.rotate()
    (*_, (_, last)) = segments(folder(tmp_path))
    backend.close()
    last.write_bytes(last.read_bytes()[:7])

    backend = small(tmp_path)

    assert content(backend) == content(wanted)
    backend.apply(*batch(3))
    backend.close()
    backend = small(tmp_path)
    assert backend.cursors()["crash"].seq == 3
    backend.close()


# damage


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """In the payload of the last record it cannot be told from a record that was not finished: that one is cut."""
    path = filled(tmp_path)
    data, ends = path.read_bytes(), ends_of_records(path)
    last_payload = ends[-2] + framing.RECORD_HEAD_BYTES
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        if at >= last_payload:
            assert read(path.parent)[1].torn_bytes == ends[-1] - ends[-2]
        else:
            with pytest.raises((BackendCorrupt, BackendFormat)):
                read(path.parent)


def test_damage_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path)
    data = bytearray(path.read_bytes())
    data[ends_of_records(path)[1] + framing.RECORD_HEAD_BYTES] ^= 1
    path.write_bytes(data)

    with pytest.raises(BackendCorrupt, match=r"record 1 at byte .* does not fit its checksum.* mv .*journal "):
        FilesystemBackend(tmp_path)

    assert path.read_bytes() == data


def test_a_damaged_index_is_moved_aside_if_that_is_what_was_chosen(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(b"garbage" + path.read_bytes()[7:])
    with pytest.raises(BackendFormat):
        FilesystemBackend(tmp_path, on_corrupt=OnCorrupt.REBUILD)
    path.write_bytes(filled(tmp_path / "other").read_bytes()[:40] + b"x" * 400)

    backend = FilesystemBackend(tmp_path, on_corrupt=OnCorrupt.REBUILD)

    assert backend.is_empty()
    assert backend.cursors() == {}
    assert backend.moved_aside is not None
    assert (backend.moved_aside / path.name).exists()
    assert "damaged" in backend.moved_for
    backend.close()


def several_segments(directory: Path) -> list[Path]:
    backend = FilesystemBackend(directory, segment_bytes=4096)
    busy(backend, 0, 30)
    backend.close()
    paths = [path for _, path in segments(folder(directory))]
    assert len(paths) > 3
    return paths


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    paths = several_segments(tmp_path)
    paths[1].unlink()
    with pytest.raises(BackendCorrupt, match=r"records \d+ to \d+, which come before it, are missing"):
        FilesystemBackend(tmp_path)


def test_a_missing_beginning_is_damage(tmp_path: Path) -> None:
    several_segments(tmp_path)[0].unlink()
    with pytest.raises(BackendCorrupt, match="are missing"):
        FilesystemBackend(tmp_path)


def test_an_unfinished_record_in_any_but_the_last_segment_is_damage(tmp_path: Path) -> None:
    path = several_segments(tmp_path)[1]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BackendCorrupt, match=r"ends within a record, .* and is not the last"):
        FilesystemBackend(tmp_path)


def test_a_segment_of_another_index_is_damage(tmp_path: Path) -> None:
    mine, other = several_segments(tmp_path / "mine"), several_segments(tmp_path / "other")
    shutil.copy(other[1], mine[1])
    with pytest.raises(BackendCorrupt, match="its head is that of another file"):
        FilesystemBackend(tmp_path / "mine")


def test_a_snapshot_that_is_not_whole_is_damage(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    busy(backend, 0, 30)
    backend.compact()
    backend.close()
    ((_, path),) = snapshots(folder(tmp_path))
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], data[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(BackendCorrupt, match=path.name):
            FilesystemBackend(tmp_path)


def test_a_schema_of_the_future_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(framing, "SCHEMA", 99)
        path = filled(tmp_path)
    before = path.read_bytes()

    with pytest.raises(BackendFormat, match="schema 99, this version knows schema 1"):
        FilesystemBackend(tmp_path, on_corrupt=OnCorrupt.REBUILD)

    assert path.read_bytes() == before


# snapshots


def test_a_snapshot_takes_the_place_of_the_segments_before_it(tmp_path: Path) -> None:
    backend = small(tmp_path)
    wanted = busy(backend, 0, 40)
    directory = folder(tmp_path)

    def tidied() -> bool:
        """A further snapshot may be on its way: until it is taken over, there are two."""
        made = [sequence for sequence, _ in snapshots(directory)]
        return not backend.reclaim(1) and made == [segments(directory)[0][0]]

    eventually(tidied)
    assert backend.snapshot_problem == ""
    assert content(backend) == content(wanted)
    backend.close()
    backend = small(tmp_path)
    assert content(backend) == content(wanted)
    wanted = busy(backend, 40, 45)
    assert content(backend) == content(wanted)
    backend.close()


def test_changes_go_on_while_a_snapshot_is_made(tmp_path: Path) -> None:
    backend = small(tmp_path)
    number = 0
    while backend._compaction is None:
        backend.apply(*batch(number))
        number += 1
    wanted = busy(backend, number, number + 20)
    eventually(lambda: not backend.reclaim(1) and bool(snapshots(folder(tmp_path))))
    assert content(backend) == content(wanted)
    backend.close()
    backend = FilesystemBackend(tmp_path)
    assert content(backend) == content(wanted)
    backend.close()


def test_a_compacted_index_is_read_from_its_snapshot_alone(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    wanted = busy(backend, 0, 40)
    backend.compact()
    size = backend.stored_bytes()
    backend.compact()
    assert backend.stored_bytes() == size
    backend.close()
    index, found = read(folder(tmp_path))
    assert (found.base, found.next, found.journal_bytes) == (40, 40, framing.FILE_HEAD_BYTES)
    assert content(index) == content(wanted)


def test_a_snapshot_that_is_overdue_is_made_at_opening(tmp_path: Path) -> None:
    """A daemon that never lives long enough for one must not have ever more to read."""
    backend = FilesystemBackend(tmp_path)
    wanted = busy(backend, 0, 30)
    backend.close()
    backend = small(tmp_path)
    assert [number for number, _ in snapshots(folder(tmp_path))] == [30]
    assert len(segments(folder(tmp_path))) == 1
    assert content(backend) == content(wanted)
    backend.close()


def test_a_snapshot_that_fails_is_said_and_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        busy(backend, 0, 40)
        eventually(lambda: backend.reclaim(1) or bool(backend.snapshot_problem))
    assert backend.snapshot_problem == "no snapshot: its process ended with 1"
    assert backend.damage() is None
    wanted = busy(backend, 40, 60)
    eventually(lambda: backend.reclaim(1) or bool(snapshots(folder(tmp_path))))
    eventually(lambda: backend.reclaim(1) or not backend.snapshot_problem)
    assert content(backend) == content(wanted)
    backend.close()


def test_damage_that_a_snapshot_meets_is_told(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path, segment_bytes=4096)
    busy(backend, 0, 30)
    (_, path), *_ = segments(folder(tmp_path))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    backend._snapshot_after = 1
    eventually(lambda: backend.reclaim(1) or backend.damage() is not None)
    assert str(path) in str(backend.damage())
    backend.close()


def test_a_snapshot_is_given_up_when_its_daemon_is_gone(tmp_path: Path) -> None:
    filled(tmp_path)
    command = [sys.executable, "-P", "-m", "kvcensus.backends.filesystem.compactor", str(folder(tmp_path)), "6"]
    before = sorted(folder(tmp_path).iterdir())
    assert subprocess.run([*command, str(os.getppid())], check=False).returncode == 1
    assert sorted(folder(tmp_path).iterdir()) == before
    assert subprocess.run([*command, str(os.getpid())], check=False).returncode == 0
    assert [number for number, _ in snapshots(folder(tmp_path))] == [6]


def test_drafts_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    draft = folder(tmp_path) / "snapshot-0000000000000003.17.tmp"
    draft.write_bytes(b"half")
    FilesystemBackend(tmp_path).close()
    assert not draft.exists()


@pytest.mark.parametrize("ending", ["killed by the system", "closed"])
def test_what_a_process_that_made_a_snapshot_left_goes_with_it(ending: str, tmp_path: Path) -> None:
    """Where there is not enough memory for one, none of the tries may leave half of one on the disk."""
    backend = FilesystemBackend(tmp_path, snapshot_after_bytes=1)
    backend.apply([store(A)])
    assert backend._compaction is not None
    process = backend._compaction._process
    process.send_signal(signal.SIGSTOP)
    draft = folder(tmp_path) / f"snapshot-{backend._compaction.sequence:016d}.{process.pid}.tmp"
    draft.write_bytes(b"half")

    if ending == "closed":
        backend.close()
        assert not draft.exists()
        return
    process.kill()
    eventually(lambda: backend.reclaim(1) or bool(backend.snapshot_problem))
    assert not draft.exists()
    backend.close()


# what goes wrong in a call


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A write beyond it is cut short there, and the next one refused: as on a full disk, but only for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_applied(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.apply([store(A)], [Cursor("s", 1, 0)])
    ((_, path),) = segments(folder(tmp_path))
    before, held = path.read_bytes(), content(backend)

    with files_no_larger_than(len(before) + 50), pytest.raises(BackendFull, match="no room for the journal"):
        backend.apply([store(B, C)], [Cursor("s", 1, 1)])

    assert path.read_bytes() == before
    assert content(backend) == held
    backend.apply([store(B)], [Cursor("s", 1, 1)])
    held = content(backend)
    backend.close()
    backend = FilesystemBackend(tmp_path)
    assert content(backend) == held
    backend.close()


def test_after_a_failed_sync_nothing_is_written_until_the_index_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FilesystemBackend(tmp_path, durability=Durability.MACHINE)
    backend.apply([store(A)])
    held = content(backend)

    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(BackendError, match="cannot be written"):
            backend.apply([store(B)])
    with pytest.raises(BackendError, match=r"a sync failed .*; open the index again"):
        backend.apply([store(C)])
    assert content(backend) == held
    backend.close()
    backend = FilesystemBackend(tmp_path)
    assert content(backend) == held
    backend.close()


def test_a_change_that_memory_refuses_is_not_in_the_journal(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.apply([store(A)])
    held = content(backend)
    impossible = StoreRun("w", None, SCOPE, CacheTier.HBM, (["no hash"],), b"")  # type: ignore[arg-type]

    with pytest.raises(TypeError):
        backend.apply([impossible])
    with pytest.raises(BackendError, match="open the index again"):
        backend.apply([store(B)])

    backend.close()
    backend = FilesystemBackend(tmp_path)
    assert content(backend) == held
    backend.close()


@pytest.mark.parametrize(("durability", "syncs"), [(Durability.PROCESS, 0), (Durability.MACHINE, 3)])
def test_each_commit_is_synced_if_it_is_to_survive_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability, syncs: int
) -> None:
    backend = FilesystemBackend(tmp_path, durability=durability)
    synced: list[int] = []
    sync = os.fdatasync

    def counted(file: int) -> None:
        synced.append(file)
        sync(file)

    monkeypatch.setattr(os, "fdatasync", counted)
    backend.apply([store(A)])
    backend.apply([])
    backend.apply([clear()], [Cursor("s", 1, 1)])
    backend.put(residency(key(B)))
    assert len(synced) == syncs
    backend.close()


# whose it is


def test_files_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path / "new")
    busy(backend, 0, 5)
    backend.compact()
    backend.close()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "new").rglob("*"))


def test_a_second_owner_is_told_who_the_first_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_OWNER_WAIT_S", 0)
    backend = FilesystemBackend(tmp_path)
    with pytest.raises(BackendBusy, match=f"in use by process {os.getpid()}"):
        FilesystemBackend(tmp_path)
    backend.close()
    FilesystemBackend(tmp_path).close()


def killed(directory: Path, durability: Durability) -> None:
    """Fill a directory from a process that ends without closing it."""
    code = f"""
import os, pathlib
from kvcensus.backends.filesystem import Durability, FilesystemBackend
from kvcensus.backends.model import CacheTier, IdentityScope, StoreRun
backend = FilesystemBackend(pathlib.Path({str(directory)!r}), durability=Durability({durability.value!r}))
backend.apply([StoreRun("w", None, IdentityScope("m", "t"), CacheTier.HBM, (b"12345678",), b"")])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("durability", "records"), [(Durability.PROCESS, 0), (Durability.MACHINE, 1)])
def test_what_was_not_synced_is_discarded_after_a_machine_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability, records: int
) -> None:
    killed(tmp_path, durability)
    monkeypatch.setattr(ownership, "boot_id", lambda: "another boot")
    backend = FilesystemBackend(tmp_path)
    assert len(backend) == records
    assert backend.discarded_after_crash == (records == 0)
    backend.close()


def test_what_was_left_unsynced_is_synced_before_it_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine crash after the durability was raised must not find segments that were never synced."""
    killed(tmp_path, Durability.PROCESS)
    calls: list[str] = []

    def sync(directory: Path) -> None:
        calls.append("sync")
        sync_journal(directory)

    def note(directory: Path, durability: str, clean: bool) -> None:
        calls.append(durability)
        ownership.note_writer(directory, durability, clean)

    monkeypatch.setattr("kvcensus.backends.filesystem.backend.sync_journal", sync)
    monkeypatch.setattr("kvcensus.backends.filesystem.backend.note_writer", note)
    FilesystemBackend(tmp_path, durability=Durability.MACHINE).close()
    assert calls[:2] == ["sync", "machine"]


def test_a_closed_index_outlives_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FilesystemBackend(tmp_path)
    backend.apply([store(A)])
    backend.close()
    monkeypatch.setattr(ownership, "boot_id", lambda: "another boot")
    backend = FilesystemBackend(tmp_path)
    assert len(backend) == 1
    backend.close()
