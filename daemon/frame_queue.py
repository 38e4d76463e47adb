"""The bounded queue between the threads that receive and the one that writes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from kvcensus.translators.translation import Rejection

from .streams.verdicts import Apply, Fence, NewEpoch, Retire

if TYPE_CHECKING:
    from .followed import Followed


class Barrier(msgspec.Struct, frozen=True):
    """Set once everything queued before it is committed."""

    committed: threading.Event


class Advance(msgspec.Struct, frozen=True):
    """A bus has been read up to `position`. `life` tells the stream of its server, and what is there, from others."""

    position: int
    life: str


class Refuse(msgspec.Struct, frozen=True):
    """A message of a bus, or part of one, of which nobody knows whose it is. `seq` is -1 where it has no number."""

    seq: int
    payload: bytes
    rejection: Rejection


What = Apply | NewEpoch | Fence | Barrier | Retire | Advance | Refuse
Item = tuple["Followed", What]

_OVERHEAD_BYTES = 128


class Burst:
    """Items that go to the queue together, in order. Messages of a stream that follow one another become one item."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items: list[Item] = []
        self.messages = 0
        """Messages, and each thing that is none."""
        self.payload_bytes = 0
        self._last: dict[Followed, Apply] = {}
        self.extend(items)

    def extend(self, items: Iterable[Item]) -> None:
        """The next items."""
        for stream, what in items:
            self.add(stream, what)

    def add(self, stream: Followed, what: What) -> None:
        """The next item. What it carries of payloads is taken over."""
        if not isinstance(what, Apply):
            self._last.pop(stream, None)
            self.items.append((stream, what))
            self.messages += 1
            self.payload_bytes += len(what.payload) if isinstance(what, Refuse) else 0
            return
        self.messages += len(what.payloads)
        self.payload_bytes += sum(map(len, what.payloads))
        last = self._last.get(stream)
        if last is not None and last.after == what.seq:
            last.payloads.extend(what.payloads)
        else:
            self._last[stream] = what
            self.items.append((stream, what))

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return self.payload_bytes + _OVERHEAD_BYTES * self.messages


class FrameQueue:
    """Messages on their way to the writer, bounded in number and in bytes. They come and go in bursts.

    A full queue makes the receiver wait, so it stops reading. What the transport then drops is a gap, and
    a replay heals it.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._bursts: deque[Burst] = deque()
        self._messages = 0
        self._bytes = 0
        self._closed = False
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)

    def put(self, burst: Burst) -> bool:
        """Append items in order, waiting for room. False when the queue is closed and they were not taken.

        A burst goes in whole once there is any room, so it may pass the bounds.
        """
        with self._lock:
            while not self._closed and not self.has_room():
                self._drained.wait()
            if self._closed:
                return False
            self._append(burst)
        return True

    def offer(self, burst: Burst) -> bool:
        """As `put`, for a caller that must not wait. False when there is no room now; a closed queue takes nothing."""
        with self._lock:
            if self._closed:
                return True
            if not self.has_room():
                return False
            self._append(burst)
        return True

    def _append(self, burst: Burst) -> None:
        self._bursts.append(burst)
        self._messages += burst.messages
        self._bytes += burst.size
        self._filled.notify()

    def take(self, timeout_s: float) -> list[Item]:
        """The next burst, waiting up to `timeout_s` for it. An empty list when there is none."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._bursts and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                self._filled.wait(left)
            if not self._bursts:
                return []
            burst = self._bursts.popleft()
            self._messages -= burst.messages
            self._bytes -= burst.size
            self._drained.notify_all()
        return burst.items

    def close(self) -> None:
        """Take nothing more; what is queued can still be taken."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()
            self._drained.notify_all()

    def has_room(self) -> bool:
        """Whether `put` would not wait now."""
        return self._messages < self._max_messages and self._bytes < self._max_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def limits(self) -> tuple[int, int]:
        """Messages and bytes at which it is full."""
        return self._max_messages, self._max_bytes

    def depth(self) -> tuple[int, int]:
        """Messages and bytes waiting."""
        return self._messages, self._bytes
