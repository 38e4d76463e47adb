"""The ZMQ source: one thread receives every stream's live messages and replays.

Live: a SUB socket, messages [topic, 8-byte big-endian sequence number, payload]. Replay: a fresh DEALER for each
request, [b"", start]; answers are [b"", (topic,) sequence number, payload], the last one with the number ff*8, so they
are read from the end. A fresh socket makes sure that a late answer to an earlier request is not taken for one to this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import zmq

from ..credentials import CredentialError
from ..followed import FollowedStream, monotonic_ms
from ..frame_queue import Barrier, Burst, FrameQueue
from ..logs import get_logger
from ..streams.verdicts import Apply, AskReplay, Fence, NewEpoch, Retire, StopReplay, Verdict
from .bus_source import BusSource
from .zmq_bus import BusLink
from .zmq_sockets import BURST_MESSAGES, Change, LiveSocket, ZmqOptions, receive

_END_OF_REPLAY = b"\xff" * 8
_POLL_MS = 50
_NOT_REACHED_MS = 10_000
"""A first connection takes a fraction of a second where something listens. ZMQ itself never says that nothing does."""

log = get_logger("zmq")


class _Link(LiveSocket):
    """The sockets of one stream."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], stream: FollowedStream, options: ZmqOptions) -> None:
        self.stream = stream
        self.replay: zmq.Socket[bytes] | None = None
        self.complain_at_ms: int | None = monotonic_ms() + _NOT_REACHED_MS
        """When to say that no first connection was made, None once there was one or it was said."""
        super().__init__(context, options)

    def ask(self, start: int) -> None:
        self.stop_replay()
        self.replay = self.socket(zmq.DEALER)
        self.replay.connect(self.options.replay_endpoint)
        self.replay.send_multipart([b"", start.to_bytes(8, "big")])

    def stop_replay(self) -> None:
        if self.replay is not None:
            self.replay.close()
            self.replay = None

    def close(self) -> None:
        self.stop_replay()
        super().close()


class ZmqIntake(threading.Thread):
    """The thread that owns all ZMQ sockets. Streams are added and removed while it runs."""

    def __init__(self, queue: FrameQueue) -> None:
        super().__init__(name="zmq-intake", daemon=True)
        self._queue = queue
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: dict[str, _Link] = {}
        self._buses: dict[str, BusLink] = {}
        self._wanted: dict[str, FollowedStream | BusSource] = {}
        """What is followed, also while its endpoint cannot be used."""
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._out = Burst()
        self.error: BaseException | None = None

    def add(self, stream: FollowedStream, options: ZmqOptions) -> None:
        """Follow a stream. An endpoint that cannot be used is logged and tried again until it can."""
        self._commands.put(lambda: self._want(stream.stream, stream, lambda: self._open(stream, options)))

    def add_bus(self, bus: BusSource, options: ZmqOptions) -> None:
        """Follow a bus: an endpoint that brings messages of workers by their own word."""
        self._commands.put(lambda: self._want(bus.name, bus, lambda: self._open_bus(bus, options)))

    def remove_bus(self, bus: BusSource, *, retire: bool, committed: Barrier) -> None:
        """Stop following a bus; `retire` also drops its workers. `committed` is queued behind all of it."""
        self._commands.put(lambda: self._close_bus(bus, retire, committed))

    def remove(self, name: str, *, retire: bool) -> None:
        """Stop following a stream; `retire` also drops what its worker holds."""
        self._commands.put(lambda: self._close(name, retire))

    def barrier(self, stream: FollowedStream, barrier: Barrier) -> None:
        """Queue a barrier behind everything received so far."""
        self._commands.put(lambda: self._out.add(stream, barrier))

    def stop(self) -> None:
        """End the thread; nothing more is received."""
        self._stopping = True

    def run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._links or self._buses:
                    self._step()
                else:
                    self._rest()
        except BaseException as error:
            self.error = error
            log.critical("intake_failed", error=repr(error), exc_info=True)
        finally:
            for link in (*self._links.values(), *self._buses.values()):
                link.close()
            self._context.destroy(linger=0)

    def _ready(self) -> set[zmq.Socket[bytes]]:
        """The sockets that have something to read, none of them after a while."""
        poller = zmq.Poller()
        for socket in (*self._links.values(), *self._buses.values()):
            poller.register(socket.live, zmq.POLLIN)
            poller.register(socket.monitor, zmq.POLLIN)
        for link in self._links.values():
            if link.replay is not None:
                poller.register(link.replay, zmq.POLLIN)
        return {socket for socket, _ in poller.poll(_POLL_MS)}

    def _step(self) -> None:
        ready = self._ready()
        now = monotonic_ms()
        for bus in self._buses.values():
            self._out.extend(bus.step(now, bus.live in ready))
        for link in list(self._links.values()):
            self._read_monitor(link, now)
            if link.replay is not None and link.replay in ready:
                self._read_replay(link, now)
                self._read_monitor(link, now)
            if 0 < link.reopen_at_ms <= now:
                link.reopen()
                continue
            if link.live in ready:
                self._read_live(link, now)
            self._carry_out(link, link.stream.state.tick(now))
            state = link.stream.note_state()
            if state is not None:
                log.info("stream_state", source=link.stream.source, stream=link.stream.stream, state=state)
            if link.complain_at_ms is not None and now >= link.complain_at_ms:
                self._note_not_reached(link)
        self._flush()

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _rest(self) -> None:
        """There is no socket to wait for, and a poller of none would not wait."""
        self._flush()
        with suppress(Empty):
            self._commands.get(timeout=_POLL_MS / 1000)()

    def _want(self, name: str, what: FollowedStream | BusSource, open_it: Callable[[], None]) -> None:
        self._wanted[name] = what
        open_it()

    def _open(self, stream: FollowedStream, options: ZmqOptions) -> None:
        try:
            self._links[stream.stream] = _Link(self._context, stream, options)
        except (zmq.ZMQError, CredentialError) as error:
            self._try_later(stream.stream, options, error, lambda: self._open(stream, options))
            return
        log.info("stream_opened", source=stream.source, stream=stream.stream, endpoint=options.endpoint)

    def _open_bus(self, bus: BusSource, options: ZmqOptions) -> None:
        try:
            self._buses[bus.name] = BusLink(self._context, bus, options)
        except (zmq.ZMQError, CredentialError) as error:
            bus.fail(str(error))
            self._try_later(bus.name, options, error, lambda: self._open_bus(bus, options))
            return
        log.info("bus_opened", bus=bus.name, endpoint=options.endpoint)

    def _try_later(self, name: str, options: ZmqOptions, error: Exception, again: Callable[[], None]) -> None:
        """Unless it was removed, or replaced, until then."""
        log.error("endpoint_unusable", stream=name, endpoint=options.endpoint, error=str(error))
        wanted = self._wanted[name]

        def try_again() -> None:
            if self._wanted.get(name) is wanted:
                again()

        timer = threading.Timer(options.reconnect_max_ms / 1000, self._commands.put, (try_again,))
        timer.daemon = True
        timer.start()

    def _close_bus(self, bus: BusSource, retire: bool, committed: Barrier) -> None:
        self._wanted.pop(bus.name, None)
        link = self._buses.pop(bus.name, None)
        if link is not None:
            link.close()
        if retire:
            self._out.extend(bus.retire())
        self._out.add(bus.position, committed)
        self._flush()

    def _close(self, name: str, retire: bool) -> None:
        stream = self._wanted.pop(name, None)
        link = self._links.pop(name, None)
        if link is not None:
            link.close()
        if retire and isinstance(stream, FollowedStream):
            self._out.add(stream, Retire())
        self._flush()

    def _read_monitor(self, link: _Link, now: int) -> None:
        """Connections before messages: the first message of a new connection must find its stream told.

        Without a replay socket nothing can be fetched again, so what the lost connection still brought comes first.
        With one it is dropped: read later, it would look like a sign of life of an engine that is gone.
        """
        for change, failed in link.changes():
            if change is Change.MADE:
                link.complain_at_ms = None
                link.connected(now)
                self._carry_out(link, link.stream.state.connected(now))
                continue
            if failed:
                self._note_failed_handshake(link, failed)
            if change is Change.LOST:
                if link.options.replay_endpoint:
                    link.drop_received()
                else:
                    self._read_live(link, now, most=link.options.receive_hwm)
                link.disconnected(now)
                self._carry_out(link, link.stream.state.disconnected(now))

    def _note_not_reached(self, link: _Link) -> None:
        link.complain_at_ms = None
        what = "nobody has connected to it" if link.options.bind else "nothing answers there"
        log.warning(
            "engine_not_reached",
            source=link.stream.source,
            stream=link.stream.stream,
            endpoint=link.options.endpoint,
            detail=f"{what} yet; it is tried for ever, and `kvcensus check --probe` says what is wrong",
        )

    def _note_failed_handshake(self, link: _Link, reason: str) -> None:
        stream = link.stream
        stream.intake.handshake_failures += 1
        log.warning(
            "handshake_failed",
            source=stream.source,
            stream=stream.stream,
            endpoint=link.options.endpoint,
            reason=reason,
            curve=bool(link.options.curve_server_key_file),
        )

    def _read_live(self, link: _Link, now: int, most: int = BURST_MESSAGES) -> None:
        stream = link.stream
        seqs: list[int] = []
        payloads: list[bytes] = []
        with suppress(zmq.Again):
            for _ in range(most):
                frames = receive(link.live)
                stream.intake.messages += 1
                if len(frames) == 3 and len(frames[1]) == 8:
                    seqs.append(int.from_bytes(frames[1], "big"))
                    payloads.append(frames[2])
                    continue
                stream.intake.malformed += 1
                log.warning(
                    "message_malformed", source=stream.source, stream=stream.stream, frames=[len(f) for f in frames]
                )
        stream.intake.bytes += sum(map(len, payloads))
        self._carry_out(link, stream.state.live_all(seqs, payloads, now))
        self._flush()

    def _read_replay(self, link: _Link, now: int) -> None:
        state = link.stream.state
        socket = link.replay
        for _ in range(BURST_MESSAGES):
            if socket is None or link.replay is not socket:
                return
            try:
                frames = receive(socket)
            except zmq.Again:
                break
            if len(frames) < 2 or len(frames[-2]) != 8:
                link.stream.intake.malformed += 1
                continue
            if frames[-2] == _END_OF_REPLAY:
                self._carry_out(link, state.replay_ended(now))
                break
            if len(frames) >= 4 and not frames[-3].startswith(link.topic):
                continue
            self._carry_out(link, state.replayed(int.from_bytes(frames[-2], "big"), frames[-1], now))
        self._flush()

    def _carry_out(self, link: _Link, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            if isinstance(verdict, Apply):
                self._out.add(link.stream, verdict)
            elif isinstance(verdict, AskReplay):
                log.debug("replay_asked", source=link.stream.source, stream=link.stream.stream, start=verdict.start)
                link.ask(verdict.start)
            elif isinstance(verdict, StopReplay):
                link.stop_replay()
            else:
                self._report(link, verdict)
                self._out.add(link.stream, verdict)

    def _report(self, link: _Link, verdict: NewEpoch | Fence) -> None:
        stream = link.stream
        if isinstance(verdict, NewEpoch):
            log.info(
                "epoch_started", source=stream.source, stream=stream.stream, epoch=verdict.epoch, reason=verdict.reason
            )
        else:
            log.warning(
                "worker_fenced",
                source=stream.source,
                stream=stream.stream,
                epoch=stream.state.epoch,
                seq=verdict.seq,
                reason=verdict.reason,
            )

    def _flush(self) -> None:
        """Hand over what the verdicts produced. Waits while the queue is full: nothing is read meanwhile."""
        if self._out.items:
            burst, self._out = self._out, Burst()
            self._queue.put(burst)
