"""Simulated ranks behind real sockets, at the ports where a consumer looks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from random import SystemRandom
from types import TracebackType
from typing import Self

import msgspec
import zmq

from kvcensus.translators.translation import worker_id_of

from ..engine_sockets import BUFFER_STEPS, LIVE_HWM, EngineSockets
from ..recording import RecordedMessage
from .cache import Held
from .rank import Rank, RankOptions
from .wire import FORMATS

_PORTS = (20_000, 60_000)
_PORT_TRIES = 50


class EngineOptions(msgspec.Struct, frozen=True):
    """One engine: `ranks` as in the configuration of a source, 0 for one stream without rank.

    Rank r publishes at `base_port` + r and answers replays at `base_port` + max(ranks, 1) + r; `base_port` 0 takes free
    ones. `connect` has an endpoint per rank for a consumer that binds, instead of publishing at a port.
    """

    name: str
    seed: int
    ranks: int = 0
    rank: RankOptions = RankOptions()
    base_port: int = 0
    host: str = "127.0.0.1"
    buffer_steps: int = BUFFER_STEPS
    replay: bool = True
    connect: tuple[str, ...] = ()
    live_hwm: int = LIVE_HWM
    send_buffer: int = -1


class Truth(msgspec.Struct, frozen=True):
    """What a worker really holds after the message `last_seq`, in the `life`-th life of its engine."""

    worker_id: str
    life: int
    last_seq: int
    held: Held


class SimulatedRank:
    """One rank and its sockets. `lock` makes a message and the state after it one step; any thread may call."""

    def __init__(self, rank: Rank, sockets: EngineSockets, stream: str, worker_id: str) -> None:
        self.rank = rank
        self.sockets = sockets
        self.stream = stream
        self.worker_id = worker_id
        self.lock = threading.RLock()
        self.life = 1

    def publish(self, count: int = 1, *, live: bool = True, keep: bool = True) -> list[RecordedMessage]:
        """Work, and report it. `live` False loses it on the way, `keep` False leaves it out of the replay ring."""
        with self.lock:
            messages = [self.rank.next_message() for _ in range(count)]
            self.sockets.ask(lambda: self.sockets.publish(messages, live, keep))
        return messages

    def send(self, messages: Sequence[RecordedMessage]) -> None:
        """Put any messages on the live socket."""
        self.sockets.ask(lambda: self.sockets.publish(messages, live=True, keep=False))

    def restart(self, *, while_down: Callable[[], None] = lambda: None) -> None:
        """The process ends and starts again: messages on their way, the ring and the cache are gone."""
        with self.lock:
            self.sockets.ask(self.sockets.take_down)
            self.sockets.buffer.clear()
            while_down()
            self.life += 1
            self.rank.restart()
            self.sockets.ask(self.sockets.bring_up)

    def reset(self) -> None:
        """The same, as a consumer sees it whose sockets stayed up: numbers from 0, an empty ring, an empty cache."""
        with self.lock:
            self.sockets.ask(self.sockets.buffer.clear)
            self.life += 1
            self.rank.restart()

    def lose_message(self) -> None:
        """A number is used up and never published."""
        with self.lock:
            self.rank.lose_message()

    def truth(self) -> Truth:
        """What it holds, and since which message."""
        with self.lock:
            return Truth(self.worker_id, self.life, self.rank.last_seq, self.rank.held())


class SimulatedEngine:
    """All ranks of an engine. Raises zmq.ZMQError when a port cannot be used."""

    def __init__(self, options: EngineOptions) -> None:
        self.name = options.name
        self._options = options
        self.base_port, sockets = _opened(options)
        has_rank = FORMATS[options.rank.form].has_rank
        self.ranks = [
            SimulatedRank(
                Rank(options.rank, number, options.seed),
                each,
                worker_id_of(options.name, number if options.ranks else None),
                worker_id_of(options.name, number if has_rank else None),
            )
            for number, each in enumerate(sockets)
        ]

    @property
    def replay_port(self) -> int:
        """That of rank 0."""
        return self.base_port + len(self.ranks)

    def start(self) -> Self:
        """Begin to serve. Publishes nothing by itself."""
        for one in self.ranks:
            one.sockets.start()
        return self

    def stop(self, linger_ms: int = 0) -> None:
        """Close all sockets."""
        for one in self.ranks:
            one.sockets.stop(linger_ms)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _opened(options: EngineOptions) -> tuple[int, list[EngineSockets]]:
    if options.base_port:
        return options.base_port, _sockets(options, options.base_port)
    span = 2 * max(options.ranks, 1)
    for tries_left in reversed(range(_PORT_TRIES)):
        base_port = SystemRandom().randrange(_PORTS[0], _PORTS[1] - span)
        try:
            return base_port, _sockets(options, base_port)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("unreachable")


def _sockets(options: EngineOptions, base_port: int) -> list[EngineSockets]:
    opened: list[EngineSockets] = []
    count = max(options.ranks, 1)
    framing = FORMATS[options.rank.form].framing
    try:
        for number in range(count):
            live = options.connect[number] if options.connect else f"tcp://{options.host}:{base_port + number}"
            replay = f"tcp://{options.host}:{base_port + count + number}" if options.replay else ""
            opened.append(
                EngineSockets(
                    live,
                    not options.connect,
                    replay,
                    options.buffer_steps,
                    framing,
                    live_hwm=options.live_hwm,
                    send_buffer=options.send_buffer,
                )
            )
    except zmq.ZMQError:
        for one in opened:
            one.stop()
        raise
    return opened
