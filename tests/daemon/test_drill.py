"""The parts of a drill that decide: the plan of a seed, the comparison with the truth, the lies of a replay socket."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import CacheTier
from kvcensus.daemon.config import (
    Config,
    NatsConfig,
    ShadowConfig,
    SourceConfig,
    SourceType,
    ValkeyConfig,
    load_config,
)
from kvcensus.daemon.drill.faults import ABOUT, Excuse, Fault, UnknownFault, parse_faults
from kvcensus.daemon.drill.lies import lie
from kvcensus.daemon.drill.machine import Link
from kvcensus.daemon.drill.oracle import Outcome, compare, index_of
from kvcensus.daemon.drill.plan import make_plan
from kvcensus.daemon.drill.target import NothingToDrill, drillable, make_target, own_sources, toml_text
from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.simulate.cache import Held
from kvcensus.daemon.simulate.engine import Truth

A, B = (b"a" * 8, 0), (b"b" * 8, 0)
TRUTH = Truth("w", 1, 41, {CacheTier.HBM: {A: 2, B: 1}})


def outcome(index: Held, *excuses: Excuse, **stream: Any) -> Outcome:
    said = {"last_seq": 41, "state": "live", "trust": "fresh", "reason": ""} | stream
    (report,) = compare([TRUTH], {"w": said}, {"w": index}, {"w": set(excuses)})
    return report.outcome


def hbm(**copies: int) -> Held:
    return {CacheTier.HBM: {{"a": A, "b": B, "c": (b"c" * 8, 0)}[name]: count for name, count in copies.items()}}


UNTRUSTED = {"trust": "untrusted", "reason": "messages were missed"}
REFUSED = {"trust": "untrusted", "reason": "message 7 was refused: it is no batch"}


@pytest.mark.parametrize(
    ("index", "excuses", "stream", "expected"),
    [
        (hbm(a=2, b=1), [], {}, Outcome.EQUAL),
        (hbm(a=1, b=1), [], {}, Outcome.DIVERGED),
        (hbm(a=2, b=1, c=1), [], {}, Outcome.DIVERGED),
        ({CacheTier.CPU_DRAM: {A: 2, B: 1}}, [], {}, Outcome.DIVERGED),
        (hbm(a=1), [Excuse.UNTRUSTED], {}, Outcome.DIVERGED),
        (hbm(a=1), [Excuse.UNTRUSTED], UNTRUSTED, Outcome.UNTRUSTED),
        (hbm(a=2, b=1), [], UNTRUSTED, Outcome.DIVERGED),
        (hbm(a=3), [Excuse.UNTRUSTED], UNTRUSTED, Outcome.DIVERGED),
        (hbm(a=3), [Excuse.UNTRUSTED, Excuse.REFUSED], UNTRUSTED, Outcome.UNTRUSTED),
        (hbm(c=1), [Excuse.REFUSED], REFUSED, Outcome.UNTRUSTED),
        (hbm(a=1), [Excuse.UNTRUSTED], REFUSED, Outcome.DIVERGED),
        (hbm(a=1), [Excuse.REFUSED], UNTRUSTED, Outcome.DIVERGED),
        (hbm(a=2, b=1), [], {"last_seq": 40}, Outcome.BEHIND),
        (hbm(a=2, b=1), [], {"state": "replaying"}, Outcome.BEHIND),
    ],
)
def test_a_worker_is_equal_or_excused_and_says_so(
    index: Held, excuses: list[Excuse], stream: dict[str, Any], expected: Outcome
) -> None:
    assert outcome(index, *excuses, **stream) is expected


def test_a_worker_that_keeps_its_blocks_may_claim_too_many_when_it_says_so() -> None:
    said = {"last_seq": 41, "state": "live", **UNTRUSTED}
    (report,) = compare([TRUTH], {"w": said}, {"w": hbm(c=1)}, {"w": {Excuse.UNTRUSTED}}, keeping={"w"})
    assert report.outcome is Outcome.UNTRUSTED


def test_a_worker_that_no_engine_is_diverges() -> None:
    said = {"last_seq": 41, "state": "live", "trust": "fresh", "reason": ""}
    reports = compare([TRUTH], {"w": said}, {"w": hbm(a=2, b=1), "ghost": hbm(a=1)}, {})
    assert [(one.worker_id, one.outcome) for one in reports] == [
        ("w", Outcome.EQUAL),
        ("ghost", Outcome.DIVERGED),
    ]


def test_a_snapshot_is_read_as_a_truth_is_written() -> None:
    rows = [
        {"worker_id": "w", "tier": "hbm", "block_hash": A[0].hex(), "group": 0, "ref_count": 2},
        {"worker_id": "w", "tier": "cpu_dram", "block_hash": A[0].hex(), "group": 1, "ref_count": 1},
    ]
    assert index_of(rows) == {"w": {CacheTier.HBM: {A: 2}, CacheTier.CPU_DRAM: {(A[0], 1): 1}}}


@given(seed=st.integers(), streams=st.integers(1, 5), messages=st.integers(1, 300))
def test_a_plan_publishes_what_was_asked_for_and_is_that_of_its_seed(seed: int, streams: int, messages: int) -> None:
    plan = make_plan(seed, streams, messages, tuple(Fault))
    assert plan == make_plan(seed, streams, messages, tuple(Fault))
    published = [0] * streams
    for step in plan.steps:
        assert 0 <= step.stream < streams
        if step.fault is None:
            published[step.stream] += step.count
        elif ABOUT[step.fault].lasts:
            assert step.steps > 0
    assert published == [messages] * streams


def test_only_the_faults_asked_for_are_planned() -> None:
    plan = make_plan(1, 2, 1000, parse_faults("drop, kill"))
    assert {step.fault for step in plan.steps} == {None, Fault.DROP, Fault.KILL}


def test_an_unknown_fault_is_named_beside_those_that_exist() -> None:
    with pytest.raises(UnknownFault, match=r"'explode'.*kill, term"):
        parse_faults("kill,explode")


def message(seq: int) -> RecordedMessage:
    return RecordedMessage(seq, (b"", seq.to_bytes(8, "big"), b"\x93\xcb" + bytes(8) + b"events"))


RING = [message(seq) for seq in range(10, 20)]


def numbers(fault: Fault, start: int) -> list[int]:
    return [int.from_bytes(frames[1], "big") for frames in lie(fault, Random(0))(start, RING)]


END = (1 << 64) - 1


def test_what_each_lie_tells() -> None:
    honest = [15, 16, 17, 18, 19]
    assert numbers(Fault.EARLY, 15) == [*range(10, 20), END]
    assert numbers(Fault.FORGE, 15) == [*honest, END]
    assert numbers(Fault.NO_END, 15) == honest
    assert numbers(Fault.FUTURE, 15)[-2] > 1000
    assert numbers(Fault.LATE, 15)[0] > 15
    holes = lie(Fault.HOLES, Random(0))
    assert 1 < len(list(holes(15, RING))) < 6
    assert len(list(holes(15, RING))) == 6


def test_a_forged_message_has_another_time_and_the_same_events() -> None:
    first, *others = lie(Fault.FORGE, Random(0))(15, RING)
    assert first[2] != RING[5].payload
    assert first[2][10:] == RING[5].payload[10:]
    assert others[0][2] == RING[6].payload


def test_the_configuration_written_is_the_one_that_is_read(tmp_path: Path) -> None:
    source = SourceConfig(endpoint="tcp://h:1", name="ab", media={"tape": CacheTier.LOCAL_SSD})
    config = Config(data_dir='with "quotes" \\ and é', sources=(source, SourceConfig(endpoint="ipc:///x", name="c")))
    path = tmp_path / "kvcensus.toml"
    path.write_text(toml_text(config))
    assert load_config(path, {}) == config


def test_a_drill_stays_away_from_every_real_index(tmp_path: Path) -> None:
    """What a shadow finds in its directory it replaces, and a namespace on a server may be the fleet's."""
    real = ValkeyConfig(servers=("db:6379",), namespace="fleet", part="a")
    shadow = ShadowConfig("valkey", "/var/lib/shadow", options={"servers": ["db:6379"], "namespace": "fleet"})
    for base in (
        Config(data_dir="/var/lib/kvcensus", backend="valkey", valkey=real),
        Config(data_dir="/var/lib/kvcensus", valkey=real, shadow=shadow),
        Config(data_dir="/var/lib/kvcensus", shadow=ShadowConfig("filesystem", "/var/lib/shadow")),
    ):
        target = make_target(base, 1, tmp_path, None, Link())
        for engine in target.engines:
            engine.stop()
        text = toml_text(target.config)
        assert "/var/lib" not in text
        assert '"fleet"' not in text
        assert target.config.shadow.backend == base.shadow.backend


def test_buses_are_left_out_by_name_and_nothing_else_stands_in_for_them() -> None:
    source = SourceConfig(endpoint="tcp://h:1", name="engine")
    dynamo = SourceConfig(endpoint="tcp://h:2", name="dynamo", type=SourceType.DYNAMO)
    bus = NatsConfig(name="fleet", type=SourceType.VLLM)
    base, left_out = drillable(Config(sources=(source, dynamo), nats=(bus,)))
    assert (base.sources, base.nats) == ((source,), ())
    assert [sentence.split()[0] for sentence in left_out] == ["dynamo", "fleet"]
    with pytest.raises(NothingToDrill):
        drillable(Config(nats=(bus,)))


def test_every_seed_has_engines_that_can_be_simulated() -> None:
    types = {source.type for seed in range(50) for source in own_sources(seed)}
    assert types == {SourceType.VLLM, SourceType.SGLANG}
