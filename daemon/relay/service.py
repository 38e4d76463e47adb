"""The running relay: engines, spool and bus, wired together and ended by a stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvcensus.backends.model import Cursor

from ..config import Config
from ..counters import HttpCounters
from ..following import stream_of
from ..frame_queue import FrameQueue
from ..logs import get_logger
from ..sources.nats_connection import Backoff, NatsConnector
from ..sources.zmq import ZmqIntake
from ..sources.zmq_sockets import options_of
from ..status import Readiness
from .convention import Address
from .envelopes import Envelopes
from .metrics import install
from .publisher import Publisher, PublisherOptions
from .spool import Spool
from .spooler import SpooledStream, Spooler
from .stream import RelayStream, StreamOptions

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
        self.streams = self._streams(self.spool.cursors())
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
            NatsConnector(relay.connection, "kvcensus relay"),
            Backoff(relay.connection),
            PublisherOptions(relay.publish_window, relay.pipeline, relay.ack_timeout_ms, relay.heartbeat_ms),
        )
        install(self.registry, self)

    def _streams(self, cursors: Mapping[str, Cursor]) -> dict[str, SpooledStream]:
        """The configured streams. The cursors of others stay: should one come back, its epochs go on."""
        return {
            stream.stream: SpooledStream(
                stream_of(source, stream, cursors.get(stream.stream)),
                Address(stream.source, stream.rank, source.model, source.type, source.topic),
            )
            for source, stream in self.config.streams()
        }

    def start(self) -> None:
        """Follow every stream from its cursor, and publish what the spool has."""
        for source, stream in self.config.streams():
            options = options_of(source, stream.endpoint, stream.replay_endpoint)
            self._intake.add(self.streams[stream.stream].followed, options)
        log.info("spool_opened", lineage=self.spool.lineage, waiting=self.spool.waiting, bytes=self.spool.waiting_bytes)
        self.spooler.start()
        self.publisher.start()
        self._intake.start()

    def stop(self, deadline_s: float) -> bool:
        """Receive nothing more, spool what is queued, publish until the deadline. Whether nothing is left then."""
        ends = time.monotonic() + deadline_s
        self._intake.stop()
        self._intake.join(max(0.1, ends - time.monotonic()))
        self._queue.close()
        self.spooler.join(max(0.1, ends - time.monotonic()))
        if self.spooler.is_alive():
            self.spooler.abandon()
            self.spooler.join()
        self.publisher.finish(max(0.1, ends - time.monotonic()))
        self.publisher.join()
        through, published = self.publisher.progress
        if self.spooler.error is None:
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
