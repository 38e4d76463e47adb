"""What Prometheus scrapes. Every metric is declared once, with its source; the reference page is made of that.

Nothing is counted here: the figures are those of `counters`, of the streams' statuses and of the backend, read when
scraped. Every value of a label is there from the start, at zero. Labels are bounded by the configuration or closed
sets.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from itertools import accumulate
from operator import attrgetter

import msgspec
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, disable_created_metrics
from prometheus_client.registry import Collector

from kvcensus.backends.errors import BackendError
from kvcensus.backends.model import TIERS, IndexMetrics, StoreHealth

from .counters import AppliedCounters, BusCounters, Histogram, IntakeCounters
from .status import BusStatus, DaemonView, StreamState, StreamStatus, Trust


class Kind(StrEnum):
    """The types of the exposition format that are used here."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Declared:
    """One metric.

    `path` says where its value is in the figures that it is read from. The value is a number, a `Histogram`, or a
    number for each value of the last label. The unit is the end of the name.
    """

    kind: Kind
    name: str
    path: str
    help: str
    labels: tuple[str, ...] = ()

    def read(self, figures: object) -> float | Histogram | Mapping[str, float]:
        """The value, out of the figures it is declared for."""
        return attrgetter(self.path)(figures)  # type: ignore[no-any-return]

    def family(self) -> Metric:
        """The metric without samples."""
        base = self.name.removesuffix("_total")
        unit = next((unit for unit in ("seconds", "bytes") if base.endswith(f"_{unit}")), "")
        return Metric(base, self.help, self.kind, unit)


class StreamFigures(msgspec.Struct):
    """All there is to read of one stream."""

    intake: IntakeCounters
    applied: AppliedCounters
    status: StreamStatus

    @property
    def committed_s(self) -> float:
        return self.status.committed_ms / 1000

    @property
    def engine_s(self) -> float:
        return self.status.engine_ms / 1000

    @property
    def states(self) -> dict[str, float]:
        return {state: float(state is self.status.state) for state in StreamState}

    @property
    def trusts(self) -> dict[str, float]:
        return {trust: float(trust is self.status.trust) for trust in Trust}


class BusReading(msgspec.Struct):
    """All there is to read of one bus."""

    counters: BusCounters
    status: BusStatus

    @property
    def states(self) -> dict[str, float]:
        return {state: float(state is self.status.state) for state in StreamState}

    @property
    def failing(self) -> bool:
        return bool(self.status.problem)


class IndexFigures(msgspec.Struct):
    """All there is to read of the index."""

    metrics: IndexMetrics
    stored_bytes: int
    health: StoreHealth
    tier_records: dict[str, float]
    began_anew: bool

    @property
    def untidy(self) -> bool:
        return bool(self.health.problem)


class DaemonFigures(msgspec.Struct):
    """What belongs to the daemon as a whole."""

    queued_messages: int
    queued_bytes: int
    queue_max_messages: int
    queue_max_bytes: int
    ready: bool
    index_up: bool
    build: int = 1


def _stream(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_stream_{name}", path, help_, ("source", "stream", *label))


def _backend(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_backend_{name}", path, help_, ("backend", *label))


def _bus(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_bus_{name}", path, help_, ("bus", *label))


def _shadow(kind: Kind, name: str, path: str, help_: str, *label: str) -> Declared:
    return Declared(kind, f"kvcensus_shadow_{name}", path, help_, ("backend", *label))


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

# fmt: off
STREAM_METRICS = (
    _stream(_C, "messages_total", "intake.messages", "Messages received."),
    _stream(_C, "received_bytes_total", "intake.bytes", "Bytes of the messages received."),
    _stream(_C, "malformed_messages_total", "intake.malformed",
            "Messages that are not a topic, a sequence number and a payload."),
    _stream(_C, "duplicates_total", "intake.duplicates", "Messages dropped because their number was applied before."),
    _stream(_C, "gaps_total", "intake.gaps", "Times that sequence numbers were missing."),
    _stream(_C, "missing_messages_total", "intake.missing", "Sequence numbers missing when a gap was seen."),
    _stream(_C, "replayed_messages_total", "intake.replayed", "Messages that a replay brought."),
    _stream(_C, "unrecovered_messages_total", "intake.unrecovered",
            "Sequence numbers given up after every replay attempt."),
    _stream(_C, "restarts_total", "intake.restarts", "Restarts of the engine that were noticed."),
    _stream(_C, "replay_requests_total", "intake.replay_requests", "Replays asked for."),
    _stream(_C, "replay_failures_total", "intake.replay_failures", "Replays that did not end in time."),
    _stream(_G, "held_messages", "intake.held", "Live messages held back while a replay runs."),
    _stream(_C, "held_dropped_messages_total", "intake.held_dropped", "Live messages dropped: too many were held."),
    _stream(_G, "connected", "intake.connected", "1 while the transport is connected to the engine."),
    _stream(_G, "silent", "status.silent", "1 when the source has never delivered anything, although it had the time."),
    _stream(_C, "disconnects_total", "intake.disconnects", "Times that the transport lost the engine."),
    _stream(_C, "handshake_failures_total", "intake.handshake_failures",
            "Connections that failed in the handshake: keys that do not fit, or no ZMTP."),
    _stream(_C, "applied_messages_total", "applied.messages", "Messages applied to the index."),
    _stream(_C, "events_total", "applied.events", "Events applied, by type.", "type"),
    _stream(_C, "blocks_stored_total", "applied.blocks_stored", "Blocks that applied events stored."),
    _stream(_C, "blocks_removed_total", "applied.blocks_removed", "Blocks that applied events removed."),
    _stream(_C, "rejections_total", "applied.rejections", "Payloads and events refused, by reason.", "reason"),
    _stream(_H, "lag_seconds", "applied.lag_s", "Time from the engine's timestamp of a message to its commit."),
    _stream(_G, "last_sequence_number", "status.last_seq",
            "Last committed sequence number, -1 before the first of an epoch."),
    _stream(_G, "epoch", "status.epoch", "The life of the engine that is followed; a restart begins a new one."),
    _stream(_G, "last_commit_timestamp_seconds", "committed_s", "When a message was last committed, 0 for never."),
    _stream(_G, "last_event_timestamp_seconds", "engine_s",
            "The engine's timestamp of the last committed message, 0 for none."),
    _stream(_G, "state", "states", "1 for the state that the stream is in.", "state"),
    _stream(_G, "trust", "trusts", "1 for how far the worker's blocks can be believed.", "trust"),
)

BUS_METRICS = (
    _bus(_C, "messages_total", "counters.messages", "Messages received."),
    _bus(_C, "received_bytes_total", "counters.bytes", "Bytes of the messages received."),
    _bus(_C, "disconnects_total", "counters.disconnects", "Times that the connection was lost."),
    _bus(_C, "dropped_messages_total", "counters.dropped",
         "Messages that the client dropped since too many were waiting, as far as it says."),
    _bus(_C, "refused_messages_total", "status.refused", "Messages of workers that are not followed."),
    _bus(_G, "workers", "status.workers", "Workers that the bus has brought."),
    _bus(_G, "position", "status.position", "Last committed sequence number of the JetStream stream, -1 for none."),
    _bus(_G, "pending_messages", "status.pending", "Messages that wait: in the JetStream stream, or in the client."),
    _bus(_G, "failing", "failing", "1 while something keeps messages from coming; /readyz says what."),
    _bus(_G, "state", "states", "1 for the state that the bus is in.", "state"),
)

INDEX_METRICS = (
    _backend(_G, "records", "metrics.resident_blocks", "Records in the index."),
    _backend(_G, "tier_records", "tier_records", "Records in the index, by tier.", "tier"),
    _backend(_G, "resident_bytes", "metrics.resident_bytes",
             "Bytes of the blocks in the index, as far as their size is known."),
    _backend(_G, "file_bytes", "stored_bytes", "Bytes that the index occupies on disk."),
    _backend(_G, "live_bytes", "health.live_bytes",
             "Bytes of the file that are in use; the rest of it is free to be used again."),
    _backend(_G, "limit_bytes", "health.limit_bytes", "Bytes that the file can grow to; 0 for no file."),
    _backend(_G, "readers", "health.readers", "Readers of the file, in this process and in others."),
    _backend(_G, "oldest_reader_lag_transactions", "health.oldest_reader_lag",
             "Transactions since the oldest state that somebody still reads; it keeps every page freed since."),
    _backend(_G, "untidy", "untidy", "1 while the files cannot be made smaller and grow; the log says why."),
    _backend(_G, "began_anew", "began_anew",
             "1 when this start found an index that was damaged or not to be believed, and began without it."),
    _backend(_C, "puts_total", "metrics.puts", "Copies stored or refreshed since the index was opened."),
    _backend(_C, "removes_total", "metrics.removes", "Copies removed since the index was opened."),
    _backend(_C, "prefix_scans_total", "metrics.prefix_scans",
             "Look-ups of the children of a block since the index was opened."),
    _backend(_C, "written_bytes_total", "metrics.bytes_written",
             "Bytes of keys and values handed to the store, not what reached a disk."),
)

COMMIT_METRICS = (
    _backend(_C, "commits_total", "commits", "Transactions committed."),
    _backend(_C, "commit_errors_total", "commit_errors", "Transactions that failed."),
    _backend(_H, "commit_seconds", "commit_s", "Time to apply and commit a transaction."),
)

WRITER_METRICS = (
    Declared(_C, "kvcensus_writer_blocks_stored_total", "blocks_stored", "Records that stores created."),
    Declared(_C, "kvcensus_writer_copies_added_total", "copies_added", "Copies that stores added to existing records."),
    Declared(_C, "kvcensus_writer_blocks_refreshed_total", "refreshed", "Records that stores only refreshed."),
    Declared(_C, "kvcensus_writer_blocks_removed_total", "blocks_removed", "Records that removals ended."),
    Declared(_C, "kvcensus_writer_copies_removed_total", "copies_removed", "Copies that removals took."),
    Declared(_C, "kvcensus_writer_unknown_removals_total", "unknown_removals",
             "Removals of blocks that the worker was not known to hold."),
    Declared(_C, "kvcensus_writer_blocks_cleared_total", "blocks_cleared", "Records dropped as a worker was cleared."),
)

SHADOW_METRICS = (
    _shadow(_G, "up", "following", "1 while the shadow is driven; at 0 it is broken, and the log has the reason."),
    _shadow(_G, "records", "records", "Records in the shadow."),
    _shadow(_C, "commits_total", "commits", "Transactions applied to the shadow."),
    _shadow(_H, "commit_seconds", "commit_s", "Time that the writer took to apply one to the shadow."),
    _shadow(_C, "errors_total", "errors", "Times that the shadow failed; it is given up with the first."),
    _shadow(_C, "questions_total", "questions", "Questions put to the index and to the shadow.", "question"),
    _shadow(_C, "disagreements_total", "disagreements",
            "Questions that they answered differently; the log has the key.", "question"),
)

QUARANTINE_METRICS = (
    Declared(_G, "kvcensus_quarantine_entries", "entries", "Refused frames and events that are kept."),
    Declared(_G, "kvcensus_quarantine_bytes", "bytes", "Bytes that they count for in quarantine.max_bytes."),
    Declared(_C, "kvcensus_quarantine_added_total", "added", "Refused frames and events that were put there."),
    Declared(_C, "kvcensus_quarantine_dropped_total", "dropped",
             "Those dropped because of a limit, or because the file could not be written.", ("cause",)),
    Declared(_C, "kvcensus_quarantine_errors_total", "errors", "Times that the file could not be written."),
)

HTTP_METRICS = (
    Declared(_C, "kvcensus_http_refused_total", "refused",
             "Requests and connections turned away: no token, too slow, idle as others came, beyond the limit.",
             ("reason",)),
)

DAEMON_METRICS = (
    Declared(_G, "kvcensus_queue_messages", "queued_messages", "Messages waiting for the writer."),
    Declared(_G, "kvcensus_queue_bytes", "queued_bytes", "Bytes of the messages waiting for the writer."),
    Declared(_G, "kvcensus_queue_limit_messages", "queue_max_messages",
             "Waiting messages at which the sources stop reading."),
    Declared(_G, "kvcensus_queue_limit_bytes", "queue_max_bytes", "Waiting bytes at which they do."),
    Declared(_G, "kvcensus_ready", "ready", "1 while /readyz says yes."),
)

BACKEND_UP = _backend(_G, "up", "index_up", "1 while the index can be read; at 0 its records and bytes are missing.")
BUILD_INFO = Declared(_G, "kvcensus_build_info", "build", "1, with the versions in use.", ("version", "python"))
# fmt: on

SECTIONS = (
    ("Streams", STREAM_METRICS),
    ("Buses", BUS_METRICS),
    ("Index", (BACKEND_UP, *INDEX_METRICS, *COMMIT_METRICS)),
    ("Writer", (*WRITER_METRICS, *DAEMON_METRICS)),
    ("Shadow", SHADOW_METRICS),
    ("Quarantine", QUARANTINE_METRICS),
    ("HTTP", HTTP_METRICS),
    ("Build", (BUILD_INFO,)),
)


def install(registry: CollectorRegistry, view: DaemonView) -> None:
    """Register the daemon's metrics, and those of the process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry.register(DaemonCollector(view))
    ProcessCollector(registry=registry)


class DaemonCollector(Collector):
    """Reads a daemon when it is scraped."""

    def __init__(self, view: DaemonView) -> None:
        self._view = view

    def describe(self) -> Iterator[Metric]:
        """Every metric, without samples."""
        for _, metrics in SECTIONS:
            for metric in metrics:
                yield metric.family()

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        view = self._view
        backend = (view.backend.name(),)
        streams = _stream_figures(view)
        yield from (_sampled(metric, streams) for metric in STREAM_METRICS)
        buses: list[Labelled] = [((one.status().bus,), BusReading(one.counters, one.status())) for one in view.buses()]
        yield from (_sampled(metric, buses) for metric in BUS_METRICS)
        index = _index_figures(view)
        if index is not None:
            yield from (_sampled(metric, [(backend, index)]) for metric in INDEX_METRICS)
        yield from (_sampled(metric, [(backend, view.writer_counters)]) for metric in COMMIT_METRICS)
        yield from (_sampled(metric, [((), view.writer_counters)]) for metric in WRITER_METRICS)
        shadow = view.shadow_counters
        shadows: list[Labelled] = [] if shadow is None else [((shadow.backend,), shadow)]
        yield from (_sampled(metric, shadows) for metric in SHADOW_METRICS)
        yield from (_sampled(metric, [((), view.quarantine_counters)]) for metric in QUARANTINE_METRICS)
        yield from (_sampled(metric, [((), view.http_counters)]) for metric in HTTP_METRICS)
        daemon = DaemonFigures(*view.queue_depth(), *view.queue_limits(), view.readiness().ready, index is not None)
        yield from (_sampled(metric, [((), daemon)]) for metric in DAEMON_METRICS)
        yield _sampled(BACKEND_UP, [(backend, daemon)])
        yield _sampled(BUILD_INFO, [((version("kvcensus"), platform.python_version()), daemon)])


Labelled = tuple[tuple[str, ...], object]


def _stream_figures(view: DaemonView) -> list[Labelled]:
    statuses = {status.stream: status for status in view.statuses()}
    return [
        ((count.source, count.stream), StreamFigures(count.intake, count.applied, statuses[count.stream]))
        for count in view.stream_counters()
        if count.stream in statuses
    ]


def _index_figures(view: DaemonView) -> IndexFigures | None:
    backend = view.backend
    tier_records: dict[str, float] = dict.fromkeys(TIERS, 0)
    try:
        for holding in backend.holdings():
            tier_records[holding.tier] += holding.blocks
        began_anew = backend.moved_aside is not None or backend.discarded_after_crash
        return IndexFigures(backend.metrics(), backend.stored_bytes(), backend.health(), tier_records, began_anew)
    except (BackendError, OSError):
        return None


def _sampled(metric: Declared, sources: Iterable[Labelled]) -> Metric:
    family = metric.family()
    for values, figures in sources:
        labels = dict(zip(metric.labels, values))
        value = metric.read(figures)
        if isinstance(value, Histogram):
            _add_histogram(family, labels, value)
        elif isinstance(value, Mapping):
            for label, number in value.items():
                family.add_sample(metric.name, {**labels, metric.labels[-1]: label}, number)
        else:
            family.add_sample(metric.name, labels, value)
    return family


def _add_histogram(family: Metric, labels: dict[str, str], histogram: Histogram) -> None:
    """The counts are copied first: their writer does not stop for us."""
    counts = list(accumulate(histogram.counts.copy()))
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
    family.add_sample(f"{family.name}_count", labels, counts[-1])
    family.add_sample(f"{family.name}_sum", labels, histogram.total)


_PAGE_HEAD = """# Metrics

`GET /metrics`, in the Prometheus text format. Counters count since the daemon started. `source` and `bus` are those of
the configuration, `stream` is NAME or NAME/RANK, `backend` the name of the backend. The other labels have closed sets
of values, which are all there from the start. The usual `process_*` metrics are there as well.

This page is made by `python -m kvcensus.daemon.metrics > docs/reference/metrics.md`.
"""


def reference_page() -> str:
    """docs/reference/metrics.md, from the declarations."""
    parts = [_PAGE_HEAD]
    for title, metrics in SECTIONS:
        parts.append(f"\n## {title}\n\n| name | type | labels | meaning |\n|---|---|---|---|\n")
        for metric in metrics:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            parts.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
