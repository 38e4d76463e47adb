"""Whether a file may be opened: a short look that costs the same for every size of index."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import error as StructError  # noqa: N812 - an exception, named like one

import msgspec

import lmdb

from ..errors import BackendBusy, BackendCorrupt, BackendFormat
from .pages import Finding, Meta, PageCheck, UnknownVersion, Unreadable, read_metas

_QUICK_PAGES = 1024
"""Pages of the small tables and of the list of free pages looked at before opening: 4 MiB, some 50 ms."""
_META_TRIES = 20
_META_WAIT_S = 0.005

UNDECODABLE = (StructError, IndexError, KeyError, UnicodeDecodeError, msgspec.DecodeError)
"""What decoding raises when the bytes are not what was written."""


def corrupt(path: Path | str, detail: str) -> BackendCorrupt:
    """The error of a damaged index. It says the one command that makes room for a new one."""
    return BackendCorrupt(
        f"{path} is damaged ({detail}); it is not served. To rebuild it from the engines: mv {path} {path}.corrupt"
    )


def check_metas(path: Path) -> None:
    """Refuse a file whose meta pages cannot be believed. Raises BackendCorrupt, BackendFormat, OSError."""
    if not path.stat().st_size:
        return
    with opened_file(path) as file:
        for turn in range(_META_TRIES):
            try:
                read_metas(file)
            except UnknownVersion as error:
                raise BackendFormat(f"{path} was written by another version of LMDB: {error}") from error
            except Unreadable as error:
                if turn + 1 == _META_TRIES:
                    raise corrupt(path, str(error)) from error
                time.sleep(_META_WAIT_S)  # A writer may just be writing one.
            else:
                return


def check_state(path: Path, env: lmdb.Environment) -> None:
    """Refuse what LMDB cannot read safely: the small tables, and of the large ones no more than a number of pages.

    Of a file that is shorter than it says, every page is looked at. Raises BackendCorrupt.
    """
    with opened_file(path) as file, pinned(file, env) as (_, meta):
        if meta is None:
            return
        whole = PageCheck(file, meta)
        findings = whole.everything() if whole.cut_short else _quick_findings(PageCheck(file, meta, _QUICK_PAGES))
        for finding in findings:
            raise corrupt(path, f"{finding.where}: {finding.what}")


def _quick_findings(check: PageCheck) -> Iterator[Finding]:
    yield from check.main()
    for name, tree in check.tables.items():
        if name == b"blocks" and not tree.flags:
            yield from check.root(tree)
        else:
            yield from check.table(name, tree)
    yield from check.free()


@contextmanager
def opened_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def pinned(file: int, env: lmdb.Environment) -> Iterator[tuple[lmdb.Transaction[bytes], Meta | None]]:
    """A read transaction, and the meta page of what it reads; None for a file without anything."""
    for _ in range(_META_TRIES):
        with env.begin() as txn:
            if not txn.id():
                yield txn, None
                return
            try:
                metas = read_metas(file)
            except Unreadable:
                metas = None
            for meta in metas or ():
                if meta.txn == txn.id():
                    yield txn, meta
                    return
        time.sleep(_META_WAIT_S)
    raise BackendBusy("the index is written faster than its meta pages can be read")
