"""Looks at an LMDB index, whether or not a daemon runs, as any other reader would."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import lmdb
import msgspec

from kvcensus.backends.errors import BackendError
from kvcensus.backends.lmdb.files import INDEX_FILE, open_reader, suspect
from kvcensus.backends.ownership import lost_in_machine_crash

from .facts import Index, Reader

_COLUMNS = 3


class _Boot(msgspec.Struct):
    durability: str | None = None


def look_at_index(directory: Path) -> Index:
    """The index of a data directory. What is wrong with it is in the answer."""
    path = directory / INDEX_FILE
    note = ""
    with suppress(OSError):
        note = suspect(directory)
    facts = Index(
        has_lock_file=path.with_name(f"{INDEX_FILE}-lock").exists(),
        durability=_durability(directory),
        machine_crashed=lost_in_machine_crash(directory),
        suspect=note,
    )
    if not path.exists():
        return facts
    facts = msgspec.structs.replace(facts, exists=True, file=path.stat().st_blocks * 512)
    if note or not facts.has_lock_file:
        return facts
    try:
        env, tables = open_reader(path)
    except (BackendError, OSError) as error:
        return msgspec.structs.replace(facts, problem=getattr(error, "problem", "") or "unusable", detail=str(error))
    try:
        with env.begin() as txn:
            stats = [txn.stat(table) for table in tables]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        live = pages * int(env.stat()["psize"])
        readers = readers_of(env.readers(), int(env.info()["last_txnid"]))
        return msgspec.structs.replace(facts, opened=True, live=live, readers=tuple(readers))
    except lmdb.Error as error:
        return msgspec.structs.replace(facts, problem="unusable", detail=f"{path}: {error}")
    finally:
        env.close()


def readers_of(table: str, last: int) -> list[Reader]:
    """LMDB's own table: process, thread, and the transaction that is read, in columns. We are not one of them."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [
        Reader(int(row[0]), max(0, last - int(row[2])) if row[2].isdigit() else None, _is_alive(int(row[0])))
        for row in rows
        if len(row) == _COLUMNS and row[0].isdigit() and int(row[0]) != os.getpid()
    ]


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _durability(directory: Path) -> str | None:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((directory / "boot.json").read_bytes(), type=_Boot).durability
    return None
