"""What `kvcensus top` makes of two looks: rates of counters that begin anew, rows, order and words."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.status import Trust
from kvcensus.daemon.top.details import worker_lines
from kvcensus.daemon.top.rates import Rates, grown, quantile, rates_between
from kvcensus.daemon.top.rows import WORKERS, chosen, ordered, stream_rows, worker_rows
from kvcensus.daemon.top.sample import NotUnderstood, Sample
from kvcensus.daemon.top.words import count, duration, size

from .served import status

START = "process_start_time_seconds 1000.0\n"


def sample(at_s: float, streams: dict[str, dict[str, Any]], metrics: str = START) -> Sample:
    """A look at a daemon whose streams are live, unless changed."""
    reports, workers = [], []
    for name, changes in streams.items():
        shown = msgspec.to_builtins(status(name, **changes))
        reports.append({**shown, "age_ms": 5, "lag_s": 0.1, "gaps": 0, "unrecovered_messages": 0})
        told = {key: shown[key] for key in ("worker_id", "rank", "trust", "reason", "since_ms", "last_seq")}
        workers.append({**told, "age_ms": 5, "blocks": 10, "bytes": 0, "holdings": []})
    answers = {
        "/readyz": b'{"ready": true, "problems": []}',
        "/v1/workers": json.dumps({"workers": workers}).encode(),
        "/v1/streams": json.dumps({"streams": reports, "buses": []}).encode(),
        "/metrics": metrics.encode(),
    }
    return Sample.read(at_s, 2000.0, answers)


def between(before: Sample, after: Sample) -> Rates:
    rates = rates_between(before, after)
    assert rates is not None
    return rates


def test_rates_are_what_was_added_each_second() -> None:
    before = sample(10, {"a": {"messages": 100, "blocks_stored": 1000, "blocks_removed": 500}})
    after = sample(14, {"a": {"messages": 140, "blocks_stored": 3000, "blocks_removed": 500}})
    rates = between(before, after)
    assert (rates.messages, rates.stored, rates.removed) == (10, 500, 0)
    assert rates.streams["a"].stored == 500


def test_the_counts_of_a_new_epoch_begin_at_nothing_even_when_they_are_larger() -> None:
    before = sample(10, {"a": {"epoch": 1, "messages": 5}})
    after = sample(12, {"a": {"epoch": 2, "messages": 9}})
    assert between(before, after).messages == 4.5


def test_a_counter_that_is_less_than_it_was_has_begun_anew() -> None:
    assert grown(100, 130) == 30
    assert grown(100, 7) == 7


def test_a_stream_that_only_one_look_saw_has_no_rate() -> None:
    rates = between(sample(10, {}), sample(12, {"a": {"messages": 1_000_000}}))
    assert rates.streams == {}
    assert rates.messages == 0


def test_no_time_gives_no_rates() -> None:
    assert rates_between(sample(10, {}), sample(10, {})) is None


def commits(start: float, *counts: int, total: float) -> str:
    bounds = ("0.001", "0.01", "+Inf")
    lines = [f'kvcensus_backend_commit_seconds_bucket{{le="{le}"}} {number}' for le, number in zip(bounds, counts)]
    lines += [f"kvcensus_backend_commit_seconds_count {counts[-1]}", f"kvcensus_backend_commit_seconds_sum {total}"]
    head = "# TYPE kvcensus_backend_commit_seconds histogram\n"
    return f"process_start_time_seconds {start}\n{head}" + "\n".join(lines) + "\n"


def test_commit_times_are_those_between_the_looks() -> None:
    before = sample(10, {}, commits(1000, 100, 100, 100, total=0.05))
    rates = between(before, sample(12, {}, commits(1000, 160, 190, 200, total=0.25)))
    assert rates.commits == 50
    assert rates.commit_mean_s == pytest.approx(0.002)
    assert (rates.commit_p50_s, rates.commit_p99_s) == (0.001, float("inf"))


def test_a_restarted_daemon_has_committed_all_that_it_counts() -> None:
    before = sample(10, {}, commits(1000, 2, 2, 2, total=0.001))
    rates = between(before, sample(12, {}, commits(1500, 10, 10, 10, total=0.005)))
    assert rates.commits == 5
    assert rates.commit_p99_s == 0.001


def test_nothing_committed_has_no_latency() -> None:
    same = commits(1000, 2, 2, 2, total=0.001)
    rates = between(sample(10, {}, same), sample(12, {}, same))
    assert (rates.commits, rates.commit_mean_s, rates.commit_p50_s) == (0, None, None)
    assert quantile({}, 0.5) is None


def test_rows_are_in_the_order_of_numbers_and_the_worst_comes_first_by_trust() -> None:
    look = sample(10, {"gpu-10": {}, "gpu-2": {"trust": Trust.UNTRUSTED, "reason": "lost 3 messages"}, "gpu-1": {}})
    rows = worker_rows(look, None)
    assert [row.key for row in ordered(rows, WORKERS[0], False)] == ["gpu-1", "gpu-2", "gpu-10"]
    assert [row.key for row in ordered(rows, WORKERS[1], False)] == ["gpu-2", "gpu-1", "gpu-10"]
    assert [row.key for row in chosen(rows, WORKERS, "LOST gpu")] == ["gpu-2"]
    assert chosen(rows, WORKERS, "lost gpu-1") == []


def test_trust_is_told_without_colours_and_with_its_reason() -> None:
    look = sample(10, {"a": {"trust": Trust.UNTRUSTED, "reason": "lost 3 messages"}})
    (row,) = worker_rows(look, None)
    assert WORKERS[1].cell(row) == "✕ untrusted"
    assert "because       lost 3 messages\n" in worker_lines(look, None, "a").plain
    assert worker_lines(look, None, "b").plain == "This worker is gone."


def test_gaps_replays_and_refusals_are_those_of_the_stream() -> None:
    metrics = (
        'kvcensus_stream_gaps_total{source="a",stream="a"} 3.0\n'
        'kvcensus_stream_rejections_total{source="a",stream="a",reason="medium"} 2.0\n'
        'kvcensus_stream_rejections_total{source="a",stream="a",reason="rank"} 1.0\n'
    )
    look = sample(10, {"a": {}, "b": {}}, START + metrics)
    by_name = {row.key: row for row in stream_rows(look, None)}
    assert (by_name["a"].gaps, by_name["a"].rejections) == (3, 3)
    assert (by_name["b"].gaps, by_name["b"].rejections) == (0, 0)
    assert "refused       2 medium, 1 rank\n" in worker_lines(look, None, "a").plain


def test_an_answer_of_something_else_is_told() -> None:
    with pytest.raises(NotUnderstood, match="/readyz: not the answer of a kvcensus"):
        Sample.read(0, 0, {"/readyz": b"<html>", "/v1/workers": b"", "/v1/streams": b"", "/metrics": b""})
    with pytest.raises(NotUnderstood, match="/metrics: not the answer of a kvcensus"):
        sample(0, {}, "no { figures")


@pytest.mark.parametrize(
    ("number", "words"),
    [(None, "-"), (0, "0"), (0.25, "0.2"), (950, "950"), (999.6, "1.00k"), (12_345, "12.3k"), (1_000_000, "1.00M")],
)
def test_counts_take_five_characters(number: float | None, words: str) -> None:
    assert count(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.0021, "2.1 ms"),
        (0.5, "500 ms"),
        (14, "14 s"),
        (135, "2m15s"),
        (11_520, "3h12m"),
        (90_000, "1d01h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_are_in_binary_units() -> None:
    assert [size(amount) for amount in (0, 1023, 1536, 1 << 40)] == ["0 B", "1023 B", "1.5 KiB", "1.0 TiB"]
