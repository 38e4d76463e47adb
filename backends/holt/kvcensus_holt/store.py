"""A Holt tree with what the index needs of it: one batch a call, questions that see one moment, and errors with names.

A batch is one record of the tree's log, so after a crash all of it is there or nothing. The crate changes its memory
before it writes that record: where that fails, the tree is closed without a checkpoint and read again from its files,
and the number that each batch carries says whether it is there. This is why checkpoints are made here and not by a
thread of the crate, which could write half a batch to the data file meanwhile.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception, named like one
from weakref import WeakSet

import msgspec

from kvcensus.backends.entries import LivePlaces, live_places
from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendError, BackendFull

from ._native import NativeError, Snapshot, Tree
from .options import FRAME_BYTES, Durability, Resources
from .rows import LINK, ROW, meta_key

Changes = dict[bytes, bytes | None]
"""New values by key; None for a key that is to go."""

NUMBER_64 = Struct(">Q")
BATCH_BYTES_MAX = 16 << 20
"""What the crate takes as one record of its log, all keys, values and some bytes for each."""
LOG = "journal.wal"

_BATCH_KEY = meta_key("batch")
"""The number of the last batch."""
_UNDECODABLE = (StructError, IndexError, KeyError, UnicodeDecodeError, msgspec.DecodeError)
"""What decoding raises when the bytes are not what was written."""
_CHUNK = 1024
"""Rows that a snapshot reads at a time: a close waits no longer than for these."""
_NO_ROOM_BYTES = 64 << 20
"""The log's thread does not tell why it could not write. With less than this free it was the disk."""


class Question:
    """The index as it is between two calls that write."""

    def __init__(self, tree: Tree, live: LivePlaces) -> None:
        self.live = live
        self._tree = tree

    def under(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """Every key that begins with `prefix`, and its value."""
        return self._tree.scan_each([prefix])[0]

    def under_each(self, prefixes: list[bytes]) -> list[list[tuple[bytes, bytes]]]:
        """`under` for each of them."""
        return self._tree.scan_each(prefixes)

    def keys_under(self, prefix: bytes, limit: int = 0) -> list[bytes]:
        """The first `limit` keys that begin with `prefix`; all of them for 0."""
        return self._tree.scan_keys(prefix, None, limit)

    def block_keys(self, after: bytes, limit: int) -> list[bytes]:
        """The next keys of rows and links after one of them."""
        keys = self._tree.scan_keys(b"", after or None, limit)
        return [key for key in keys if key[:1] in (ROW, LINK)]

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, in their order."""
        return self._tree.get_many(keys)


class Pinned:
    """The index as of one moment, read over a longer time, until `release`."""

    def __init__(self, snapshot: Snapshot, live: LivePlaces) -> None:
        self.live = live
        self.snapshot = snapshot

    def release(self) -> None:
        """Give the tree free."""
        self.snapshot.close()


class Store:
    """An open tree. One thread writes, any thread asks."""

    def __init__(self, path: Path, durability: Durability, resources: Resources) -> None:
        """Open or create. Raises the errors of `kvcensus.backends.errors`."""
        self._path = path
        self._moment = threading.Lock()
        self._pinned: WeakSet[Pinned] = WeakSet()
        self.damage: BackendCorrupt | None = None
        self.bytes_written = 0
        self.live = live_places(0, {})
        """The places that go with what is stored: changed in the `then` of a write."""
        self._resources = resources
        self._sync = durability is Durability.MACHINE
        self._tree: Tree | None = None
        self._open()
        try:
            self._number = int.from_bytes(self.get(_BATCH_KEY) or b"", "big")
        except BackendError:
            self._close_tree()
            raise

    def _open(self) -> None:
        """Open the tree and read what its log has."""
        with self._named():
            self._path.mkdir(mode=0o700, exist_ok=True)
            frames = max(self._resources.cache_bytes // FRAME_BYTES, 1)
            self._tree = Tree(self._path, self._sync, frames)
        self._in_log = (self._path / LOG).stat().st_size

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What the crate says, and bytes that cannot be decoded, as errors of `kvcensus.backends.errors`."""
        try:
            yield
        except _UNDECODABLE as error:
            self.damage = self._corrupt(repr(error))
            raise self.damage from error
        except NativeError as error:
            named = self._name(*error.args)
            if isinstance(named, BackendCorrupt):
                self.damage = named
            raise named from error

    def _name(self, kind: str, text: str) -> BackendError:
        if kind == "full" or (kind in ("io", "internal") and shutil.disk_usage(self._path).free < _NO_ROOM_BYTES):
            return BackendFull(f"{self._path}: the disk is full ({text})")
        if kind == "busy":
            return BackendBusy(f"{self._path} is in use ({text})")
        if kind in ("corrupt", "panic"):
            return self._corrupt(text)
        return BackendError(f"{self._path}: {text}")

    def _corrupt(self, detail: str) -> BackendCorrupt:
        return BackendCorrupt(
            f"{self._path} is damaged ({detail}); it is not served. "
            f"To rebuild it from the engines: mv {self._path} {self._path}.corrupt"
        )

    def _opened(self) -> Tree:
        if self._tree is None:
            raise BackendError(f"{self._path} is closed")
        return self._tree

    def get(self, key: bytes) -> bytes | None:
        """One value, None when there is none."""
        with self._named():
            return self._opened().get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, in their order, for the thread that writes."""
        with self._named():
            return self._opened().get_many(keys)

    @contextmanager
    def asking(self) -> Iterator[Question]:
        """A look at the index between two calls that write, which wait for it: a scan of the tree sees no one moment.

        A snapshot would, but each copies a frame of 512 KiB.
        """
        with self._moment, self._named():
            yield Question(self._opened(), self.live)

    def pin(self) -> Pinned:
        """The index as it is now, for as long as it takes to read."""
        with self._moment, self._named():
            pinned = Pinned(self._opened().snapshot(), self.live)
            self._pinned.add(pinned)
            return pinned

    def walk(self, pinned: Pinned, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The keys and values of a pinned index under `prefix`, read some at a time."""
        after: bytes | None = None
        while True:
            with self._named():
                chunk = pinned.snapshot.scan(prefix, after, _CHUNK)
            yield from chunk
            if len(chunk) < _CHUNK:
                return
            after = chunk[-1][0]

    def write(self, changes: Changes, then: Callable[[], None]) -> None:
        """Write a batch, all or nothing. A question sees it together with the `live` that `then` sets.

        Raises BackendFull when nothing of it was written.
        """
        if self._in_log >= self._resources.checkpoint_bytes:
            self.checkpoint()
        number = NUMBER_64.pack(self._number + 1)
        batch = list({**changes, _BATCH_KEY: number}.items())
        size = sum(len(key) + len(value or b"") for key, value in batch)
        with self._moment:
            try:
                with self._named():
                    self._opened().atomic(batch)
            except BackendCorrupt:
                raise
            except BackendError as error:
                if _is_limit(error):
                    raise
                self._reopen()
                if self.get(_BATCH_KEY) != number:
                    raise
            self._number += 1
            self._in_log += size
            self.bytes_written += size
            then()

    def _reopen(self) -> None:
        """Forget what is in memory and read the files again. Snapshots that are being read end with an error."""
        self._close_tree()
        self._open()

    def checkpoint(self) -> None:
        """Write what changed to the data file, and empty the log."""
        with self._named():
            self._opened().checkpoint()
        self._in_log = 0

    def read_everything(self) -> None:
        """Every row and link. Raises BackendCorrupt."""
        pinned = self.pin()
        try:
            for _ in self.walk(pinned, b""):
                pass
        finally:
            pinned.release()

    def compact(self) -> None:
        """Pack what is stored, and give the rest of the disk back."""
        with self._named():
            self._opened().compact()
        self._in_log = 0

    def readers(self) -> int:
        """Snapshots that are being read."""
        return len(self._pinned)

    def file_bytes(self) -> int:
        """Bytes that the files occupy on disk."""
        total = 0
        for path in self._path.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    def close(self) -> None:
        """End every snapshot, write what changed, and close."""
        with self._moment:
            if self._tree is None:
                return
            if self.damage is None:
                # On a full disk it cannot be done, and is not needed: every batch is in the log.
                with suppress(BackendError):
                    self.checkpoint()
            self._close_tree()

    def _close_tree(self) -> None:
        for pinned in list(self._pinned):
            pinned.release()
        tree, self._tree = self._tree, None
        if tree is not None:
            tree.close()


def _is_limit(error: BackendError) -> bool:
    """Whether the crate refused a batch before it began with it."""
    cause = error.__cause__
    return isinstance(cause, NativeError) and cause.args[0] in ("limit", "closed")
