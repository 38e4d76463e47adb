"""A data directory on this machine: which process owns it, and whether the machine has crashed since it was written.

owner.lock   held by the one process that writes
boot.json    how the last writer ran
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec

from .errors import BackendBusy, BackendError

UNSYNCED = "process"
"""The durability of a backend that does not sync what it commits, by the name that every backend gives it."""

_WAIT_STEP_S = 0.02
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Boot(msgspec.Struct):
    boot_id: str
    durability: str
    clean: bool


class Owner:
    """The right to write a data directory, held until `release`."""

    def __init__(self, directory: Path, wait_s: float = 0) -> None:
        """Raises BackendBusy when another process holds it, after `wait_s` seconds at the least.

        Raises BackendError when the directory cannot be used.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(directory / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BackendError(f"data directory {directory}: {error.strerror}") from error
        deadline = time.monotonic() + wait_s
        while not self._locked():
            if time.monotonic() >= deadline:
                owner = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._file)
                raise BackendBusy(f"data directory {directory} is in use by process {owner}")
            time.sleep(_WAIT_STEP_S)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Give the directory up."""
        os.close(self._file)


def boot_id() -> str:
    """What the kernel calls this boot of the machine."""
    return _BOOT_ID.read_text().strip()


def lost_in_machine_crash(directory: Path) -> bool:
    """Whether an unsynced writer ran when the machine went down: nothing that it wrote is to be believed."""
    try:
        boot = msgspec.json.decode((directory / "boot.json").read_bytes(), type=_Boot)
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    return not boot.clean and boot.durability == UNSYNCED and boot.boot_id != boot_id()


def note_writer(directory: Path, durability: str, clean: bool) -> None:
    """Record how the index is being written, durably and before it is."""
    path = directory / "boot.json"
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(msgspec.json.encode(_Boot(boot_id(), durability, clean)))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_directory(directory)


def sync_file(path: Path) -> None:
    """Make what a file says durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(directory: Path) -> None:
    """Make the names of new, renamed and deleted files durable."""
    folder = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
