"""What is known of a machine, a data directory, an index and a daemon, and what is found in it.

Sizes are in bytes, times in seconds since the Unix epoch. None: could not be found out.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ..http.bodies import StreamsAnswer
from ..status import Readiness


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One check. `says` and `advice` are a sentence each; ok needs no advice."""

    area: str
    check: str
    verdict: Verdict
    says: str
    advice: str = ""


class Settings(msgspec.Struct, frozen=True):
    """What the configuration wants of the machine."""

    backend: str = "lmdb"
    queue_max_bytes: int = 0
    max_connections: int = 0
    streams: int = 0
    map_size: int = 0
    durability: str = "process"


class Library(msgspec.Struct, frozen=True):
    """A package that kvcensus needs: `wanted` as in `>=3.0,<4`. `version` None: not installed."""

    name: str
    version: str | None
    wanted: str


class Machine(msgspec.Struct, frozen=True):
    """The machine. Limits are those of the daemon's process where one runs, else ours; None is no limit.

    `file_system` is that of the data directory, mounted at `mount`.
    """

    file_system: str | None = None
    mount: str = ""
    read_only: bool = False
    free: int | None = None
    open_files: int | None = None
    address_space: int | None = None
    clock_synchronised: bool | None = None
    now_s: float = 0.0
    memory_limit: int | None = None
    memory_available: int | None = None
    python: tuple[int, int] = (0, 0)
    libraries: tuple[Library, ...] = ()


class Directory(msgspec.Struct, frozen=True):
    """A data directory, or the place for one. `of_others`: files in it that belong to another user than it does.

    `owner_pid` holds its lock; None: nobody that is visible here.
    `leftovers` are files that nothing needs, and their bytes.
    """

    path: str
    exists: bool = False
    writable: bool = False
    uid: int = 0
    our_uid: int = 0
    mode: int = 0o700
    of_others: tuple[str, ...] = ()
    newest_s: float = 0.0
    leftovers: tuple[tuple[str, int], ...] = ()
    owner_pid: int | None = None


class Reader(msgspec.Struct, frozen=True):
    """A row of LMDB's table of readers. `lag`: commits since what it reads; None while it reads nothing."""

    pid: int
    lag: int | None
    alive: bool


class Index(msgspec.Struct, frozen=True):
    """The LMDB file of a data directory. `problem` is that of `backends.errors`, "" for none.

    `opened`: it was looked into. `machine_crashed`: an unsynced writer ran when the machine went down.
    """

    exists: bool = False
    file: int = 0
    has_lock_file: bool = False
    opened: bool = False
    problem: str = ""
    detail: str = ""
    live: int = 0
    readers: tuple[Reader, ...] = ()
    durability: str | None = None
    machine_crashed: bool = False
    suspect: str = ""


class Running(msgspec.Struct, frozen=True):
    """A daemon that was asked. `problem`: why it does not answer, "" when it does. `address` is "" without HTTP."""

    address: str
    problem: str = ""
    loopback: bool = True
    version: str = ""
    our_version: str = ""
    readiness: Readiness | None = None
    streams: StreamsAnswer | None = None
