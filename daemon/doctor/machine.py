"""Checks of the machine. Pure."""

from __future__ import annotations

import re
from functools import partial

from ..top.words import size
from .facts import Finding, Library, Machine, Settings, Verdict

_finding = partial(Finding, "machine")

NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p ceph glusterfs lustre beegfs afs fuse.sshfs fuse.glusterfs fuse.ceph".split()  # noqa: SIM905
)
MEMORY = frozenset({"tmpfs", "ramfs"})
OVERLAY = frozenset({"overlay", "aufs"})
MIB = 1 << 20
ROOM_MIN = 64 * MIB
ROOM_WANTED = 1 << 30
FILES_A_STREAM = 7
"""A daemon with 40 streams and their replay sockets had 253 files open, one with 7 streams 50."""
FILES_ELSE = 64
MEMORY_ELSE = 128 * MIB
"""Of a daemon whose queue is empty: one with 7 streams and 36,000 blocks took 69 MB, and 40 MB of files in memory."""
TESTED_PYTHON = ((3, 11), (3, 14))
_OLDEST_S = 1_767_225_600
"""2026-01-01: kvcensus is not older."""
_NUMBERS = re.compile(r"\d+")
_WANTED = re.compile(r"(>=|<|==)\s*([0-9.]+)")


def file_system(machine: Machine) -> Finding:
    """Where the data directory lies."""
    name, where = machine.file_system, f"at {machine.mount}"
    if name is None:
        return _finding("file system", Verdict.WARNING, "it cannot be found out which one this is", "see df")
    if machine.read_only:
        return _finding("file system", Verdict.PROBLEM, f"{name} {where} is read-only", "mount it read-write")
    if name in NETWORK:
        advice = "use a local disk: neither the locks nor the shared memory of LMDB work over a network"
        return _finding("file system", Verdict.PROBLEM, f"{name} {where} is a network file system", advice)
    if name in MEMORY:
        advice = "fine if it may be made again from the engines after a restart of the machine; else use a disk"
        return _finding("file system", Verdict.WARNING, f"{name} {where} is in memory, and counts as such", advice)
    if name in OVERLAY:
        advice = "mount a volume for the data directory"
        return _finding("file system", Verdict.WARNING, f"{name} {where} goes with its container", advice)
    return _finding("file system", Verdict.OK, f"{name} {where}")


def room(machine: Machine, index_bytes: int) -> Finding:
    """Whether the index can grow, and be copied for a snapshot."""
    free = machine.free
    if free is None:
        return _finding("disk", Verdict.WARNING, "it cannot be found out how much is free", "see df")
    says = f"{size(free)} free"
    if free < ROOM_MIN:
        return _finding("disk", Verdict.PROBLEM, says, "make room: without it nothing is written, and workers go stale")
    if free < ROOM_WANTED:
        return _finding("disk", Verdict.WARNING, says, "make room before the index grows, or watch it closely")
    if free < index_bytes:
        advice = "make room: a snapshot is read from a copy"
        return _finding("disk", Verdict.WARNING, f"{says}, less than the index of {size(index_bytes)}", advice)
    return _finding("disk", Verdict.OK, says)


def open_files(machine: Machine, settings: Settings) -> Finding:
    """Whether every stream and client can have its sockets."""
    needed = FILES_ELSE + FILES_A_STREAM * settings.streams + settings.max_connections
    if machine.open_files is None or machine.open_files >= needed:
        limit = "no limit" if machine.open_files is None else f"a limit of {machine.open_files}"
        return _finding("open files", Verdict.OK, f"{limit}, of which {needed} may be needed")
    says = f"a limit of {machine.open_files}, and {settings.streams} streams with clients may need {needed}"
    return _finding("open files", Verdict.PROBLEM, says, f"raise it: ulimit -n {needed}, or LimitNOFILE={needed}")


def address_space(machine: Machine, settings: Settings) -> Finding:
    """Whether LMDB can reserve its map."""
    limit = machine.address_space
    if settings.backend != "lmdb" or limit is None or limit > settings.map_size:
        return _finding("address space", Verdict.OK, "no limit that matters")
    says = f"a limit of {size(limit)} (ulimit -v), and index.map_size_bytes is {size(settings.map_size)}"
    return _finding("address space", Verdict.PROBLEM, says, "raise the limit, or lower index.map_size_bytes below it")


def memory(machine: Machine, settings: Settings) -> Finding:
    """Whether a full queue still fits into what the daemon may have."""
    needed = MEMORY_ELSE + settings.queue_max_bytes
    limits = [one for one in (machine.memory_limit, machine.memory_available) if one is not None]
    if not limits or min(limits) >= needed:
        have = f"{size(min(limits))} to be had" if limits else "no limit"
        return _finding("memory", Verdict.OK, f"{have}, of which a full queue takes some {size(needed)}")
    what = "the cgroup's limit" if min(limits) == machine.memory_limit else "available memory"
    says = f"{what} is {size(min(limits))}, and a full queue takes some {size(needed)}"
    return _finding("memory", Verdict.WARNING, says, "raise it, or lower writer.queue_max_bytes")


def clock(machine: Machine, newest_s: float) -> Finding:
    """Whether the wall clock can be right. `newest_s` is the time of the newest file of the data directory."""
    if machine.now_s < _OLDEST_S:
        return _finding("clock", Verdict.PROBLEM, "it is before 2026", "set it: lags and ages are counted with it")
    if newest_s > machine.now_s + 60:
        says = f"files of the data directory are {newest_s - machine.now_s:.0f} s in the future"
        return _finding("clock", Verdict.WARNING, says, "find out who set the clock back, and use NTP")
    if machine.clock_synchronised is False:
        says = "the kernel says that it is not synchronised"
        return _finding("clock", Verdict.WARNING, says, "run chrony or systemd-timesyncd: lags compare two clocks")
    known = "synchronised" if machine.clock_synchronised else "plausible; whether it is synchronised is not known"
    return _finding("clock", Verdict.OK, known)


def python(machine: Machine) -> Finding:
    """The interpreter."""
    first, last = TESTED_PYTHON
    says = "Python {}.{}".format(*machine.python)
    if first <= machine.python <= last:
        return _finding("python", Verdict.OK, says)
    return _finding("python", Verdict.WARNING, says, "use {}.{} to {}.{}: others are not tested".format(*first, *last))


def libraries(machine: Machine) -> Finding:
    """Whether the packages are those that kvcensus asks for."""
    wrong = [one for one in machine.libraries if not fits(one)]
    if not wrong:
        lmdb = next((one.version for one in machine.libraries if one.name == "lmdb"), None)
        says = f"all {len(machine.libraries)} as they should be" + (f", lmdb {lmdb}" if lmdb else "")
        return _finding("libraries", Verdict.OK, says)
    says = ", ".join(f"{one.name} {one.version or 'is missing'} (wanted {one.wanted})" for one in wrong)
    return _finding("libraries", Verdict.PROBLEM, says, "install kvcensus anew, in an environment of its own")


def fits(library: Library) -> bool:
    """Whether a version is within its bounds."""
    if library.version is None:
        return False
    version = _numbers(library.version)
    for sign, text in _WANTED.findall(library.wanted):
        bound = _numbers(text)
        if (sign == ">=" and version < bound) or (sign == "<" and version >= bound):
            return False
        if sign == "==" and version[: len(bound)] != bound:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part[0]) for part in map(_NUMBERS.findall, version.split(".")) if part)


def machine_findings(machine: Machine, settings: Settings, index_bytes: int, newest_s: float) -> list[Finding]:
    """Every check of the machine."""
    return [
        file_system(machine),
        room(machine, index_bytes),
        open_files(machine, settings),
        address_space(machine, settings),
        memory(machine, settings),
        clock(machine, newest_s),
        python(machine),
        libraries(machine),
    ]
