"""What is made of the messages of a probe, and how it is said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.daemon.config import NatsConfig, NatsServers, SourceConfig, SourceType
from kvcensus.daemon.probe.bus_look import BusLook
from kvcensus.daemon.probe.findings import MOST_SHOWN, BusFinding, JetStream, ProbeFindings, Replay, StreamFinding
from kvcensus.daemon.probe.stream_look import LOOKED_AT_MAX, StreamLook
from kvcensus.daemon.probe.words import bus_block, releases, report, stream_block
from kvcensus.daemon.relay.convention import Address, address_headers, numbered, subject_of
from kvcensus.daemon.streams.delivery import Control

from ..captures_reader import load_capture
from ..dynamo_captures import messages_of
from ..translators import sglang_families, wire_families

NOW_MS = 1_700_000_000_000
MAPS = wire_families.MAPS


def looking(kind: str = "vllm", rank: int | None = None) -> StreamLook:
    source = SourceConfig(endpoint="tcp://e:1", name="e", type=SourceType(kind))
    return StreamLook(StreamFinding("e", kind, source.endpoint, False, publishers=1, seconds=5), source, rank)


def frames(seq: int, payload: bytes, topic: bytes = b"") -> list[bytes]:
    return [topic, seq.to_bytes(8, "big"), payload]


def batch(seconds: float = NOW_MS / 1000, rank: int | None = 0, **fields: object) -> bytes:
    return MAPS.batch([wire_families.stored((1 << 63,), group_idx=0, **fields)], seconds, rank)


def found_in(*messages: list[bytes], kind: str = "vllm", rank: int | None = None) -> StreamFinding:
    look = looking(kind, rank)
    for one in messages:
        look.live(one, NOW_MS)
    return look.finish()


def test_numbers_that_are_missing_and_that_go_backwards_are_counted() -> None:
    found = found_in(*(frames(seq, batch()) for seq in (4, 5, 8, 0)))
    assert found.numbers is not None
    assert (found.numbers.first, found.numbers.last, found.numbers.missing, found.numbers.backwards) == (4, 0, 2, 1)
    assert any("2 messages were lost" in one for one in found.warnings)
    assert any("the engine restarted" in one for one in found.warnings)


def test_events_of_another_engine_than_configured_are_a_warning() -> None:
    payload = sglang_families.MAPS.batch([sglang_families.stored((-5,))], NOW_MS / 1000)
    assert found_in(frames(0, payload), kind="sglang").warnings == []
    (warning,) = found_in(frames(0, payload)).warnings
    assert warning == 'the events are those of sglang, and type is "vllm": set type = "sglang"'


def test_events_that_may_be_of_either_engine_are_no_warning() -> None:
    payload = wire_families.FAMILIES[2].batch([wire_families.stored((5,))], NOW_MS / 1000)
    for kind in ("vllm", "sglang"):
        found = found_in(frames(0, payload), kind=kind)
        assert found.payloads.fits is True
        assert found.warnings == []
        assert releases(found.payloads.releases) == "vLLM 0.10.2 to 0.13.0 or SGLang 0.5.9 to 0.5.19"


def test_releases_of_sglang_that_look_like_a_broken_one_are_named() -> None:
    payload = sglang_families.WITHOUT_MEDIUM.batch([sglang_families.stored((-5,))], NOW_MS / 1000)
    (warning,) = found_in(frames(0, payload), kind="sglang").warnings
    assert "make sure that this is 0.5.7 or later" in warning


def test_what_would_be_refused_is_shown() -> None:
    found = found_in(
        frames(0, batch(medium="TAPE")), frames(1, b"\xc1"), frames(2, msgspec.msgpack.encode(["LoadStat", 1]))
    )
    assert found.payloads.refused_events == 3
    assert found.payloads.refused[0].startswith("medium: the medium 'TAPE'")
    assert "no msgpack batch" in found.payloads.refused[1]
    assert "load statistics of SGLang" in found.payloads.refused[2]


def test_ranks_that_do_not_fit_the_stream_are_a_warning() -> None:
    assert found_in(frames(0, batch(rank=3)), rank=3).warnings == []
    assert "messages of rank 1 on the stream of rank 3" in found_in(frames(0, batch(rank=1)), rank=3).warnings[0]
    several = found_in(frames(0, batch(rank=0)), frames(1, batch(rank=1)))
    assert "messages of rank 1 on the stream of rank 0" in several.warnings[0]


@pytest.mark.parametrize(
    ("late_s", "said"), [(0.0, "the same as ours"), (0.3, "300 ms behind ours"), (-90, "90 s ahead")]
)
def test_the_clock_is_that_of_the_message_that_took_the_shortest(late_s: float, said: str) -> None:
    late = frames(0, batch(NOW_MS / 1000 - late_s - 5 if late_s >= 0 else NOW_MS / 1000))
    found = found_in(late, frames(1, batch(NOW_MS / 1000 - late_s)))
    assert said in stream_block(found)
    assert any("clocks differ" in one for one in found.warnings) is (abs(late_s) > 1)


def test_a_message_of_the_replay_socket_tells_the_form_and_not_the_clock() -> None:
    look = looking()
    look.replayed(load_capture("vllm-0.32.0-basic").messages[0].payload)
    look.finding.replay = Replay("tcp://e:2", reached=True, answered_ms=3, topic=True, oldest=0, newest=7)
    found = look.finish()
    assert found.payloads.behind_ms is None
    assert "vLLM 0.26.0 or later" in stream_block(found)
    assert "with the topic; it has numbers 0 to 7" in stream_block(found)


def test_a_replay_socket_that_frames_as_no_release_of_the_events_does_is_a_warning() -> None:
    look = looking()
    look.replayed(wire_families.FAMILIES[3].batch([wire_families.stored()]))
    look.finding.replay = Replay("tcp://e:2", reached=True, topic=True)
    assert "frames its answers with the topic" in look.finish().warnings[0]


def test_only_so_many_messages_are_taken_apart() -> None:
    look = looking()
    payload = batch()
    for seq in range(LOOKED_AT_MAX + 5):
        look.live(frames(seq, payload), NOW_MS)
    found = look.finish()
    assert found.messages == found.payloads.messages == LOOKED_AT_MAX + 5
    assert found.payloads.stored == LOOKED_AT_MAX


def test_a_peer_cannot_fill_the_report_nor_speak_to_the_terminal() -> None:
    messages = [frames(seq, batch(lora_name=f"a{seq}"), b"\x1b[2J%d" % seq) for seq in range(50)]
    found = found_in(*messages)
    block = stream_block(found)
    assert "\x1b" not in block
    assert "\\u001b[2J0" in block
    assert len(found.topics) == len(found.payloads.adapters) == MOST_SHOWN + 1
    assert '"a19", …' in block


def test_messages_of_the_wrong_kind_of_publisher_are_named() -> None:
    dynamo = next(one.frames for one in messages_of("dynamo-1.6.1-zmq"))
    assert found_in(list(dynamo)).warnings == ['the messages are of Dynamo\'s event plane: set type = "dynamo"']
    assert "not [topic, 8-byte number, payload]" in found_in([b"a", b"b"]).warnings[0]
    bus = BusLook(
        BusFinding("d", "dynamo", "zmq", ["tcp://e:1"]), SourceConfig(endpoint="tcp://e:1", type=SourceType.DYNAMO)
    )
    bus.frames(frames(0, batch()), NOW_MS)
    assert bus.finish().warnings == ['1 of the messages are those of a relay or an engine, and type is "dynamo"']


def test_an_idle_engine_without_a_replay_socket_says_nothing() -> None:
    block = stream_block(looking().finish())
    assert "none in 5 s: an idle engine publishes nothing" in block
    assert "none configured" in block


# Buses


def bus_config(kind: str) -> NatsConfig:
    return NatsConfig(name="bus", type=SourceType(kind), connection=NatsServers())


def bus_look(kind: str) -> BusLook:
    return BusLook(
        BusFinding("bus", kind, "core NATS", ["nats://n:4222"], seconds=5, connected_ms=4, reached=True),
        bus_config(kind),
    )


@pytest.mark.parametrize("name", ["dynamo-0.4.1-nats", "dynamo-1.1.1-nats", "dynamo-1.6.1-nats"])
def test_workers_and_format_of_dynamo(name: str) -> None:
    look = bus_look("dynamo")
    messages = messages_of(name)
    for one in messages:
        look.message(one.subject, None, one.payload, NOW_MS, in_order=True)
    found = look.finish()
    assert found.messages == len(messages)
    assert found.refused_messages == 0
    assert len(found.workers) >= 1
    assert all(worker.engine == "dynamo" and worker.stored + worker.removed > 0 for worker in found.workers)
    said = bus_block(found)
    assert f"Dynamo {found.releases['dynamo'][0][0]}" in said
    assert ("json" in said) is (name == "dynamo-0.4.1-nats")


def relayed(
    seq: int, payload: bytes, worker: str = "w", control: Control = Control.NONE
) -> tuple[str, dict[str, str], bytes]:
    address = Address(worker, 0, "m", "vllm")
    return subject_of("kvevents", address), numbered(address_headers("spool", address), 1, seq, control), payload


def test_workers_of_relays_with_their_releases() -> None:
    look = bus_look("vllm")
    for seq in (7, 8, 10):
        look.message(*relayed(seq, batch()), NOW_MS, in_order=True)
    look.sign_of_life(*relayed(10, b"", control=Control.ALIVE))
    found = look.finish()
    (worker,) = found.workers
    assert (worker.worker, worker.rank, worker.model, worker.alive, worker.stored) == ("w", 0, "m", True, 3)
    assert worker.numbers is not None
    assert worker.numbers.missing == 1
    assert found.messages == 3
    assert '"w/0", model "m", 3 messages, numbers 7 to 10, 1 missing' in bus_block(found)
    assert "vLLM 0.24.0 or later, its relay is alive" in bus_block(found)


def test_dynamo_on_the_bus_of_relays_is_named() -> None:
    look = bus_look("vllm")
    for one in messages_of("dynamo-1.6.1-nats"):
        look.message(one.subject, None, one.payload, NOW_MS, in_order=True)
    assert look.finish().warnings[0].endswith('are Dynamo\'s: set type = "dynamo"')


def test_the_last_line_counts_what_was_reached() -> None:
    lost = StreamFinding("e", "vllm", "tcp://e:1", False, problem="nothing listens at tcp://e:1")
    bus = BusFinding("b", "vllm", "JetStream", ["nats://n:4222"], reached=True, connected_ms=3)
    bus.jetstream = JetStream("KV", ["kvevents.>"], 5, 9, 5, 100, 90.0, 3, "n1", 5)
    said = report(ProbeFindings(5, False, [lost], [bus]))
    assert said.splitlines()[0] == "stream e (vLLM) at tcp://e:1: not reached"
    assert 'KV of "kvevents.>": 5 messages, 5 to 9, the oldest of 90 s ago' in said
    assert "3, led by n1" in said
    assert said.endswith("\n\n1 of 2 reached")
    assert report(ProbeFindings(5, True, [], [])) == "nothing to look at"


@given(st.lists(st.lists(st.binary(max_size=60), max_size=5), max_size=4), st.sampled_from(["vllm", "sglang"]))
def test_garbage_is_counted_and_nothing_else(messages: list[list[bytes]], kind: str) -> None:
    look = looking(kind)
    bus = bus_look("dynamo")
    for one in messages:
        look.live(one, NOW_MS)
        bus.frames(one, NOW_MS)
        bus.message("s", None, b"".join(one), NOW_MS, in_order=True)
        look.replayed(b"".join(one))
    assert look.finish().messages == len(messages)
    assert bus.finish().messages == 2 * len(messages)
    stream_block(look.finding)
    bus_block(bus.finding)
