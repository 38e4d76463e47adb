"""Looks at the machine and at the data directory. Nothing is changed, and no lock is taken."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from .facts import Directory, Library, Machine

_TIME_ERROR = 5
"""What adjtimex(2) returns while the clock is not synchronised."""
_TIMEX_BYTES = 512
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)")
_UNLIMITED = 1 << 60
_ESCAPED = re.compile(r"\\([0-7]{3})")


def look_at_machine(data_dir: Path, pid: int | None) -> Machine:
    """The machine, with the limits of a daemon's process where one is visible."""
    place = existing(data_dir)
    kind, mount, read_only = _mounted(place)
    usage = None
    with suppress(OSError):
        usage = os.statvfs(place)
    return Machine(
        file_system=kind,
        mount=mount,
        read_only=read_only,
        free=usage.f_bavail * usage.f_frsize if usage else None,
        open_files=_limit(pid, "Max open files", resource.RLIMIT_NOFILE),
        address_space=_limit(pid, "Max address space", resource.RLIMIT_AS),
        clock_synchronised=_synchronised(),
        now_s=time.time(),
        memory_limit=_cgroup_limit(pid),
        memory_available=_available() if pid is None else None,
        python=sys.version_info[:2],
        libraries=tuple(_libraries()),
    )


def look_at_directory(path: Path) -> Directory:
    """The directory and the names in it."""
    if not os.path.isdir(path):  # that of pathlib raises where we may not look
        parent = existing(path)
        can_be_made = parent != path.absolute() and parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        return Directory(str(path), writable=can_be_made, our_uid=os.geteuid())
    seen = path.stat()
    writable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
    files = []
    with suppress(OSError):
        for one in path.iterdir():
            with suppress(OSError):
                files.append((one, one.lstat()))
    return Directory(
        str(path),
        exists=True,
        writable=writable,
        uid=seen.st_uid,
        our_uid=os.geteuid(),
        mode=seen.st_mode,
        of_others=tuple(sorted(one.name for one, stat in files if stat.st_uid != seen.st_uid)),
        newest_s=max((stat.st_mtime for _, stat in files), default=0.0),
        leftovers=tuple(
            sorted((one.name, stat.st_size) for one, stat in files if one.name.startswith("index.mdb.corrupt"))
        ),
        owner_pid=_owner_pid(path / "owner.lock"),
    )


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # that of pathlib raises
        path = path.parent
    return path


def mount_of(path: str, mountinfo: str) -> tuple[str, str, bool] | None:
    """File system, place and whether it is read-only, out of /proc/PID/mountinfo. The last one over a place counts."""
    best: tuple[str, str, bool] | None = None
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        parts, kinds = fields.split(), rest.split()
        if len(parts) < 6 or len(kinds) < 3:
            continue
        place = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), parts[4])
        inside = place == "/" or path == place or path.startswith(f"{place}/")
        if inside and (best is None or len(place) >= len(best[1])):
            read_only = "ro" in parts[5].split(",") or "ro" in kinds[2].split(",")
            best = (kinds[0], place, read_only)
    return best


def holder_of(inode: int, device: int, locks: str) -> int | None:
    """The process that holds flock(2) on a file, out of /proc/locks. Those of other PID namespaces are not in it."""
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    for line in locks.splitlines():
        parts = line.split()
        if len(parts) >= 6 and parts[1] == "FLOCK" and parts[5] == wanted and int(parts[4]) > 0:
            return int(parts[4])
    return None


def _mounted(place: Path) -> tuple[str | None, str, bool]:
    with suppress(OSError):
        found = mount_of(str(place.resolve()), Path("/proc/self/mountinfo").read_text())
        if found is not None:
            return found
    return None, "", False


def _owner_pid(lock: Path) -> int | None:
    with suppress(OSError, ValueError):
        seen = lock.stat()
        return holder_of(seen.st_ino, seen.st_dev, Path("/proc/locks").read_text())
    return None


def _limit(pid: int | None, name: str, number: int) -> int | None:
    """The soft limit of a process, None for none."""
    if pid is not None:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
                if line.startswith(name):
                    soft = line.removeprefix(name).split()[0]
                    return None if soft == "unlimited" else int(soft)
    soft_limit = resource.getrlimit(number)[0]
    return None if soft_limit == resource.RLIM_INFINITY else soft_limit


def _synchronised() -> bool | None:
    try:
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def _cgroup_limit(pid: int | None) -> int | None:
    """The least memory limit on the way to the root of the hierarchy, None for none."""
    limits = []
    with suppress(OSError):
        for line in Path(f"/proc/{pid or 'self'}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, file = Path("/sys/fs/cgroup"), "memory.max"
            elif "memory" in controllers.split(","):
                base, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            else:
                continue
            here = base / path.lstrip("/")
            for one in (here, *here.parents):
                with suppress(OSError, ValueError):
                    limits.append(int((one / file).read_text()))
    return min((one for one in limits if one < _UNLIMITED), default=None)


def _available() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _libraries() -> list[Library]:
    found = []
    with suppress(PackageNotFoundError):
        for requirement in requires("kvcensus") or ():
            match = _REQUIREMENT.fullmatch(requirement)
            if match is None or ";" in requirement:
                continue
            try:
                installed: str | None = version(match[1])
            except PackageNotFoundError:
                installed = None
            found.append(Library(match[1], installed, match[2]))
    return found
