"""Opening a data directory: whose it is, what is refused, and what a machine crash means for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from kvcensus.backends import ownership
from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFormat
from kvcensus.backends.lmdb import Durability, LmdbBackend, LmdbReader, files
from kvcensus.backends.model import Cursor

from .building import blocks, store

A, B = blocks(1, 2)


def filled(directory: Path, durability: Durability = Durability.PROCESS) -> None:
    backend = LmdbBackend(directory, durability=durability)
    backend.apply([store(A, B)], [Cursor("s", 1, 2)])
    backend.close()


def killed(directory: Path, durability: Durability = Durability.PROCESS) -> None:
    """Fill a directory from a process that ends without closing it."""
    code = f"""
import os, pathlib
from kvcensus.backends.lmdb import Durability, LmdbBackend
from kvcensus.backends.model import CacheTier, IdentityScope, StoreRun
backend = LmdbBackend(pathlib.Path({str(directory)!r}), durability=Durability({durability.value!r}))
backend.apply([StoreRun("w", None, IdentityScope("m", "t"), CacheTier.HBM, (b"12345678",), b"")])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def file_of(directory: Path) -> Path:
    return directory / "index.mdb"


def test_an_index_is_there_again_after_reopening(tmp_path: Path) -> None:
    filled(tmp_path)
    backend = LmdbBackend(tmp_path)
    assert len(backend) == 2
    assert backend.cursors() == {"s": Cursor("s", 1, 2)}
    assert backend.match(None, [A, B])[0].blocks == 2
    backend.close()


def test_files_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    filled(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "new").iterdir())


def test_a_schema_of_the_future_is_refused_and_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    env = lmdb.open(str(file_of(tmp_path)), subdir=False, max_dbs=8, map_size=1 << 30)
    with env.begin(write=True) as txn:
        txn.put(b"schema", (99).to_bytes(4, "big"), db=env.open_db(b"meta", txn=txn))
    env.close()
    before = {path.name: path.read_bytes() for path in (file_of(tmp_path), tmp_path / "boot.json")}

    with pytest.raises(BackendFormat, match="schema 99, this version knows schema 1"):
        LmdbBackend(tmp_path)
    with pytest.raises(BackendFormat, match="schema 99"):
        LmdbReader.open(tmp_path)

    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def foreign_records(env: lmdb.Environment) -> None:
    with env.begin(write=True) as txn:
        txn.put(b"somebody", b"else's")


def foreign_tables(env: lmdb.Environment) -> None:
    env.open_db(b"theirs")


def a_plain_key_named_like_our_table(env: lmdb.Environment) -> None:
    with env.begin(write=True) as txn:
        txn.put(b"meta", b"not a table")


def a_table_named_like_ours(env: lmdb.Environment) -> None:
    env.open_db(b"meta")


@pytest.mark.parametrize(
    "fill", [foreign_records, foreign_tables, a_plain_key_named_like_our_table, a_table_named_like_ours]
)
def test_a_foreign_lmdb_file_is_refused_and_left_alone(
    tmp_path: Path, fill: Callable[[lmdb.Environment], None]
) -> None:
    env = lmdb.open(str(file_of(tmp_path)), subdir=False, max_dbs=8)
    fill(env)
    env.close()
    before = file_of(tmp_path).read_bytes()

    with pytest.raises(BackendFormat):
        LmdbBackend(tmp_path)

    assert file_of(tmp_path).read_bytes() == before
    assert not (tmp_path / "boot.json").exists()


@pytest.mark.parametrize("content", [b"garbage" * 4096, b"\x00" * 8192, b"short"])
def test_a_file_that_is_no_lmdb_file_is_called_corrupt(tmp_path: Path, content: bytes) -> None:
    file_of(tmp_path).write_bytes(content)

    with pytest.raises(BackendCorrupt, match=r"is damaged .* mv "):
        LmdbBackend(tmp_path)

    assert file_of(tmp_path).read_bytes() == content


def test_a_refused_directory_can_be_opened_after_the_file_is_moved_aside(tmp_path: Path) -> None:
    file_of(tmp_path).write_bytes(b"garbage" * 4096)
    with pytest.raises(BackendCorrupt):
        LmdbBackend(tmp_path)
    file_of(tmp_path).rename(tmp_path / "aside")
    LmdbBackend(tmp_path).close()


def test_an_empty_file_is_a_new_index(tmp_path: Path) -> None:
    """What a process killed while creating the index leaves."""
    file_of(tmp_path).touch()
    backend = LmdbBackend(tmp_path)
    assert backend.is_empty()
    backend.close()


def test_a_second_owner_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    code = f"""
import pathlib
from kvcensus.backends.errors import BackendBusy
from kvcensus.backends.lmdb import LmdbBackend
try:
    LmdbBackend(pathlib.Path({str(tmp_path)!r}))
except BackendBusy as error:
    print(error)
"""
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in other.stdout
    with pytest.raises(BackendBusy, match=f"in use by process {os.getpid()}"):
        LmdbBackend(tmp_path)
    backend.close()
    LmdbBackend(tmp_path).close()


def test_a_killed_owner_does_not_keep_the_directory(tmp_path: Path) -> None:
    killed(tmp_path)
    backend = LmdbBackend(tmp_path)
    assert len(backend) == 1
    backend.close()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="data directory"):
        LmdbBackend(tmp_path / "file" / "data")


def test_a_reader_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no index here"):
        LmdbReader.open(tmp_path)


# machine crashes


def reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "boot_id", lambda: "another boot")


def test_an_unsynced_index_is_discarded_after_a_machine_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path)
    file_of(tmp_path).write_bytes(b"what a crash may leave" * 1000)
    reboot(monkeypatch)

    backend = LmdbBackend(tmp_path)

    assert backend.discarded_after_crash
    assert backend.is_empty()
    backend.close()
    backend = LmdbBackend(tmp_path)
    assert not backend.discarded_after_crash
    backend.close()


def test_a_closed_index_outlives_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    reboot(monkeypatch)
    backend = LmdbBackend(tmp_path)
    assert not backend.discarded_after_crash
    assert len(backend) == 2
    backend.close()


def test_a_killed_process_alone_costs_nothing(tmp_path: Path) -> None:
    killed(tmp_path)
    backend = LmdbBackend(tmp_path)
    assert not backend.discarded_after_crash
    assert len(backend) == 1
    backend.close()


@pytest.mark.parametrize("durability", [Durability.CONSISTENT, Durability.FULL])
def test_a_synced_index_outlives_a_machine_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    killed(tmp_path, durability)
    reboot(monkeypatch)
    backend = LmdbBackend(tmp_path)
    assert not backend.discarded_after_crash
    assert len(backend) == 1
    backend.close()


def test_a_refused_file_is_not_discarded_after_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "SCHEMA", 99)
        with pytest.raises(BackendFormat):
            LmdbBackend(tmp_path)
    reboot(monkeypatch)

    backend = LmdbBackend(tmp_path)

    assert len(backend) == 2
    backend.close()


def test_how_the_writer_runs_is_noted_while_it_runs(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    running = json.loads((tmp_path / "boot.json").read_bytes())
    backend.close()
    closed = json.loads((tmp_path / "boot.json").read_bytes())
    assert running == {"boot_id": ownership.boot_id(), "durability": "process", "clean": False}
    assert closed == running | {"clean": True}


def test_copies_left_by_a_killed_snapshot_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "snapshot-left"
    left.mkdir()
    (left / "index.mdb").write_bytes(b"copy")
    LmdbBackend(tmp_path).close()
    assert not left.exists()
