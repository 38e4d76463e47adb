"""The bounded queue between the threads that receive and the one that writes."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .followed import FollowedStream
    from .streams.verdicts import Apply, Fence, NewEpoch


class Barrier(msgspec.Struct, frozen=True):
    """Set once everything queued before it is committed."""

    committed: threading.Event


class Retire(msgspec.Struct, frozen=True):
    """The stream is no longer followed: drop what its worker holds, and its cursor."""


Item = tuple["FollowedStream", "Apply | NewEpoch | Fence | Barrier | Retire"]

_OVERHEAD_BYTES = 128


class FrameQueue:
    """Messages on their way to the writer, bounded in number and in bytes.

    A full queue makes the receiver wait, so it stops reading. What the transport then drops is a gap, and
    a replay heals it.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._closed = False
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)

    def put_many(self, items: list[Item]) -> bool:
        """Append items in order, waiting for room. False when the queue is closed and they were not taken.

        Items go in together once there is any room, so the bound can be passed by one such burst.
        """
        size = sum(len(getattr(item, "payload", b"")) + _OVERHEAD_BYTES for _, item in items)
        with self._lock:
            while not self._closed and (len(self._items) >= self._max_messages or self._bytes >= self._max_bytes):
                self._drained.wait()
            if self._closed:
                return False
            self._items.extend(items)
            self._bytes += size
            self._filled.notify()
        return True

    def take(self, most: int, timeout_s: float) -> list[Item]:
        """Up to `most` items in order, waiting up to `timeout_s` for the first. An empty list when there is none."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._items and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                self._filled.wait(left)
            taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._bytes -= sum(len(getattr(item, "payload", b"")) + _OVERHEAD_BYTES for _, item in taken)
            self._drained.notify_all()
        return taken

    def close(self) -> None:
        """Take nothing more; what is queued can still be taken."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()
            self._drained.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def depth(self) -> tuple[int, int]:
        """Messages and bytes waiting."""
        return len(self._items), self._bytes
