"""The running relay: engines, spool and bus, wired together and ended by a stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from kvcensus.backends.errors import BackendFull

from ..config import Config, NatsServers, OnHole, SourceConfig, StreamConfig
from ..counters import HttpCounters
from ..following import stream_of
from ..frame_queue import Barrier, FrameQueue
from ..logs import get_logger
from ..sources.nats_connection import Backoff, NatsConnector
from ..sources.zmq import ZmqIntake
from ..sources.zmq_sockets import options_of
from ..status import Readiness
from ..threads import join_if_started
from .convention import Address
from .envelopes import Envelopes
from .metrics import install
from .publisher import Publisher, PublisherOptions, Way
from .spool import Spool
from .spooler import SpooledStream, Spooler
from .stream import RelayStream, StreamOptions

_LOOK_S = 0.2

_Configured = tuple[SourceConfig, StreamConfig]

log = get_logger("relay")


class RelayService:
    """The relay without its HTTP side. One thread starts and stops it; any thread may look at it."""

    def __init__(self, config: Config) -> None:
        """Opens the spool. Raises the errors of `backends.errors`."""
        self.config = config
        relay = config.relay
        self.registry = CollectorRegistry()
        self.http_counters = HttpCounters()
        self.spool = Spool(Path(relay.spool_dir), relay.spool_max_bytes)
        if self.spool.discarded_after_crash:
            log.warning("spool_discarded", reason="the machine went down while it was written without syncing")
        self.streams = self._spooled(config.streams())
        self._secrets = _stamps(relay.connection)
        self._queue = FrameQueue(config.writer.queue_max_messages, config.writer.queue_max_bytes)
        self._intake = ZmqIntake(self._queue)
        self.spooler = Spooler(self.spool, self._queue, self.streams, lambda: self.publisher.wake())
        self.publisher = Publisher(
            self.spool,
            self.spooler,
            self.streams,
            Envelopes(self.spool.lineage, relay.stream, relay.prefix, relay.alive_prefix),
            RelayStream(
                StreamOptions(
                    name=relay.stream,
                    prefix=relay.prefix,
                    create=relay.create_stream,
                    max_age_s=relay.stream_max_age_s,
                    max_bytes=relay.stream_max_bytes,
                    replicas=relay.stream_replicas,
                    duplicates_s=relay.stream_duplicates_s,
                )
            ),
            _way(relay.connection),
            PublisherOptions(relay.publish_window, relay.pipeline, relay.ack_timeout_ms, relay.heartbeat_ms),
        )
        install(self.registry, self)

    def _spooled(self, streams: Iterable[_Configured]) -> dict[str, SpooledStream]:
        """Streams from where the spool has them. The cursors of others stay: should one come back, its epochs go on.

        A hole is a fence, whatever the source says of it: followers would find the number missing.
        """
        cursors = self.spool.cursors()
        return {
            stream.stream: SpooledStream(
                stream_of(replace(source, on_hole=OnHole.FENCE), stream, cursors.get(stream.stream)),
                Address(stream.source, stream.rank, source.model, source.type, source.topic),
            )
            for source, stream in streams
        }

    def _follow(self, source: SourceConfig, stream: StreamConfig) -> None:
        options = options_of(source, stream.endpoint, stream.replay_endpoint)
        self._intake.add(self.streams[stream.stream].followed, options)

    def start(self) -> None:
        """Follow every stream from its cursor, and publish what the spool has."""
        for source, stream in self.config.streams():
            self._follow(source, stream)
        log.info("spool_opened", lineage=self.spool.lineage, waiting=self.spool.waiting, bytes=self.spool.waiting_bytes)
        self.spooler.start()
        self.publisher.start()
        self._intake.start()

    def reload(self, config: Config, ended: Callable[[], bool] = lambda: False) -> list[str]:
        """Follow new sources, let go of removed ones, take changed ones up from where they are; connect anew.

        What the spool has of a removed one is published all the same. A changed stream waits until all that it brought
        is spooled, or the process has `ended`. Returns the keys that changed but need a restart.
        """
        self._reload_streams(config, ended)
        connection = config.relay.connection
        secrets = _stamps(connection)
        if connection != self.config.relay.connection or secrets != self._secrets:
            log.info("connection_changed", servers=connection.servers)
            self._secrets = secrets
            self.publisher.connect_by(_way(connection))
        running = replace(self.config.relay, connection=connection)
        self.config = replace(self.config, sources=config.sources, relay=running)
        needs_restart = [key for key in ("http", "writer", "log") if getattr(config, key) != getattr(self.config, key)]
        return needs_restart + [
            f"relay.{key}" for key in running.__struct_fields__ if getattr(config.relay, key) != getattr(running, key)
        ]

    def _reload_streams(self, config: Config, ended: Callable[[], bool]) -> None:
        before = {stream.stream: (source, stream) for source, stream in self.config.streams()}
        wanted = {stream.stream: (source, stream) for source, stream in config.streams()}
        left = [name for name in before if wanted.get(name) != before[name]]
        for name in left:
            log.info("stream_changed" if name in wanted else "stream_dropped", stream=name)
            self._intake.remove(name, retire=False)
        if left and not self._settle(self.streams[left[0]], ended):
            return
        fresh = [wanted[name] for name in wanted if name in left or name not in before]
        kept = {name: stream for name, stream in self.streams.items() if name not in left}
        self.streams = kept | self._spooled(fresh)
        self.spooler.follow(self.streams)
        self.publisher.follow(self.streams)
        for source, stream in fresh:
            self._follow(source, stream)

    def _settle(self, stream: SpooledStream, ended: Callable[[], bool]) -> bool:
        """Wait until all that was received is spooled. False when the end comes first: a full disk may take long."""
        committed = threading.Event()
        self._intake.barrier(stream.followed, Barrier(committed))
        while not committed.wait(_LOOK_S):
            if ended() or self.failure() is not None:
                return False
        return True

    def stop(self, deadline_s: float) -> bool:
        """Receive nothing more, spool what is queued, publish until the deadline. Whether nothing is left then."""
        ends = time.monotonic() + deadline_s
        self._intake.stop()
        join_if_started(self._intake, max(0.1, ends - time.monotonic()))
        self._queue.close()
        join_if_started(self.spooler, max(0.1, ends - time.monotonic()))
        if self.spooler.is_alive():
            self.spooler.abandon()
            self.spooler.join()
        self.publisher.finish(max(0.1, ends - time.monotonic()))
        join_if_started(self.publisher)
        through, published = self.publisher.progress
        if self.spooler.error is None:
            with suppress(BackendFull):  # What could not be forgotten is published again, and known by its numbers.
                self.spool.commit([], [], through, published.items())
        left = self.spool.waiting
        self.spool.close()
        return not left and self.failure() is None

    def failure(self) -> BaseException | None:
        """Why the relay cannot go on, if it cannot."""
        return self.spooler.error or self.publisher.error or self._intake.error

    def alive(self) -> bool:
        """Whether every thread runs."""
        return self.spooler.is_alive() and self.publisher.is_alive() and self._intake.is_alive()

    def beat_s(self) -> float:
        """When the spooler last was between two steps, by the monotonic clock."""
        return self.spooler.beat_s

    def summary(self) -> str:
        """How it goes, in one line for people."""
        waiting = f"{self.spool.waiting:,} messages wait"
        return "; ".join([f"{len(self.streams)} streams", waiting, *self.readiness().problems[:1]])

    def readiness(self) -> Readiness:
        """Ready is who can spool and publish."""
        problems = []
        if not self.alive():
            problems.append(f"a thread has ended: {self.failure()!r}")
        if self.spooler.full:
            problems.append(f"nothing can be spooled: {self.spooler.full}")
        if self.publisher.problem:
            problems.append(f"nothing can be published: {self.publisher.problem}")
        return Readiness(not problems, problems)


def _way(servers: NatsServers) -> Way:
    return Way(NatsConnector(servers, "kvcensus relay"), Backoff(servers))


def _stamps(servers: NatsServers) -> list[tuple[int, int, int]]:
    """What differs once a file of secrets or certificates was replaced."""
    paths = [getattr(servers, key) for key in servers.__struct_fields__ if key.endswith("_file")]
    found = [os.stat(path) for path in paths if path]
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]
