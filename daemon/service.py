"""The running daemon: backend, writer, sources and streams, wired together, changed by a reload, ended by a stop."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import suspect
from kvcensus.backends.model import ClearBlocks, Cursor
from kvcensus.backends.registry import open_backend

from .claims import Claims
from .config import Config, NatsConfig, OnCorrupt, SourceConfig, StreamConfig
from .config.endpoints import Endpoint
from .counters import HttpCounters, QuarantineCounters, ShadowCounters, WriterCounters
from .followed import Followed, FollowedStream
from .following import stream_of
from .frame_queue import Barrier, FrameQueue
from .logs import get_logger
from .metrics import install
from .progress import never_followed
from .quarantine import Quarantine, QuarantineLimits
from .shadow import Shadow
from .sources.bus_source import BusSettings, BusSource
from .sources.nats import NatsIntake
from .sources.zmq import ZmqIntake
from .sources.zmq_sockets import options_of
from .status import BusFigures, Readiness, StreamCounters, StreamStatus, Trust
from .streams.bus import BusLimits
from .threads import join_if_started
from .writer import Writer, WriterOptions

NOT_REACHED_YET = "not reached yet"
"""What `/readyz` says of a bus until the first attempt has an outcome."""

log = get_logger("service")

_LOOK_S = 0.2
_LONG_S = 10.0


class Service:
    """The daemon without its HTTP side. One thread starts, reloads and stops it; any thread may look at it."""

    def __init__(self, config: Config) -> None:
        """Opens the backend. Raises the errors of `backends.errors`."""
        self._config = config
        self.registry = CollectorRegistry(auto_describe=True)
        self.backend: IndexBackend = _open_backend(config)
        self._queue = FrameQueue(config.writer.queue_max_messages, config.writer.queue_max_bytes)
        self._quarantine = _open_quarantine(config)
        self._shadow = _shadow_of(config)
        self._writer = Writer(
            self.backend,
            self._queue,
            WriterOptions(config.writer.commit_max_blocks, config.writer.commit_max_ms, config.index.reclaim_rows),
            self._quarantine,
            self._shadow,
        )
        self._intake = ZmqIntake(self._queue)
        self._nats = NatsIntake(self._queue)
        self._claims = Claims()
        self._buses: dict[str, tuple[SourceConfig | NatsConfig, BusSource]] = {}
        self._streams: dict[str, tuple[SourceConfig, FollowedStream]] = {}
        self.http_counters = HttpCounters()
        install(self.registry, self)

    @property
    def writer_counters(self) -> WriterCounters:
        """What the writer counts of itself."""
        return self._writer.counters

    @property
    def quarantine_counters(self) -> QuarantineCounters:
        """What the quarantine holds, and has lost."""
        return QuarantineCounters() if self._quarantine is None else self._quarantine.counters

    @property
    def shadow_counters(self) -> ShadowCounters | None:
        """What was counted of the shadow, None without one."""
        return None if self._shadow is None else self._shadow.counters

    def start(self) -> None:
        """Drop what unconfigured streams left, then follow the configured ones from their cursors."""
        cursors = self.backend.cursors()
        wanted = {stream.stream for _, stream in self._config.streams()}
        buses = {bus.name: bus.cursor() for bus in self._config.buses()}
        for name in sorted(cursors.keys() - wanted - set(buses.values())):
            cursor = cursors[name]
            if cursor.source not in buses:
                self._drop_unconfigured(cursor)
            elif not cursor.epoch:
                self.backend.forget_stream(name)
        for _, stream in self._config.streams():
            taken = _of_source(stream, cursors.get(stream.stream))
            if taken is not None and taken != cursors[stream.stream]:
                self.backend.apply([], [taken])
                cursors[stream.stream] = taken
        if self._shadow is not None:
            self._shadow.begin(self.backend)
        for source, stream in self._config.streams():
            self._follow(source, stream, cursors.get(stream.stream))
        for bus in self._config.buses():
            self._follow_bus(bus, cursors.values())
        self._writer.start()
        self._intake.start()
        self._nats.start()

    def _drop_unconfigured(self, cursor: Cursor) -> None:
        log.warning("stream_not_configured", stream=cursor.stream, worker=cursor.worker_id, epoch=cursor.epoch)
        if cursor.worker_id:
            self.backend.apply([ClearBlocks(cursor.worker_id)], [never_followed(cursor)])
        self.backend.forget_stream(cursor.stream)

    def _follow(self, source: SourceConfig, stream: StreamConfig, cursor: Cursor | None) -> None:
        followed = stream_of(source, stream, cursor)
        self._streams = {**self._streams, stream.stream: (source, followed)}
        self._claims.claim(stream.stream, stream.source)
        options = options_of(source, stream.endpoint, stream.replay_endpoint)
        self._intake.add(followed, options)

    def _follow_bus(self, config: SourceConfig | NatsConfig, cursors: Iterable[Cursor]) -> None:
        bus = BusSource(_bus_settings(config), cursors, self._claims)
        self._buses = {**self._buses, config.name: (config, bus)}
        if isinstance(config, NatsConfig):
            self._nats.add(bus, config)
        else:
            self._intake.add_bus(bus, options_of(config, str(Endpoint.parse(config.endpoint))))

    def _leave_bus(
        self, config: SourceConfig | NatsConfig, bus: BusSource, ended: Callable[[], bool], *, retire: bool
    ) -> bool:
        """Returns once all that the bus brought is committed. False when the end comes first."""
        committed = threading.Event()
        if isinstance(config, NatsConfig):
            self._nats.remove(bus.name, retire=retire, committed=Barrier(committed))
        else:
            self._intake.remove_bus(bus, retire=retire, committed=Barrier(committed))
        if not self._await(committed, ended):
            return False
        bus.close()
        return True

    def reload(self, config: Config, ended: Callable[[], bool] = lambda: False) -> list[str]:
        """Follow new sources, drop removed ones, and take changed ones up from where they are.

        Nothing new is followed before all that was left is committed, or the process has `ended`: from an older cursor
        messages would be applied twice, and a worker may go from one source to another. Returns the keys that changed
        but need a restart.
        """
        wanted = {stream.stream: (source, stream) for source, stream in config.streams()}
        current = dict(self._streams)
        changed = [name for name, (source, _) in current.items() if name in wanted and wanted[name][0] != source]
        left = [name for name in current if name in changed or name not in wanted]
        for name in left:
            log.info("stream_dropped" if name not in wanted else "stream_changed", stream=name)
            self._intake.remove(name, retire=name not in wanted)
        if left and not self._settle(ended):
            return []
        for name in left:
            self._claims.release(name, current[name][0].name)
        self._streams = {name: followed for name, followed in current.items() if name not in left}
        new = {name: stream.source for name, (_, stream) in wanted.items() if name not in self._streams}
        taken = {name: self._claims.owner(name) for name, source in new.items() if not self._claims.claim(name, source)}
        changed_buses = self._leave_buses(config, set(taken.values()), ended)
        if changed_buses is None:
            return []
        cursors = self.backend.cursors() if changed_buses else {}
        for name in new:
            source, stream = wanted[name]
            cursor = cursors.get(name) if name in taken else None
            self._follow(source, stream, current[name][1].cursor if name in changed else _of_source(stream, cursor))
        for bus in config.buses():
            if bus.name not in self._buses:
                self._follow_bus(bus, cursors.values() if bus.name in changed_buses else ())
        self._config = msgspec.structs.replace(self._config, sources=config.sources, nats=config.nats)
        return [
            key
            for key in config.__struct_fields__
            if key != "relay" and getattr(config, key) != getattr(self._config, key)
        ]

    def _leave_buses(self, config: Config, robbed: set[str], ended: Callable[[], bool]) -> set[str] | None:
        """Leave buses that were changed, or `robbed` of a worker, and drop removed ones with their workers.

        Returns the names of the changed ones, to be taken up from what is committed of them; None when the end comes
        before that.
        """
        wanted = {bus.name: bus for bus in config.buses()}
        current = dict(self._buses)
        changed = {
            name for name, (bus, _) in current.items() if name in wanted and (wanted[name] != bus or name in robbed)
        }
        self._buses = {name: bus for name, bus in current.items() if name in wanted and name not in changed}
        for name, (one, bus) in current.items():
            if name not in self._buses:
                log.info("bus_dropped" if name not in wanted else "bus_changed", bus=name)
                if not self._leave_bus(one, bus, ended, retire=name not in wanted):
                    return None
        return changed

    def _settle(self, ended: Callable[[], bool]) -> bool:
        """Wait until all that was received is committed, so that cursors say how far each stream is."""
        committed = threading.Event()
        _, followed = next(iter(self._streams.values()))
        self._intake.barrier(followed, Barrier(committed))
        return self._await(committed, ended)

    def _await(self, committed: threading.Event, ended: Callable[[], bool]) -> bool:
        """Wait for a barrier. False when the end comes first: a store without room may take long."""
        began_s, told = time.monotonic(), False
        while not committed.wait(_LOOK_S):
            if ended() or self.failure() is not None:
                return False
            if not told and time.monotonic() - began_s > _LONG_S:
                told = True
                log.warning("reload_waits", detail="until what was received of the changed sources is committed")
        return True

    def stop(self, deadline_s: float) -> bool:
        """Receive nothing more, commit what is queued, close the backend. False when the deadline cut that short."""
        ends = time.monotonic() + deadline_s
        self._intake.stop()
        self._nats.stop()
        join_if_started(self._intake, max(0.1, ends - time.monotonic()))
        join_if_started(self._nats, max(0.1, ends - time.monotonic()))
        self._queue.close()
        join_if_started(self._writer, max(0.1, ends - time.monotonic()))
        drained = not self._writer.is_alive()
        if not drained:
            self._writer.abandon()
            self._writer.join()
        if self._quarantine is not None:
            self._quarantine.close()
        if self._shadow is not None:
            self._shadow.close()
        self.backend.close()
        return drained and self._writer.error is None

    def failure(self) -> BaseException | None:
        """Why the daemon cannot go on, if it cannot."""
        return self._writer.error or self._intake.error or self._nats.error or self.backend.damage()

    def alive(self) -> bool:
        return self._writer.is_alive() and self._intake.is_alive() and self._nats.is_alive()

    def beat_s(self) -> float:
        """When the writer last was between two steps, by the monotonic clock."""
        return self._writer.beat_s

    def summary(self) -> str:
        """How it goes, in one line for people."""
        trusts = Counter(status.trust for status in self.statuses())
        workers = ", ".join(f"{trusts[trust]} {trust}" for trust in Trust if trusts[trust]) or "none"
        problems = self.readiness().problems
        return "; ".join([f"workers: {workers}", f"{len(self.backend):,} blocks", *problems[:1]])

    def readiness(self) -> Readiness:
        """A bus that was never reached leaves nothing to answer from; one that is lost later leaves what is known."""
        problems = []
        if not self.alive():
            problems.append(f"a thread has ended: {self.failure()!r}")
        if unwritten := self._writer.upkeep.problem:
            problems.append(f"nothing can be written: {unwritten}")
        if damage := self.backend.damage():
            problems.append(f"the index is damaged: {damage}")
        ready = not problems
        for _, bus in self._buses.values():
            if bus.problem or not bus.was_connected:
                problems.append(f"bus {bus.name}: {bus.problem or NOT_REACHED_YET}")
                ready = ready and bus.was_connected
        return Readiness(ready, problems)

    def statuses(self) -> list[StreamStatus]:
        return [self._status(followed) for followed in self._followed()]

    def standings(self) -> dict[str, Callable[[], StreamStatus]]:
        standings: dict[str, Callable[[], StreamStatus]] = {}
        for followed in self._followed():
            cursor = followed.cursor
            standings[followed.worker_id(cursor)] = partial(self._status, followed, cursor)
        return standings

    def _status(self, followed: Followed, cursor: Cursor | None = None) -> StreamStatus:
        upkeep, status = self._writer.upkeep, followed.status(cursor)
        return _unwritten(status, upkeep.problem, upkeep.since_ms) if upkeep.problem else status

    def stream_counters(self) -> Sequence[StreamCounters]:
        return self._followed()

    def buses(self) -> Sequence[BusFigures]:
        return [bus for _, bus in self._buses.values()]

    def _followed(self) -> list[Followed]:
        """Every stream: the configured ones, and those that buses have brought."""
        configured = [followed for _, followed in self._streams.values()]
        return [*configured, *(worker for _, bus in self._buses.values() for worker in bus.workers())]

    def queue_depth(self) -> tuple[int, int]:
        return self._queue.depth()

    def queue_limits(self) -> tuple[int, int]:
        return self._queue.limits


def _bus_settings(config: SourceConfig | NatsConfig) -> BusSettings:
    if isinstance(config, NatsConfig):
        return BusSettings(
            name=config.name,
            cursor=config.cursor(),
            endpoints=config.connection.servers,
            jetstream=config.stream,
            limits=BusLimits(config.lease_ms, config.silent_lease_ms, bool(config.stream)),
            max_workers=config.max_workers,
            worker_prefix=config.worker_prefix,
            stale_after_ms=config.stale_after_ms,
            events=config,
            type=config.type,
        )
    return BusSettings(
        name=config.name,
        cursor=config.cursor(),
        endpoints=(config.endpoint,),
        limits=BusLimits(config.lease_ms),
        stale_after_ms=config.stale_after_ms,
        events=config,
        type=config.type,
    )


def _of_source(stream: StreamConfig, cursor: Cursor | None) -> Cursor | None:
    """A cursor that a bus may have left: from now on it is the source's, and the bus does not take it up again."""
    return None if cursor is None else msgspec.structs.replace(cursor, source=stream.source)


def _unwritten(status: StreamStatus, full: str, since_ms: int) -> StreamStatus:
    """A stream of which nothing can be written: what the index says of its worker is as old as that."""
    if status.trust not in (Trust.FRESH, Trust.CATCHING_UP):
        return status
    reason = f"nothing can be written: {full}"
    return msgspec.structs.replace(status, trust=Trust.STALE, reason=reason, since_ms=since_ms)


def _open_backend(config: Config) -> IndexBackend:
    if config.backend == "lmdb":
        backend: IndexBackend = _open_lmdb(config)
    else:
        backend = open_backend(config.backend, Path(config.data_dir), config.backend_options())
    if backend.moved_aside:
        log.error("index_moved_aside", to=str(backend.moved_aside), reason=backend.moved_for)
    if backend.discarded_after_crash:
        log.warning("index_discarded", reason="the machine went down while the index was written without syncing")
    if backend.torn_bytes:
        log.warning(
            "unfinished_write_cut", bytes=backend.torn_bytes, detail="the last commit before a crash, not acknowledged"
        )
    return backend


def _open_lmdb(config: Config) -> LmdbBackend:
    directory = Path(config.data_dir)
    if reason := suspect(directory):
        log.warning("index_suspected", reason=reason, detail="the whole of it is looked at before it is used")
    return LmdbBackend(
        directory,
        durability=config.index.durability,
        map_size=config.index.map_size_bytes,
        rebuild=config.index.on_corrupt is OnCorrupt.REBUILD,
    )


def _shadow_of(config: Config) -> Shadow | None:
    shadow = config.shadow
    if not shadow.backend:
        return None
    opener = partial(open_backend, shadow.backend, Path(shadow.data_dir), shadow.options)
    return Shadow(shadow.backend, opener, shadow.sample_per_s)


def _open_quarantine(config: Config) -> Quarantine | None:
    limits = config.quarantine
    if not limits.max_bytes:
        return None
    return Quarantine(
        Path(config.data_dir), QuarantineLimits(limits.max_bytes, limits.max_age_hours, limits.max_payload_bytes)
    )
