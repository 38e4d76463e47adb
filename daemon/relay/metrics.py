"""What Prometheus scrapes of a relay. Declared as in `daemon.metrics`; docs/reference/relay.md lists them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, disable_created_metrics
from prometheus_client.registry import Collector

from ..counters import IntakeCounters
from ..followed import now_ms
from ..metrics import BUILD_INFO, HTTP_METRICS, STREAM_METRICS, DaemonFigures, Declared, Kind, _sampled
from ..status import StreamState, StreamStatus
from .counters import PublisherCounters, SpoolerCounters, StreamSpoolCounters
from .record import Position

if TYPE_CHECKING:
    from .service import RelayService

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_NOT_OF_A_RELAY = ("applied.", "trusts", "committed_s", "engine_s")


class StreamFigures(msgspec.Struct):
    """All there is to read of one stream. `published` is the last acknowledged position."""

    intake: IntakeCounters
    status: StreamStatus
    spool: StreamSpoolCounters
    published: Position

    @property
    def states(self) -> dict[str, float]:
        return {state: float(state is self.status.state) for state in StreamState}


class RelayFigures(msgspec.Struct):
    """What belongs to the relay as a whole."""

    spooler: SpoolerCounters
    publisher: PublisherCounters
    records: int
    bytes: int
    limit_bytes: int
    oldest_s: float
    ready: bool


def _stream(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_relay_stream_{name}", path, help_, ("source", "stream", *label))


def _relay(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_relay_{name}", path, help_, label)


# fmt: off
RECEIVED_METRICS = tuple(one for one in STREAM_METRICS if not one.path.startswith(_NOT_OF_A_RELAY))
RELAYED_METRICS = (
    _stream(_C, "spooled_messages_total", "spool.spooled", "Messages written to the spool."),
    _stream(_C, "acknowledged_records_total", "spool.acknowledged",
            "Records, control records included, that the bus has."),
    _stream(_C, "dropped_messages_total", "spool.dropped",
            "Messages that were never published, by cause; the worker is fenced.", "cause"),
    _stream(_C, "overtaken_records_total", "spool.overtaken",
            "Records that the server took before one that it lost: followers may see a gap."),
    _stream(_G, "published_epoch", "published.epoch", "Epoch of the last acknowledged record."),
    _stream(_G, "published_sequence_number", "published.seq", "Its sequence number, -1 before the first of an epoch."),
)
RELAY_METRICS = (
    _relay(_G, "spool_records", "records", "Records that wait for their acknowledgement."),
    _relay(_G, "spool_bytes", "bytes", "What they take in the file."),
    _relay(_G, "spool_limit_bytes", "limit_bytes", "What they may take before the oldest are dropped."),
    _relay(_G, "spool_oldest_age_seconds", "oldest_s", "Age of the oldest one, 0 for none."),
    _relay(_C, "spool_commits_total", "spooler.commits", "Transactions of the spool."),
    _relay(_C, "spool_commit_errors_total", "spooler.commit_errors", "Transactions that found no room."),
    _relay(_H, "spool_commit_seconds", "spooler.commit_s", "Time of a transaction."),
    _relay(_C, "sent_records_total", "publisher.sent", "Records published, each time that they were."),
    _relay(_C, "republished_records_total", "publisher.republished", "Records published again."),
    _relay(_C, "acknowledged_records_total", "publisher.acknowledged", "Records that the server has acknowledged."),
    _relay(_C, "duplicate_acknowledgements_total", "publisher.duplicates",
           "Acknowledgements of records that the server had already."),
    _relay(_C, "publish_failures_total", "publisher.failures",
           "Times that records had to be published again, by cause.", "cause"),
    _relay(_H, "publish_delay_seconds", "publisher.delay_s", "Time from the spool to the acknowledgement."),
    _relay(_G, "connected", "publisher.connected", "1 while there is a connection to a server."),
    _relay(_C, "connections_total", "publisher.connections", "Connections made."),
    _relay(_C, "heartbeats_total", "publisher.beats", "Signs of life sent."),
    _relay(_G, "ready", "ready", "1 when /readyz says yes."),
)
# fmt: on


def install(registry: CollectorRegistry, service: RelayService) -> None:
    """Register the relay's metrics, and those of the process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry.register(RelayCollector(service))
    ProcessCollector(registry=registry)


class RelayCollector(Collector):
    """Reads a relay when it is scraped."""

    def __init__(self, service: RelayService) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Every metric, without samples."""
        for metric in (*RECEIVED_METRICS, *RELAYED_METRICS, *RELAY_METRICS, *HTTP_METRICS, BUILD_INFO):
            yield metric.family()

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        service = self._service
        streams = list(_stream_figures(service))
        yield from (_sampled(metric, streams) for metric in (*RECEIVED_METRICS, *RELAYED_METRICS))
        relay = _relay_figures(service)
        yield from (_sampled(metric, [((), relay)]) for metric in RELAY_METRICS)
        yield from (_sampled(metric, [((), service.http_counters)]) for metric in HTTP_METRICS)
        build = ((version("kvcensus"), platform.python_version()), DaemonFigures(0, 0, 0, 0, relay.ready, False))
        yield _sampled(BUILD_INFO, [build])


def _stream_figures(service: RelayService) -> Iterator[tuple[tuple[str, ...], StreamFigures]]:
    _, published = service.publisher.progress
    for name, stream in service.streams.items():
        followed = stream.followed
        position = published.get(name, Position(0, -1))
        yield (followed.source, name), StreamFigures(followed.intake, followed.status(), stream.counters, position)


def _relay_figures(service: RelayService) -> RelayFigures:
    oldest_ms = service.spool.oldest_at_ms()
    return RelayFigures(
        service.spooler.counters,
        service.publisher.counters,
        service.spool.waiting,
        service.spool.waiting_bytes,
        service.config.relay.spool_max_bytes,
        max(0, now_ms() - oldest_ms) / 1000 if oldest_ms else 0.0,
        service.readiness().ready,
    )


def reference_table() -> str:
    """The metrics that only a relay has, as docs/reference/relay.md shows them."""
    rows = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    for metric in (*RELAYED_METRICS, *RELAY_METRICS):
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)
