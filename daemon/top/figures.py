"""The figures of `/metrics` that are looked at, taken out of the text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families

_STREAM = (
    *("gaps_total", "missing_messages_total", "unrecovered_messages_total"),
    *("replay_requests_total", "replayed_messages_total", "replay_failures_total"),
    *("restarts_total", "rejections_total", "lag_seconds_sum", "lag_seconds_count"),
)
_BACKEND = (
    *("up", "records", "tier_records", "resident_bytes", "file_bytes", "live_bytes", "limit_bytes", "readers"),
    *("oldest_reader_lag_transactions", "written_bytes_total", "commits_total", "commit_errors_total"),
    *("commit_seconds_bucket", "commit_seconds_sum", "commit_seconds_count"),
)
_SHADOW = ("up", "records", "errors_total", "disagreements_total")
_OTHERS = (
    *("kvcensus_queue_messages", "kvcensus_queue_bytes", "kvcensus_build_info", "kvcensus_bus_messages_total"),
    *("kvcensus_quarantine_entries", "kvcensus_writer_unknown_removals_total"),
    *("process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"),
)
NAMES = (
    *(f"kvcensus_stream_{name}" for name in _STREAM),
    *(f"kvcensus_backend_{name}" for name in _BACKEND),
    *(f"kvcensus_shadow_{name}" for name in _SHADOW),
    *_OTHERS,
)
"""The samples that the daemon is asked for: without them its answer grows with every bucket of every stream."""

Labels = tuple[tuple[str, str], ...]


class Figures:
    """Samples by name and labels."""

    def __init__(self, samples: Mapping[str, Mapping[Labels, float]]) -> None:
        self._samples = samples

    @classmethod
    def parse(cls, text: str) -> Figures:
        """Raises ValueError for what is no exposition of Prometheus."""
        found: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                found.setdefault(sample.name, {})[labels] = float(sample.value)
        return cls(found)

    def value(self, name: str) -> float | None:
        """The sum over every label, None when there is no sample."""
        samples = self._samples.get(name)
        return sum(samples.values()) if samples else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums for each value of a label."""
        found: dict[str, float] = {}
        for labels, number in self._samples.get(name, {}).items():
            value = dict(labels)[label]
            found[value] = found.get(value, 0.0) + number
        return found

    def of_stream(self, name: str, stream: str, label: str) -> dict[str, float]:
        """The samples of one stream for each value of a further label."""
        return {
            given[label]: number for given, number in self._labelled(name) if given["stream"] == stream and number > 0
        }

    def label(self, name: str, label: str) -> str:
        """What a label says where there is one sample, "" where there is none."""
        return next((given[label] for given, _ in self._labelled(name)), "")

    def _labelled(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        return ((dict(labels), number) for labels, number in self._samples.get(name, {}).items())
