"""The engine's end of a stream: a PUB socket with sequence numbers, a ROUTER socket that replays a ring of messages.

Replay as vLLM and SGLang do it: a request is [identity, b"", start], start unsigned big-endian of any width; anything
else gets no answer. The answer has each buffered message with a number >= start, then an end marker:

    old framing  [identity, b"", seq, payload]          end [identity, b"", ff*8, b""]
    new framing  [identity, b"", topic, seq, payload]   end [identity, b"", b"", ff*8, b""]
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import StrEnum
from queue import Empty, SimpleQueue
from typing import TypeVar

import zmq

from .recording import RecordedMessage

BUFFER_STEPS = 10_000
"""Messages that an engine keeps for replay by default."""

LIVE_HWM = 100_000
"""Messages that an engine holds for one subscriber before it drops, by default."""

_END = b"\xff" * 8
_REBIND_S = 5.0
"""How long an address that was just left may still be taken."""

T = TypeVar("T")
Answer = Iterable[tuple[bytes, ...]]
"""The frames of each message of a reply, [topic, number, payload], the end marker included."""


class ReplayFraming(StrEnum):
    """How replies are framed. `old`: vLLM to 0.25, SGLang to 0.5.21. `new`: later ones, with the topic."""

    OLD = "old"
    NEW = "new"


def end_marker() -> tuple[bytes, ...]:
    """What ends a reply."""
    return (b"", _END, b"")


def honest_answer(start: int, buffer: Sequence[RecordedMessage]) -> Answer:
    """Each buffered message from `start` on, and the end marker."""
    for message in buffer:
        if message.seq is not None and message.seq >= start:
            yield message.frames
    yield end_marker()


class _Count:
    """A number that one thread sets and others wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.value = 0

    def add(self, step: int) -> None:
        with self._changed:
            self.value += step
            self._changed.notify_all()

    def wait_for(self, count: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.value >= count, timeout_s)


class EngineSockets:
    """Both sockets and the replay buffer, owned by one thread; `ask` has that thread do something with them.

    Without `live_binds` the live socket connects, for a consumer that binds. `replay_bind` "" means no replay socket.
    `answer` says what a replay request gets; it may be replaced by what a broken engine would answer. What a slow
    subscriber does not take is dropped beyond `live_hwm` messages and `send_buffer` bytes, -1: as the system has it.
    Raises zmq.ZMQError when an endpoint cannot be used.
    """

    def __init__(
        self,
        live: str,
        live_binds: bool,
        replay_bind: str,
        buffer_steps: int,
        framing: ReplayFraming,
        *,
        live_hwm: int = LIVE_HWM,
        send_buffer: int = -1,
    ) -> None:
        self._live_hwm = live_hwm
        self._send_buffer = send_buffer
        self.buffer: deque[RecordedMessage] = deque(maxlen=buffer_steps)
        self.answer: Callable[[int, Sequence[RecordedMessage]], Answer] = honest_answer
        self.requests = 0
        self._subscribed = _Count()
        self._framing = framing
        self._live_binds = live_binds
        self._is_mute = False
        self._linger_ms: int | None = None
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._poller = zmq.Poller()
        self._context = zmq.Context()
        self._live: zmq.Socket[bytes] | None = None
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self._woken, self._waker = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
            self._woken.bind("inproc://work")
            self._waker.connect("inproc://work")
            self._poller.register(self._woken, zmq.POLLIN)
            self.endpoint = self._open_live(live)
            self.replay_endpoint = self._open_replay(replay_bind) if replay_bind else ""
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._serve, name="engine-sockets", daemon=True)

    def _open_live(self, endpoint: str) -> str:
        live = self._live = self._context.socket(zmq.XPUB)
        live.setsockopt(zmq.XPUB_VERBOSER, 1)
        live.sndhwm = self._live_hwm
        live.sndbuf = self._send_buffer
        if self._live_binds:
            live.bind(endpoint)
        else:
            live.connect(endpoint)
        self._poller.register(live, zmq.POLLIN)
        return _address(live) if self._live_binds else endpoint

    def _open_replay(self, endpoint: str) -> str:
        replay = self._replay = self._context.socket(zmq.ROUTER)
        replay.sndhwm = 2 * ((self.buffer.maxlen or 0) + 1)
        replay.bind(endpoint)
        self._poller.register(replay, zmq.POLLIN)
        return _address(replay)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self, linger_ms: int = 0) -> None:
        """Close everything, giving what was published up to `linger_ms` to leave. An engine gives none."""
        if self._thread.is_alive():
            self.ask(lambda: self._end(linger_ms))
            self._thread.join()
        else:
            self._context.destroy(linger=linger_ms)

    @property
    def subscribers(self) -> int:
        """Subscriptions that the live socket knows of now."""
        return self._subscribed.value

    def wait_subscribers(self, count: int, timeout_s: float) -> bool:
        """Wait until there are that many. False after `timeout_s`."""
        return self._subscribed.wait_for(count, timeout_s)

    def ask(self, work: Callable[[], T]) -> T:
        """Have the thread do `work`, and return its result."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's sockets are not served: start() first")
        done: Future[T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001  (it belongs to the asking thread)
                done.set_exception(error)

        self._work.put(do)
        self._waker.send(b"")
        return done.result()

    def set_mute(self, silent: bool) -> None:
        """To be asked for. Give no answer to replay requests, or answer again."""
        self._is_mute = silent

    def make_honest(self) -> None:
        """To be asked for. Answer replay requests as an engine that works."""
        self._is_mute = False
        self.answer = honest_answer

    def publish(self, messages: Sequence[RecordedMessage], live: bool, keep: bool) -> None:
        """To be asked for. Send messages to the subscribers, and keep them for replay."""
        for message in messages:
            if live and message.frames and self._live is not None:
                self._live.send_multipart(message.frames, copy=False)
            if keep and message.seq is not None:
                self.buffer.append(message)

    def take_down(self, *, replay: bool = True) -> None:
        """To be asked for. Close the live socket, and the replay socket too; what was on its way is lost."""
        self._subscribed.add(-self._subscribed.value)
        self._close(self._live)
        self._live = None
        if replay:
            self._close(self._replay)
            self._replay = None

    def bring_up(self) -> None:
        """To be asked for. Bind at the same addresses again what was closed."""
        if self._live is None:
            self._again(self._open_live, self.endpoint)
        if self._replay is None and self.replay_endpoint:
            self._again(self._open_replay, self.replay_endpoint)

    def _close(self, socket: zmq.Socket[bytes] | None) -> None:
        if socket is not None:
            self._poller.unregister(socket)
            socket.close(linger=0)

    @staticmethod
    def _again(opened: Callable[[str], str], endpoint: str) -> None:
        deadline = time.monotonic() + _REBIND_S
        while True:
            try:
                opened(endpoint)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def _end(self, linger_ms: int) -> None:
        self._linger_ms = linger_ms

    def _serve(self) -> None:
        while self._linger_ms is None:
            ready = {socket for socket, _ in self._poller.poll()}
            if self._live is not None and self._live in ready:
                self._see_subscriptions(self._live)
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay)
            if self._woken in ready:
                self._woken.recv()
                self._do_work()
        self._context.destroy(linger=self._linger_ms)

    def _do_work(self) -> None:
        try:
            self._work.get_nowait()()
        except Empty:
            return

    def _see_subscriptions(self, live: zmq.Socket[bytes]) -> None:
        while live.poll(0):
            frame = live.recv()
            if frame[:1] in (b"\x00", b"\x01"):
                self._subscribed.add(1 if frame[0] else -1)

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        request = replay.recv_multipart()
        self.requests += 1
        if self._is_mute or len(request) != 3 or request[1]:
            return
        client, _, start = request
        for frames in self.answer(int.from_bytes(start, "big"), self.buffer):
            shown = frames if self._framing is ReplayFraming.NEW else frames[1:]
            replay.send_multipart((client, b"", *shown), copy=False)


def _address(socket: zmq.Socket[bytes]) -> str:
    """Where a consumer on this machine connects to."""
    bound = socket.get_string(zmq.LAST_ENDPOINT)
    return bound.replace("tcp://0.0.0.0:", "tcp://127.0.0.1:").replace("tcp://[::]:", "tcp://127.0.0.1:")
