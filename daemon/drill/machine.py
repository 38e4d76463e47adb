"""What a drill borrows from the machine: a small disk, a network namespace, a reader that pins the index."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import msgspec

from kvcensus.backends.lmdb.files import INDEX_FILE, open_reader

LOOPBACK = "127.0.0.1"
SMALL_DISK_BYTES = 32 << 20
_CHUNK = bytes(64 << 10)
_BALLAST = "ballast"
_numbers = count()


class Unavailable(Exception):
    """The machine does not let us, and why."""


def _run(*command: str) -> None:
    """Raises Unavailable when it fails."""
    path = shutil.which(command[0])
    if path is None:
        raise Unavailable(f"there is no command {command[0]}")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:3])} failed: {done.stderr.strip() or done.returncode}")


class Link(msgspec.Struct, frozen=True):
    """How engines and daemon reach each other: their addresses, and what the daemon's command begins with.

    `device` is the engines' end of the link, "" when it is the loopback, which cannot be cut.
    """

    engines: str = LOOPBACK
    daemon: str = LOOPBACK
    prefix: tuple[str, ...] = ()
    device: str = ""

    def cut(self) -> None:
        """No packet passes any more, and nobody is told."""
        _run("ip", "link", "set", self.device, "down")

    def heal(self) -> None:
        """Packets pass again."""
        _run("ip", "link", "set", self.device, "up")


@contextmanager
def separate_network() -> Iterator[Link]:
    """A network namespace for the daemon. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("a network namespace needs root")
    number = next(_numbers) % 256
    name = f"kvd{os.getpid() % 10_000_000}-{number}"
    inside, outside = f"i{name}"[:15], f"o{name}"[:15]
    network = f"10.{201 + os.getpid() % 50}.{number}"
    link = Link(f"{network}.1", f"{network}.2", ("ip", "netns", "exec", name), outside)
    _run("ip", "netns", "add", name)
    with ExitStack() as stack:
        stack.callback(_run, "ip", "netns", "del", name)
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        _run("ip", "addr", "add", f"{link.engines}/24", "dev", outside)
        _run("ip", "link", "set", outside, "up")
        _run(*link.prefix, "ip", "addr", "add", f"{link.daemon}/24", "dev", inside)
        _run(*link.prefix, "ip", "link", "set", inside, "up")
        _run(*link.prefix, "ip", "link", "set", "lo", "up")
        yield link


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A disk of SMALL_DISK_BYTES at `directory`, which must exist. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("a small disk needs root")
    _run("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "kvcensus-drill", str(directory))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(directory))


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Leave no room on the disk of `directory`."""
    ballast = directory / _BALLAST
    try:
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(_CHUNK) == len(_CHUNK):
                    pass
            except OSError:
                pass
        yield
    finally:
        ballast.unlink(missing_ok=True)


@contextmanager
def pinned_index(data_dir: Path) -> Iterator[None]:
    """A reader that stays, so that the space of replaced rows is not used again and the file grows with each commit."""
    env, tables = open_reader(data_dir / INDEX_FILE)
    try:
        with env.begin() as snapshot:
            snapshot.stat(tables[0])
            yield
    finally:
        env.close()
