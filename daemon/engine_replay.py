"""A recording published as an engine would: over the sockets of an engine, with its sequence numbers.

A sequence number that goes backwards in the recording is a restart of the engine: the buffer is lost, the sockets stay.
When a recording is played again, its batches get the present time: no engine repeats a message byte for byte, and one
that did would be taken for a duplicate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from struct import Struct
from types import TracebackType
from typing import Self

from .engine_sockets import BUFFER_STEPS, EngineSockets, ReplayFraming
from .recording import RecordedMessage

_FLOAT64 = 0xCB
_SECONDS = Struct(">d")
_BATCH = 64
"""Messages published between two looks at the replay socket."""


class ReplayedEngine:
    """The engine's end of a stream. One thread owns its sockets; every method may be called from one other thread.

    `messages` is iterated once for each life. Without `live_binds` the live socket connects, for a consumer that binds.
    `fresh_timestamps` gives the batches of the first life the present time too.
    `replay_bind` "" means no replay socket. Raises zmq.ZMQError when an endpoint cannot be used.
    """

    def __init__(
        self,
        messages: Iterable[RecordedMessage],
        *,
        live: str = "tcp://127.0.0.1:0",
        live_binds: bool = True,
        replay_bind: str = "tcp://127.0.0.1:0",
        buffer_steps: int = BUFFER_STEPS,
        framing: ReplayFraming = ReplayFraming.NEW,
        fresh_timestamps: bool = False,
    ) -> None:
        self._messages = messages
        self._fresh_timestamps = fresh_timestamps
        self._coming: Iterator[RecordedMessage] = iter(messages)
        self._upcoming: RecordedMessage | None = None
        self._last: RecordedMessage | None = None
        self._sockets = EngineSockets(live, live_binds, replay_bind, buffer_steps, framing)
        self.endpoint = self._sockets.endpoint
        self.replay_endpoint = self._sockets.replay_endpoint
        self.published_count = 0
        """Messages taken from the recording so far, over all lives."""

    def start(self) -> Self:
        """Begin to serve. Publishes nothing by itself."""
        self._sockets.start()
        return self

    def stop(self, linger_ms: int = 0) -> None:
        """Close both sockets, giving what was published up to `linger_ms` to leave. An engine gives none."""
        self._sockets.stop(linger_ms)

    @property
    def subscribers(self) -> int:
        """Subscriptions that the live socket knows of now."""
        return self._sockets.subscribers

    @property
    def replay_requests(self) -> int:
        """Requests received so far, valid or not, answered or not."""
        return self._sockets.requests

    def wait_subscribers(self, count: int = 1, timeout_s: float = 10.0) -> bool:
        """Wait until there are that many. False after `timeout_s`."""
        return self._sockets.wait_subscribers(count, timeout_s)

    def upcoming(self) -> RecordedMessage | None:
        """The next message of the recording, None at its end. Raises RecordingError."""
        if self._upcoming is None:
            self._upcoming = next(self._coming, None)
        return self._upcoming

    def upcoming_is_restart(self) -> bool:
        """Whether the engine restarted before the next message: its number is no higher than that of the last one."""
        coming, last = self.upcoming(), self._last
        if coming is None or last is None or coming.seq is None or last.seq is None:
            return False
        return coming.seq < last.seq or (coming.seq == last.seq and coming.payload != last.payload)

    def publish(self, count: int = 1, *, live: bool = True, keep: bool = True) -> int:
        """Publish the next messages. Returns how many there were. Raises RecordingError.

        `live` False drops them on the way to the subscribers, `keep` False leaves them out of the replay buffer.
        """
        done = 0
        while done < count and (batch := self._publish_batch(min(_BATCH, count - done), live, keep)):
            done += batch
        return done

    def _publish_batch(self, count: int, live: bool, keep: bool) -> int:
        if self.upcoming_is_restart():
            self.lose_buffer()
        batch = self._take(count)
        if self._fresh_timestamps:
            batch = [_at_present(message) for message in batch]
            self._last = batch[-1] if batch and batch[-1].seq is not None else self._last
        self._sockets.ask(lambda: self._sockets.publish(batch, live, keep))
        self.published_count += len(batch)
        return len(batch)

    def _take(self, count: int) -> list[RecordedMessage]:
        """The next messages, up to a restart."""
        batch: list[RecordedMessage] = []
        while len(batch) < count and (message := self.upcoming()) and not (batch and self.upcoming_is_restart()):
            batch.append(message)
            if message.seq is not None:
                self._last = message
            self._upcoming = None
        return batch

    def publish_rest(self) -> int:
        """Publish all that is left, as fast as it goes. Returns how many."""
        done = 0
        while count := self.publish(_BATCH):
            done += count
        return done

    def play(
        self,
        *,
        speed: float = 1.0,
        lives: int | None = 1,
        restart_pause_s: float = 0.0,
        stopping: threading.Event | None = None,
    ) -> None:
        """Publish what is left at `speed` times the recorded pace, 0 as fast as it goes, then `lives` - 1 times again.

        `lives` None: until `stopping` is set. A restart, recorded or not, takes `restart_pause_s`, whatever the speed.
        Raises RecordingError.
        """
        stopping = stopping or threading.Event()
        life = 1
        while self._play_life(speed, restart_pause_s, stopping) and (lives is None or life < lives):
            life += 1
            self.restart()
            stopping.wait(restart_pause_s)

    def _play_life(self, speed: float, restart_pause_s: float, stopping: threading.Event) -> int:
        """Returns how many messages there were, 0 when stopped."""
        done = 0
        began_s = began_ns = None
        while (message := self.upcoming()) is not None:
            if self.upcoming_is_restart():
                self.lose_buffer()
                stopping.wait(restart_pause_s)
                began_ns = None
            if began_s is None or began_ns is None:
                began_s, began_ns = time.monotonic(), message.received_ns
            due_s = began_s + (message.received_ns - began_ns) / 1e9 / speed if speed else 0.0
            if stopping.wait(max(0.0, due_s - time.monotonic())):
                return 0
            done += self._publish_batch(1 if speed else _BATCH, live=True, keep=True)
        return done

    def drop(self, count: int = 1) -> int:
        """Lose the next messages on the live socket; the replay buffer has them."""
        return self.publish(count, live=False)

    def duplicate(self) -> None:
        """Send the last message again on the live socket."""
        if self._last is not None:
            again = self._last
            self._sockets.ask(lambda: self._sockets.publish([again], live=True, keep=False))

    def lose_buffer(self) -> None:
        """Empty the replay buffer."""
        self._sockets.ask(self._sockets.buffer.clear)

    def mute(self, silent: bool = True) -> None:
        """Give no answer to replay requests from now on, or answer again."""
        self._sockets.ask(lambda: self._sockets.set_mute(silent))

    def restart(self) -> None:
        """Begin the next life: the recording starts again, the buffer is empty, the sockets stay."""
        self._coming = iter(self._messages)
        self._upcoming = None
        self._last = None
        self._fresh_timestamps = True
        self.lose_buffer()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _at_present(message: RecordedMessage) -> RecordedMessage:
    """The message with the present time in its batch, [float64 seconds, …]; any other payload as it is."""
    payload = message.payload
    if message.seq is None or len(payload) < 10 or payload[1] != _FLOAT64:
        return message
    return RecordedMessage(
        message.received_ns, (*message.frames[:-1], payload[:2] + _SECONDS.pack(time.time()) + payload[10:])
    )
