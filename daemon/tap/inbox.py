"""The bounded way from the thread that receives to the one that prints. What does not fit is dropped and counted.

The receiver never waits, so that no publisher keeps messages for a watcher who does not read.
"""

from __future__ import annotations

import threading
from collections import deque

import msgspec

MESSAGES_MAX = 10_000
BYTES_MAX = 64 << 20


class Incoming(msgspec.Struct, frozen=True):
    """One message: the frames of ZMQ from `endpoint`, or `subject`, `headers` and the payload as one frame of NATS."""

    received_ms: int
    frames: list[bytes]
    endpoint: str = ""
    subject: str = ""
    headers: dict[str, str] | None = None


class Inbox:
    """A queue with a limit in messages and in bytes."""

    def __init__(self, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._messages_max, self._bytes_max = messages_max, bytes_max
        self._waiting: deque[tuple[Incoming, int]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, message: Incoming) -> None:
        """Add a message, or drop it where there is no room."""
        size = sum(map(len, message.frames))
        with self._changed:
            if len(self._waiting) >= self._messages_max or self._bytes + size > self._bytes_max:
                self._dropped += 1
                return
            self._waiting.append((message, size))
            self._bytes += size
            self._changed.notify()

    def fail(self, failure: BaseException) -> None:
        """Nothing will come any more."""
        with self._changed:
            self._failure = failure
            self._changed.notify()

    def get(self, timeout_s: float) -> Incoming | None:
        """The next message, None when there is none in time. Raises what `fail` was given."""
        with self._changed:
            if not self._waiting and self._failure is None:
                self._changed.wait(timeout_s)
            if self._waiting:
                message, size = self._waiting.popleft()
                self._bytes -= size
                return message
            if self._failure is not None:
                raise self._failure
            return None

    def dropped(self) -> int:
        """How many were dropped since the last question."""
        with self._changed:
            dropped, self._dropped = self._dropped, 0
            return dropped
