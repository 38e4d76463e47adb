"""What Prometheus scrapes is declared once, well formed, complete from the start, and true."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from kvcensus.backends.errors import BackendError
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import TIERS, CacheTier, Holding
from kvcensus.daemon import metrics
from kvcensus.daemon.counters import LAG_BOUNDS_S, DropCause, Histogram
from kvcensus.daemon.status import Readiness, StreamState, Trust
from kvcensus.translators.translation import RejectReason

from .served import View, bus_status, chain, status

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
DECLARED = [metric for _, section in metrics.SECTIONS for metric in section]

Sample = tuple[str, frozenset[tuple[str, str]]]


def _scrape(view: View) -> dict[Sample, float]:
    text = generate_latest(view.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def _value(view: View, name: str, **labels: str) -> float:
    return _scrape(view)[name, frozenset(labels.items())]


def _stream(view: View, name: str, **labels: str) -> float:
    return _value(view, f"kvcensus_stream_{name}", source="a", stream="a/0", **labels)


@pytest.fixture
def view() -> View:
    return View(MemoryBackend(), [status("a/0", rank=0), status("b", state=StreamState.REPLAYING)])


def test_the_reference_page_is_made_of_the_declarations() -> None:
    assert metrics.reference_page() == PAGE.read_text()


def test_every_declared_metric_is_scraped_with_its_labels_and_nothing_else(view: View) -> None:
    scraped: dict[str, set[frozenset[str]]] = {}
    for name, labels in _scrape(view):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        scraped.setdefault(base, set()).add(frozenset(label for label, _ in labels) - {"le"})

    assert {name: labels for name, labels in scraped.items() if not name.startswith("process_")} == {
        metric.name: {frozenset(metric.labels)} for metric in DECLARED
    }
    assert "process_resident_memory_bytes" in scraped


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in DECLARED]
    assert len(set(names)) == len(names)
    for metric in DECLARED:
        assert re.fullmatch(r"kvcensus_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is metrics.Kind.COUNTER)
        assert metric.help.endswith(".")
        assert not re.search(r"_(ms|us|kb|mb)(_|$)", metric.name)
        assert set(metric.labels) <= {
            *("source", "stream", "backend", "tier", "type", "reason", "state", "trust", "version", "python"),
            *("cause", "bus", "question"),
        }


def test_every_value_of_a_closed_label_is_there_from_the_start(view: View) -> None:
    def values(name: str, label: str) -> set[str]:
        return {dict(labels)[label] for sample, labels in _scrape(view) if sample == name}

    assert values("kvcensus_stream_rejections_total", "reason") == set(RejectReason)
    assert values("kvcensus_stream_events_total", "type") == {"stored", "removed", "cleared"}
    assert values("kvcensus_stream_state", "state") == set(StreamState)
    assert values("kvcensus_stream_trust", "trust") == set(Trust)
    assert values("kvcensus_bus_state", "state") == set(StreamState)
    assert values("kvcensus_backend_tier_records", "tier") == set(TIERS)
    assert values("kvcensus_quarantine_dropped_total", "cause") == set(DropCause)
    counters = {name for metric in DECLARED if metric.kind is metrics.Kind.COUNTER for name in [metric.name]}
    assert {value for (name, _), value in _scrape(view).items() if name in counters} == {0.0}


def test_buses_show_their_counters_and_their_status(view: View) -> None:
    view.followed_buses[0].counters.messages = 10
    view.followed_buses[0].shown = bus_status(problem="the stream KV is missing")
    scraped = {name: value for (name, labels), value in _scrape(view).items() if ("bus", "fleet") in labels}
    assert scraped["kvcensus_bus_messages_total"] == 10
    assert scraped["kvcensus_bus_workers"] == 16
    assert scraped["kvcensus_bus_position"] == 99
    assert scraped["kvcensus_bus_failing"] == 1


def test_streams_show_their_counters_and_their_status(view: View) -> None:
    followed = view.counters[0]
    followed.intake.messages = 10
    followed.intake.bytes = 5000
    followed.intake.held = 4
    followed.applied.events["removed"] = 6
    followed.applied.rejections[RejectReason.MEDIUM] = 2

    assert _stream(view, "messages_total") == 10
    assert _stream(view, "received_bytes_total") == 5000
    assert _stream(view, "held_messages") == 4
    assert _stream(view, "events_total", type="removed") == 6
    assert _stream(view, "rejections_total", reason="medium") == 2
    assert _stream(view, "last_sequence_number") == 41
    assert _stream(view, "last_commit_timestamp_seconds") == 1_700_000_000.1
    assert [_stream(view, "state", state=state) for state in StreamState] == [0, 0, 1, 0]
    assert [_stream(view, "trust", trust=trust) for trust in Trust] == [1, 0, 0, 0]
    assert _value(view, "kvcensus_stream_state", source="b", stream="b", state="replaying") == 1


def test_lag_is_a_cumulative_histogram_in_seconds(view: View) -> None:
    for lag_s in (0.0005, 0.001, 0.003, 1000.0):
        view.counters[0].applied.lag_s.observe(lag_s)

    assert _stream(view, "lag_seconds_bucket", le="0.001") == 2
    assert _stream(view, "lag_seconds_bucket", le="0.0025") == 2
    assert _stream(view, "lag_seconds_bucket", le="0.005") == 3
    assert _stream(view, "lag_seconds_bucket", le="300.0") == 3
    assert _stream(view, "lag_seconds_bucket", le="+Inf") == 4
    assert _stream(view, "lag_seconds_count") == 4
    assert _stream(view, "lag_seconds_sum") == pytest.approx(1000.0045)


def test_the_index_shows_what_it_holds(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path / "data")
    view = View(backend)
    backend.apply([chain(0, 3), chain(0, 2, "v", tier=CacheTier.CPU_DRAM)])
    backend.prefix_scan(chain(0, 1).scope, b"")

    def index(name: str, **labels: str) -> float:
        return _value(view, f"kvcensus_backend_{name}", backend="lmdb", **labels)

    assert index("up") == 1
    assert index("records") == 5
    assert index("resident_bytes") == 500
    assert (index("tier_records", tier="hbm"), index("tier_records", tier="cpu_dram")) == (3, 2)
    assert index("puts_total") == 5
    assert index("prefix_scans_total") == 1
    assert index("written_bytes_total") > 0
    assert index("file_bytes") > 4096
    backend.close()


def test_the_writer_and_its_queue_are_shown(view: View) -> None:
    view.writer_counters.commits = 8
    view.writer_counters.commit_s.observe(0.004)
    view.writer_counters.unknown_removals = 5
    view.ready = Readiness(False, ["full"])

    assert _value(view, "kvcensus_backend_commits_total", backend="memory") == 8
    assert _value(view, "kvcensus_backend_commit_seconds_bucket", backend="memory", le="0.005") == 1
    assert _value(view, "kvcensus_backend_commit_seconds_bucket", backend="memory", le="0.0025") == 0
    assert _value(view, "kvcensus_writer_unknown_removals_total") == 5
    assert _value(view, "kvcensus_queue_messages") == 3
    assert _value(view, "kvcensus_queue_bytes") == 4096
    assert _value(view, "kvcensus_queue_limit_messages") == 10
    assert _value(view, "kvcensus_queue_limit_bytes") == 8192
    assert _value(view, "kvcensus_ready") == 0


class _Unreadable(MemoryBackend):
    def holdings(self) -> list[Holding]:
        raise BackendError("the disk is gone")


def test_an_index_that_cannot_be_read_does_not_hide_the_streams() -> None:
    view = View(_Unreadable(), [status("a/0")])
    view.counters[0].intake.messages = 10

    assert _stream(view, "messages_total") == 10
    assert _value(view, "kvcensus_backend_up", backend="memory") == 0
    assert not [name for name, _ in _scrape(view) if name == "kvcensus_backend_records"]


def test_a_stream_that_is_leaving_is_left_out(view: View) -> None:
    view.shown.pop()

    assert {dict(labels).get("stream", "a/0") for _, labels in _scrape(view)} == {"a/0"}


def test_the_openmetrics_form_is_well_formed(view: View) -> None:
    text = generate_openmetrics(view.registry).decode()

    families = {family.name: family.unit for family in parse_openmetrics(text)}
    assert families["kvcensus_stream_lag_seconds"] == "seconds"
    assert families["kvcensus_stream_received_bytes"] == "bytes"
    assert "_created" not in text


def test_promtool_finds_nothing_to_say(view: View) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(view.registry), capture_output=True, timeout=30
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_observing_many_values_is_observing_each() -> None:
    values = [0.0, 0.001, 0.0011, 3.0, 3.0, 1e6]
    one_by_one, together = Histogram(LAG_BOUNDS_S), Histogram(LAG_BOUNDS_S)
    for value in values:
        one_by_one.observe(value)
    together.observe_all(values)
    assert (together.counts, together.total) == (one_by_one.counts, one_by_one.total)
