"""From verdicts to records: in order, with the cursor, and with something dropped where there is no room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.frame_queue import Barrier, Burst, FrameQueue
from kvcensus.daemon.relay import spool as spool_module
from kvcensus.daemon.relay import spooler as spooler_module
from kvcensus.daemon.relay.convention import Address
from kvcensus.daemon.relay.counters import DropCause
from kvcensus.daemon.relay.record import Position, Record
from kvcensus.daemon.relay.spool import Spool
from kvcensus.daemon.relay.spooler import SpooledStream, Spooler
from kvcensus.daemon.streams.delivery import Control
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, Fence, NewEpoch, fingerprint
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator


def followed(name: str) -> FollowedStream:
    return FollowedStream(
        source=name,
        stream=name,
        rank=None,
        endpoint="tcp://engine:5557",
        limits=StreamLimits(),
        translator=VllmTranslator(TranslatorOptions(name)),
        cursor=None,
    )


class Bench:
    """A spooler at work on a real spool."""

    def __init__(self, directory: Path, max_bytes: int = 1 << 20) -> None:
        self.spool = Spool(directory, max_bytes)
        self.queue = FrameQueue(1000, 1 << 24)
        self.streams = {name: SpooledStream(followed(name), Address(name, None)) for name in ("a", "b")}
        self.commits = 0
        self.spooler = Spooler(self.spool, self.queue, self.streams, self._committed)
        self.spooler.start()

    def _committed(self) -> None:
        self.commits += 1

    def put(self, name: str, *verdicts: Apply | NewEpoch | Fence) -> None:
        stream = self.streams[name].followed
        self.queue.put(Burst((stream, verdict) for verdict in verdicts))

    def settle(self) -> None:
        committed = threading.Event()
        self.queue.put(Burst([(self.streams["a"].followed, Barrier(committed))]))
        assert committed.wait(10)

    def records(self) -> list[Record]:
        return [record for _, record in self.spool.read(0, 10_000, 1 << 30)]

    def end(self) -> None:
        self.queue.close()
        self.spooler.join(10)
        assert self.spooler.error is None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.end()
    bench.spool.close()


def told(records: list[Record]) -> list[tuple[str, int, int, Control, bytes]]:
    return [(one.stream, one.epoch, one.seq, one.control, one.payload) for one in records]


def test_verdicts_become_records_in_order_with_the_cursors_of_their_streams(bench: Bench) -> None:
    bench.put("a", NewEpoch(1, "first contact"), Apply(0, [b"zero"]), Apply(1, [b"one"]))
    bench.put("b", NewEpoch(1, "first contact"), Fence(6, "the replay does not reach back"), Apply(7, [b"seven"]))
    bench.put("a", NewEpoch(2, "another life"), Apply(0, [b"again"]))
    bench.settle()
    assert told(bench.records()) == [
        ("a", 1, -1, Control.LIFE, b""),
        ("a", 1, 0, Control.NONE, b"zero"),
        ("a", 1, 1, Control.NONE, b"one"),
        ("b", 1, -1, Control.LIFE, b""),
        ("b", 1, 6, Control.FENCE, b""),
        ("b", 1, 7, Control.NONE, b"seven"),
        ("a", 2, -1, Control.LIFE, b""),
        ("a", 2, 0, Control.NONE, b"again"),
    ]
    cursors = bench.spool.cursors()
    assert [(one.epoch, one.seq, one.fingerprint) for one in (cursors["a"], cursors["b"])] == [
        (2, 0, fingerprint(b"again")),
        (1, 7, fingerprint(b"seven")),
    ]
    assert bench.streams["a"].followed.cursor == cursors["a"]
    assert bench.streams["a"].counters.spooled == 3
    assert bench.commits >= 1


def test_a_fence_without_a_loss_of_numbers_keeps_the_fingerprint(bench: Bench) -> None:
    bench.put("a", NewEpoch(1, "x"), Apply(0, [b"zero"]), Fence(0, "reconnected without a replay socket"))
    bench.settle()
    cursor = bench.spool.cursors()["a"]
    assert (cursor.seq, cursor.fingerprint) == (0, fingerprint(b"zero"))


def test_what_is_acknowledged_is_forgotten_with_the_position_it_leaves(bench: Bench) -> None:
    bench.put("a", NewEpoch(1, "x"), *(Apply(seq, [b"p"]) for seq in range(9)))
    bench.settle()
    bench.spooler.acknowledge(4, {"a": Position(1, 2)})
    bench.settle()
    assert [one.seq for one in bench.records()] == [3, 4, 5, 6, 7, 8]
    assert bench.spool.published() == {"a": Position(1, 2)}


def test_at_the_end_everything_queued_is_spooled(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.put("a", NewEpoch(1, "x"), *(Apply(seq, [b"p" * 1000]) for seq in range(500)))
    bench.end()
    assert bench.spool.waiting == 501
    bench.spool.close()


def test_a_file_without_room_gives_up_its_oldest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_SPARE_BYTES", -(4 << 20))
    monkeypatch.setattr(spooler_module, "_RETRY_FULL_S", 0.01)
    bench = Bench(tmp_path, max_bytes=4 << 20)
    bench.put("a", NewEpoch(1, "x"))
    for seq in range(2000):
        bench.put("a", Apply(seq, [b"p" * 3000]))
    bench.settle()
    records = bench.records()
    dropped = bench.streams["a"].counters.dropped
    assert dropped[DropCause.FULL] == 2000 - len([one for one in records if not one.control]) > 0
    assert dropped[DropCause.BOUND] == 0
    assert (records[0].control, records[0].seq) == (Control.FENCE, dropped[DropCause.FULL] - 1)
    assert [one.seq for one in records[1:]] == list(range(dropped[DropCause.FULL], 2000))
    assert bench.spooler.counters.commit_errors > 0
    assert bench.spooler.full == ""
    bench.end()
    bench.spool.close()


def test_a_file_without_room_forgets_what_the_bus_has_before_it_drops_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_SPARE_BYTES", -(4 << 20))
    monkeypatch.setattr(spooler_module, "_RETRY_FULL_S", 0.01)
    bench = Bench(tmp_path, max_bytes=4 << 20)
    for first, count in ((0, 850), (850, 250)):
        bench.put("a", *(Apply(seq, [b"p" * 3000]) for seq in range(first, first + count)))
        bench.settle()
        if not first:
            bench.spooler.acknowledge(bench.spool.last_key, {"a": Position(0, 849)})
    assert bench.spooler.counters.commit_errors > 0
    assert bench.streams["a"].counters.dropped[DropCause.FULL] == 0
    assert [(one.control, one.seq) for one in bench.records()] == [(Control.NONE, seq) for seq in range(850, 1100)]
    bench.end()
    bench.spool.close()


def test_an_empty_spool_has_the_room_that_its_last_records_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_SPARE_BYTES", -(4 << 20))
    monkeypatch.setattr(spooler_module, "_RETRY_FULL_S", 0.01)
    bench = Bench(tmp_path, max_bytes=4 << 20)
    bench.put("a", *(Apply(seq, [b"p" * 3000]) for seq in range(850)))
    bench.settle()
    bench.spooler.acknowledge(bench.spool.last_key, {"a": Position(0, 849)})
    bench.settle()
    assert bench.spool.waiting == 0
    bench.put("a", *(Apply(seq, [b"p" * 3000]) for seq in range(850, 1100)))
    bench.settle()
    assert bench.spool.waiting == 250
    bench.end()
    bench.spool.close()


def test_a_burst_that_is_larger_than_the_file_goes_through_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooler_module, "_RETRY_FULL_S", 0.01)
    payloads = [b"%06d" % seq + bytes(500_000) for seq in range(200)]
    bench.put("a", NewEpoch(1, "x"), Apply(0, payloads))
    bench.settle()
    records = bench.records()
    assert (records[0].control, records[0].seq) == (Control.FENCE, 198)
    assert [one.seq for one in records[1:]] == [199]
    cursor = bench.spool.cursors()["a"]
    assert (cursor.seq, cursor.messages, cursor.fingerprint) == (199, 200, fingerprint(payloads[-1]))
    assert bench.streams["a"].counters.dropped == {DropCause.BOUND: 199, DropCause.FULL: 0, DropCause.TOO_LARGE: 0}
    assert bench.streams["a"].counters.spooled == 200
