"""What the intake of a NATS bus makes of messages by the run: nothing else than what it makes of each in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.claims import Claims
from kvcensus.daemon.config import NatsConfig, NatsServers, SourceType
from kvcensus.daemon.frame_queue import Burst, FrameQueue, Item
from kvcensus.daemon.relay.convention import EVENTS_PREFIX, Address, address_headers, numbered, subject_of
from kvcensus.daemon.service import _bus_settings
from kvcensus.daemon.sources import bus_source
from kvcensus.daemon.sources.bus_source import BusSource
from kvcensus.daemon.sources.nats_bus import Arrived, NatsBus
from kvcensus.daemon.sources.nats_headers import Headers
from kvcensus.daemon.sources.opening import open_message
from kvcensus.daemon.streams.delivery import Control
from kvcensus.daemon.streams.verdicts import Apply, Retire
from kvcensus.daemon.writer import Writer, WriterOptions

CONFIG = NatsConfig(name="bus", type=SourceType.VLLM, connection=NatsServers(servers=("nats://none",)), lease_ms=100)


def message(worker: str, lineage: str, topic: str, epoch: int, seq: int, control: Control) -> Arrived:
    address = Address(worker, None, topic=topic)
    said = numbered(address_headers(lineage, address), epoch, seq, control)
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    payload = b"" if control else f"{lineage}.{epoch}.{seq}".encode()
    return Arrived(subject_of(EVENTS_PREFIX, address), "", payload, Headers(f"NATS/1.0\r\n{lines}\r\n".encode()))


def sent(worker: str, lineage: str, topic: str, epoch: int, first: int, count: int, control: Control) -> list[Arrived]:
    last = [message(worker, lineage, topic, epoch, first + count, control)] if control else []
    return [message(worker, lineage, topic, epoch, first + at, Control.NONE) for at in range(count)] + last


SENT = st.builds(
    sent,
    st.sampled_from("vw"),
    st.sampled_from(["r", "r", "q"]),
    st.sampled_from(["", "", "t"]),
    st.integers(1, 2),
    st.sampled_from([0, 2, 4, 6]),
    st.integers(1, 3),
    st.sampled_from([Control.NONE, Control.NONE, Control.FENCE, Control.LIFE, Control.ALIVE]),
)
STEPS = st.lists(st.one_of(SENT, st.sampled_from(["tick", "lost", "doubt", "hand over"])), max_size=12)


def by_stream(items: Iterable[Item]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = defaultdict(list)
    for stream, what in items:
        if isinstance(what, Apply):
            found[stream.stream] += list(enumerate(what.payloads, what.seq))
        else:
            found[stream.stream].append(what)
    return found


@given(STEPS)
def test_messages_by_the_run_come_to_what_each_comes_to_in_turn(steps: list[list[Arrived] | str]) -> None:
    together, alone = (BusSource(_bus_settings(CONFIG), [], Claims()) for _ in range(2))
    queue = FrameQueue(1_000_000, 1 << 30)
    intake = NatsBus(together, CONFIG, queue)
    expected: list[Item] = []
    now_ms = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bus_source, "monotonic_ms", lambda: now_ms)
        together.connection_made()
        alone.connection_made()
        for step in steps:
            if step == "tick":
                intake.outlet.end_runs()
                now_ms += 60
                expected += alone.tick()
                intake.tick()
            elif step == "lost":
                expected += alone.lost("gone")
                intake.outlet.add(lambda: together.lost("gone"))
            elif step == "doubt":
                alone.bus.doubt()
                intake.doubt()
            elif step == "hand over":
                intake.outlet.end_burst()
            else:
                for one in step:
                    assert isinstance(one, Arrived)
                    opening = open_message(SourceType.VLLM, "", one.subject, one.headers, one.data)
                    expected += alone.take(opening, one.data)
                    intake.take(one)
        intake.outlet.end_burst()
    handed_over: list[Item] = []
    while items := queue.take(0):
        handed_over += items
    assert by_stream(handed_over) == by_stream(expected)
    for key, worker in alone.bus.workers.items():
        same = together.bus.workers[key]
        assert (same.applied, same.proven, vars(same.counters)) == (
            worker.applied,
            worker.proven,
            vars(worker.counters),
        )


@pytest.mark.parametrize("worker", ["nats:bus", "nats:other"])
def test_no_worker_has_the_name_of_a_place_in_a_stream(worker: str) -> None:
    claims = Claims()
    other = msgspec.structs.replace(CONFIG, name="other")
    bus, _ = (BusSource(_bus_settings(config), [], claims) for config in (CONFIG, other))
    bus.connection_made()
    for named in (worker, "w"):
        one = message(named, "r", "", 1, 0, Control.NONE)
        bus.take(open_message(SourceType.VLLM, "", one.subject, one.headers, one.data), one.data)
    assert [followed.stream for followed in bus.workers()] == ["w"]


def test_a_worker_goes_to_another_bus_when_what_drops_it_here_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(bus: BusSource) -> list[Item]:
        one = message("w", "r", "", 1, 0, Control.NONE)
        return bus.take(open_message(SourceType.VLLM, "", one.subject, one.headers, one.data), one.data)

    now_ms, claims = 0, Claims()
    monkeypatch.setattr(bus_source, "monotonic_ms", lambda: now_ms)
    silent = msgspec.structs.replace(CONFIG, silent_lease_ms=100)
    here, there, nowhere = (
        BusSource(_bus_settings(msgspec.structs.replace(silent, name=name)), [], claims) for name in ("a", "b", "c")
    )
    here.connection_made()
    assert first(here)
    now_ms = 101
    dropped = here.tick()
    assert [what for _, what in dropped] == [Retire()]
    here.tick()
    assert first(there) == []
    queue = FrameQueue(100, 100)
    queue.put(Burst(dropped))
    queue.close()
    Writer(MemoryBackend(), queue, WriterOptions()).run()
    here.tick()
    assert first(there)
    assert there.retire()
    assert first(nowhere) == []
    there.close()
    assert first(nowhere)
