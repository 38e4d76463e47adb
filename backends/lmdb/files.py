"""The data directory: who owns it, what the machine was when it was written, and opening the LMDB file in it.

index.mdb, index.mdb-lock   the index
owner.lock                  held by the one process that writes
boot.json                   how the last writer ran
suspect.txt                 why the index is to be looked at as a whole before it is opened, if it is
index.mdb.corrupt-*         a damaged index that was moved aside
snapshot-*                  copies that a snapshot is being read from
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import lmdb

from ..errors import BackendBusy, BackendError, BackendFormat, BackendFull, BackendPidClash
from ..ownership import lost_in_machine_crash, note_writer
from .catalog import Tables, number_of
from .checks import check_metas, check_state, corrupt
from .rows import SCHEMA

INDEX_FILE = "index.mdb"
SUSPECT_FILE = "suspect.txt"
MAP_SIZE = 1 << 40
"""Address space that every opener of the file reserves, in bytes; no memory and no disk. LMDB cannot grow past it."""

_SCHEMA_KEY = b"schema"
_MAX_READERS = 512
_LOCK_FILE_BYTES = 9 << 12
"""At least a head and 64 bytes for each reader, in whole pages."""
DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.CursorFullError, lmdb.PageFullError)
"""What LMDB says of pages that cannot be."""
_FULL_BELOW = 1 << 20
"""Free bytes under which a failed write is put down to a full disk."""


class Durability(StrEnum):
    """What a commit survives.

    `process`: the end of the process. `consistent`: a machine crash too, but it may undo the last commit. `full`: all.
    """

    PROCESS = "process"
    CONSISTENT = "consistent"
    FULL = "full"


def discard_if_machine_crashed(directory: Path, file: str = INDEX_FILE) -> bool:
    """Delete an index, or another `file`, left by an unsynced writer at a machine crash. Returns whether it did.

    Without syncing, a machine crash may leave the file corrupt; the HBM and DRAM it tells of died with the machine.
    """
    if not lost_in_machine_crash(directory):
        return False
    for name in (file, f"{file}-lock"):
        (directory / name).unlink(missing_ok=True)
    return True


def pid_clash(path: Path | str) -> BackendPidClash:
    """The error of two processes that are one to LMDB: it locks by process id."""
    return BackendPidClash(
        f"{path}: a process with the same id ({os.getpid()}) reads this index, in another container: give the pod "
        "shareProcessNamespace: true, or each container its own process ids"
    )


def suspect(directory: Path) -> str:
    """Why the index is to be looked at as a whole before it is opened, "" when there is no reason."""
    try:
        return (directory / SUSPECT_FILE).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""


def move_aside(directory: Path) -> Path:
    """Move a damaged index out of the way, and drop what was moved there before. Returns where it is now."""
    for path in directory.glob(f"{INDEX_FILE}.corrupt-*"):
        path.unlink()
    aside = directory / f"{INDEX_FILE}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    (directory / INDEX_FILE).rename(aside)
    for name in (f"{INDEX_FILE}-lock", SUSPECT_FILE):
        (directory / name).unlink(missing_ok=True)
    return aside


def disk_is_full(directory: Path) -> bool:
    """Whether that may be why a write failed: LMDB calls a write cut short an input/output error."""
    return shutil.disk_usage(directory).free < _FULL_BELOW


def remove_stale_snapshots(directory: Path) -> None:
    """Remove copies that a killed process left."""
    for path in directory.glob("snapshot-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """What LMDB and the system say while a file is opened, as errors of `backends.errors`."""
    try:
        yield
    except (*DAMAGE, lmdb.InvalidError) as error:
        raise corrupt(path, str(error)) from error
    except lmdb.LockError as error:
        raise pid_clash(path) from error
    except lmdb.VersionMismatchError as error:
        raise BackendFormat(f"{path} was written by another version of LMDB ({error})") from error
    except (lmdb.Error, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise BackendFull(f"{path}: the disk is full ({error})") from error
        raise BackendError(f"{path}: {error}") from error


def open_writer(directory: Path, durability: Durability, map_size: int) -> tuple[lmdb.Environment, Tables]:
    """Open or create the index for writing, and note it. A file that is refused stays as it is, and so does its note.

    Raises BackendFormat for a schema that is not ours, BackendCorrupt, BackendError.
    """
    path = directory / INDEX_FILE
    with named_errors(path):
        if path.exists():
            check_metas(path)
        else:
            note_writer(directory, durability, clean=False)
        allocate_lock_file(directory / f"{INDEX_FILE}-lock")
        env = lmdb.open(
            str(path),
            subdir=False,
            map_size=map_size,
            max_dbs=len(Tables._fields),
            mode=0o600,
            max_readers=_MAX_READERS,
            max_spare_txns=4,
            sync=durability is not Durability.PROCESS,
            metasync=durability is Durability.FULL,
        )
        try:
            check_state(path, env)
            if env.stat()["entries"]:
                _check_schema(env, path)
            else:
                _create_tables(env)
            tables = _open_tables(env)
            if durability is not Durability.PROCESS:
                env.sync(True)
            note_writer(directory, durability, clean=False)
            env.reader_check()
        except BaseException:
            env.close()
            raise
    return env, tables


def open_reader(path: Path, *, lock: bool = True) -> tuple[lmdb.Environment, Tables]:
    """Open an index that another process may be writing. Raises BackendFormat, BackendCorrupt, BackendError."""
    if not path.exists():
        raise BackendError(f"{path}: there is no index here")
    with named_errors(path):
        if lock:
            check_metas(path)
        env = _open_read_only(path, lock)
        try:
            if lock:
                check_state(path, env)
            _check_schema(env, path)
            return env, _open_tables(env)
        except BaseException:
            env.close()
            raise


@contextmanager
def open_unchecked(path: Path) -> Iterator[lmdb.Environment]:
    """An index of which nothing is known yet but that its meta pages are sound. Nothing is read."""
    env = _open_read_only(path, lock=True)
    try:
        yield env
    finally:
        env.close()


def _open_read_only(path: Path, lock: bool) -> lmdb.Environment:
    env = lmdb.open(
        str(path),
        subdir=False,
        readonly=True,
        lock=lock,
        map_size=MAP_SIZE,
        max_dbs=len(Tables._fields),
        max_readers=_MAX_READERS,
    )
    if lock and "no reader locks" in env.readers():
        env.close()
        raise BackendError(f"{path}: the mount is read-only, so LMDB cannot lock and would read wrong data")
    return env


@contextmanager
def sole_user(path: Path) -> Iterator[None]:
    """Nobody else opens an index, closed here, meanwhile. Raises BackendBusy when a process has it open.

    The lock file of such a process tells of the transactions of the file as it was: it does not fit another one.
    """
    file = os.open(path.with_name(f"{path.name}-lock"), os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError as error:
            raise BackendBusy(f"{path}: another process reads the index") from error
        yield
    finally:
        os.close(file)


def allocate_lock_file(path: Path) -> None:
    """LMDB maps this file and writes to it: on a full disk a page that is not there yet would be a SIGBUS."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(file)


def _create_tables(env: lmdb.Environment) -> None:
    """All in one transaction: a file has the whole schema or is empty."""
    with env.begin(write=True) as txn:
        tables = Tables(*(env.open_db(name.encode(), txn=txn) for name in Tables._fields))
        txn.put(_SCHEMA_KEY, SCHEMA.to_bytes(4, "big"), db=tables.meta)


def _open_tables(env: lmdb.Environment) -> Tables:
    return Tables(*(env.open_db(name.encode(), create=False) for name in Tables._fields))


def _check_schema(env: lmdb.Environment, path: Path) -> None:
    try:
        meta = env.open_db(b"meta", create=False)
    except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
        raise BackendFormat(f"{path} is an LMDB file, but not an index of kvcensus") from error
    with env.begin() as txn:
        schema = number_of(txn, meta, _SCHEMA_KEY)
    if schema != SCHEMA:
        raise BackendFormat(f"{path} has schema {schema}, this version knows schema {SCHEMA}; it was left as it is")
