"""What happened between two looks at a daemon. Pure.

Counters begin anew: those of a stream with each epoch, those of the process with each start of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..http.bodies import StreamReport
from .figures import Figures
from .sample import Sample

_LAG = "kvcensus_stream_lag_seconds"
_COMMIT = "kvcensus_backend_commit_seconds"


class StreamRates(msgspec.Struct, frozen=True):
    """Of one stream, each second. `lag_s`: mean time from the engine to the commit, None without a message."""

    messages: float
    stored: float
    removed: float
    lag_s: float | None = None


class Rates(msgspec.Struct, frozen=True):
    """Of the daemon, each second. Times are in seconds; percentiles are upper bounds, None when nothing happened.

    `streams` has those that both looks saw. `cpu` is in cores.
    """

    seconds: float
    streams: dict[str, StreamRates]
    messages: float
    stored: float
    removed: float
    lag_s: float | None
    commits: float
    commit_mean_s: float | None
    commit_p50_s: float | None
    commit_p99_s: float | None
    written_bytes: float
    cpu: float


def rates_between(before: Sample, after: Sample) -> Rates | None:
    """None when no time has passed."""
    seconds = after.at_s - before.at_s
    if seconds <= 0:
        return None
    old = before.figures if before.started_s == after.started_s else Figures({})
    new = after.figures
    lag_sums, lag_counts = (_grown_by(old, new, f"{_LAG}_{one}", "stream") for one in ("sum", "count"))
    streams = {
        name: _stream_rates(
            before.streams[name], stream, seconds, _mean(lag_sums.get(name, 0.0), lag_counts.get(name, 0.0))
        )
        for name, stream in after.streams.items()
        if name in before.streams
    }
    commits = _grown(old, new, f"{_COMMIT}_count")
    buckets = _grown_by(old, new, f"{_COMMIT}_bucket", "le")
    return Rates(
        seconds=seconds,
        streams=streams,
        messages=sum(one.messages for one in streams.values()),
        stored=sum(one.stored for one in streams.values()),
        removed=sum(one.removed for one in streams.values()),
        lag_s=_mean(sum(lag_sums.values()), sum(lag_counts.values())),
        commits=commits / seconds,
        commit_mean_s=_mean(_grown(old, new, f"{_COMMIT}_sum"), commits),
        commit_p50_s=quantile(buckets, 0.5),
        commit_p99_s=quantile(buckets, 0.99),
        written_bytes=_grown(old, new, "kvcensus_backend_written_bytes_total") / seconds,
        cpu=_grown(old, new, "process_cpu_seconds_total") / seconds,
    )


def grown(before: float, after: float) -> float:
    """By how much a counter has grown. One that is less than it was has begun anew."""
    return after - before if after >= before else after


def quantile(buckets: Mapping[str, float], share: float) -> float | None:
    """The bound of the bucket of a histogram that the quantile lies in. `buckets` are cumulative, by upper bound.

    Beyond the last bound there is none: infinity. None when there is nothing in them.
    """
    ordered = sorted((float(bound), number) for bound, number in buckets.items())
    if not ordered or not ordered[-1][1]:
        return None
    wanted = share * ordered[-1][1]
    return next(bound for bound, number in ordered if number >= wanted)


def _stream_rates(before: StreamReport, after: StreamReport, seconds: float, lag_s: float | None) -> StreamRates:
    """The counts of a stream are those of its epoch."""
    same = before.epoch == after.epoch

    def rate(old: int, new: int) -> float:
        return (grown(old, new) if same else new) / seconds

    return StreamRates(
        rate(before.messages, after.messages),
        rate(before.blocks_stored, after.blocks_stored),
        rate(before.blocks_removed, after.blocks_removed),
        lag_s,
    )


def _grown(before: Figures, after: Figures, name: str) -> float:
    return grown(before.value(name) or 0.0, after.value(name) or 0.0)


def _grown_by(before: Figures, after: Figures, name: str, label: str) -> dict[str, float]:
    old = before.by(name, label)
    return {value: grown(old.get(value, 0.0), number) for value, number in after.by(name, label).items()}


def _mean(total: float, number: float) -> float | None:
    return total / number if number > 0 else None
