"""The spool: what it was given comes out in order, killed or not, and what it had to drop is told in its place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import lmdb
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcensus.backends.errors import BackendBusy, BackendCorrupt, BackendFormat, BackendFull
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.model import Cursor
from kvcensus.daemon.relay import spool as spool_module
from kvcensus.daemon.relay.convention import Address
from kvcensus.daemon.relay.record import Position, Record
from kvcensus.daemon.relay.spool import SPOOL_FILE, Spool
from kvcensus.daemon.streams.delivery import Control

KIB = 1 << 10
streams = st.sampled_from(["a", "b/0", "b/1"])
WORKERS = {"a": Address("a", None, "m", "vllm"), "b/0": Address("b", 0), "b/1": Address("b", 1)}


def payload(stream: str, epoch: int, seq: int, size: int) -> bytes:
    return f"{stream} {epoch} {seq} ".encode().ljust(size, b".")


def record(stream: str, epoch: int, seq: int, control: Control = Control.NONE, size: int = 100) -> Record:
    body = b"" if control else payload(stream, epoch, seq, size)
    return Record(WORKERS[stream], epoch, seq, control, 1000 + seq, body)


class Reader:
    """What somebody who follows the bus by the rules of the convention makes of it, for one worker."""

    def __init__(self) -> None:
        self.epoch = 0
        self.seq = -1
        self.held: list[tuple[int, int]] = []
        self.fenced = False

    def take(self, one: Record) -> None:
        if one.epoch < self.epoch or (one.epoch == self.epoch and not one.control and one.seq <= self.seq):
            return
        if one.epoch > self.epoch:
            self.epoch, self.seq, self.held, self.fenced = one.epoch, -1, [], False
        if one.control is Control.LIFE:
            return
        if one.control is Control.FENCE:
            self.held, self.fenced, self.seq = [], True, max(self.seq, one.seq)
            return
        assert one.seq == self.seq + 1, f"{self.seq} is followed by {one}: nobody told of the numbers between"
        self.seq = one.seq
        self.held.append((one.epoch, one.seq))


class SpoolMachine(RuleBasedStateMachine):
    """Streams that append, a publisher that sends and acknowledges, kills and new starts, under a small bound."""

    @initialize(bound=st.sampled_from([8 * KIB, 64 * KIB, 1 << 20]))
    def begin(self, bound: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.bound = bound
        self.opened = 0
        self.spool = Spool(self.root / "0", bound)
        self.lineage = self.spool.lineage
        self.cursors = {stream: Cursor(stream, 0, -1) for stream in WORKERS}
        self.sent: list[Record] = []
        self.through = 0
        self.appended: dict[str, list[tuple[int, int]]] = {stream: [] for stream in WORKERS}
        self.fences: dict[str, int] = dict.fromkeys(WORKERS, 0)
        self.lost = 0

    def append(self, stream: str, records: list[Record]) -> None:
        last = records[-1]
        self.cursors[stream] = Cursor(stream, last.epoch, last.seq)
        losses = self.spool.commit(records, [self.cursors[stream]])
        self.lost += sum(loss.messages for loss in losses)

    @rule(stream=streams, count=st.integers(1, 30), size=st.sampled_from([20, 300, 3000, 9000]))
    def receive(self, stream: str, count: int, size: int) -> None:
        cursor = self.cursors[stream]
        if cursor.epoch == 0:
            self.live(stream)
            cursor = self.cursors[stream]
        new = [record(stream, cursor.epoch, cursor.seq + 1 + more, size=size) for more in range(count)]
        self.appended[stream] += [(one.epoch, one.seq) for one in new]
        self.append(stream, new)

    @rule(stream=streams)
    def live(self, stream: str) -> None:
        self.append(stream, [record(stream, self.cursors[stream].epoch + 1, -1, Control.LIFE)])

    @rule(stream=streams, missing=st.integers(0, 5))
    def fence(self, stream: str, missing: int) -> None:
        cursor = self.cursors[stream]
        if cursor.epoch:
            self.fences[stream] += 1
            self.append(stream, [record(stream, cursor.epoch, cursor.seq + missing, Control.FENCE)])

    @rule(most=st.integers(1, 40), acknowledged=st.integers(0, 40))
    def publish(self, most: int, acknowledged: int) -> None:
        """Send records from the first that is not acknowledged on; some are acknowledged, the others go out again."""
        found = self.spool.read(self.through, most, 1 << 20)
        self.sent += [one for _, one in found]
        if found and acknowledged:
            self.through = found[min(acknowledged, len(found)) - 1][0]

    @rule()
    def trim(self) -> None:
        last = {one.stream: Position(one.epoch, one.seq) for one in self.sent}
        self.spool.commit([], [], self.through, last.items())

    @rule(kill=st.booleans())
    def start_again(self, kill: bool) -> None:
        old = self.root / str(self.opened)
        self.opened += 1
        new = self.root / str(self.opened)
        if kill:
            shutil.copytree(old, new)
        self.spool.close()
        if not kill:
            old.rename(new)
        self.spool = Spool(new, self.bound)
        self.through = 0

    @invariant()
    def everything_is_kept_and_bounded(self) -> None:
        spool = self.spool
        everything = spool.read(0, 1 << 20, 1 << 40)
        assert spool.waiting == len(everything)
        traces = sum(2 * KIB for one in WORKERS)
        assert spool.waiting_bytes <= self.bound + traces
        assert spool.lineage == self.lineage
        assert spool.cursors() == {stream: cursor for stream, cursor in self.cursors.items() if cursor.epoch}
        assert spool.oldest_at_ms() == (everything[0][1].at_ms if everything else 0)
        assert [one.payload for _, one in everything if not one.control] == [
            payload(one.stream, one.epoch, one.seq, len(one.payload)) for _, one in everything if not one.control
        ]

    @invariant()
    def a_reader_of_the_bus_is_told_of_every_loss(self) -> None:
        waiting = [one for _, one in self.spool.read(self.through, 1 << 20, 1 << 40)]
        for stream in WORKERS:
            reader = Reader()
            for one in self.sent + waiting:
                if one.stream == stream:
                    reader.take(one)
            if self.cursors[stream].epoch:
                assert (reader.epoch, reader.seq) == (self.cursors[stream].epoch, self.cursors[stream].seq)
            if not reader.fenced:
                assert reader.held == [one for one in self.appended[stream] if one[0] == reader.epoch]
            if not self.lost and not self.fences[stream]:
                assert not reader.fenced

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.spool.close()
            shutil.rmtree(self.root)


SpoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("STATE_MACHINE_EXAMPLES", "40")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_whatever_happens_the_reader_is_told = SpoolMachine.TestCase


def fill(spool: Spool, stream: str, first: int, count: int, size: int = 1000) -> list[spool_module.Loss]:
    return spool.commit([record(stream, 1, first + more, size=size) for more in range(count)], [])


def test_beyond_the_bound_the_oldest_go_and_a_fence_takes_their_place(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 64 * KIB)
    fill(spool, "b/1", 0, 1)
    (loss_a, loss_b) = sorted(fill(spool, "a", 0, 80), key=lambda loss: loss.stream)
    assert (loss_b.stream, loss_b.messages, loss_b.epoch, loss_b.seq) == ("b/1", 1, 1, 0)
    left = [one for _, one in spool.read(0, 1000, 1 << 30)]
    assert [(one.stream, one.control, one.seq) for one in left[:2]] == [
        ("b/1", Control.FENCE, 0),
        ("a", Control.FENCE, loss_a.seq),
    ]
    assert [one.seq for one in left[2:]] == list(range(loss_a.seq + 1, 80))
    assert loss_a.messages == loss_a.seq + 1
    spool.close()


def test_what_was_dropped_before_another_life_needs_no_fence(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 64 * KIB)
    fill(spool, "a", 0, 5)
    spool.commit([record("a", 2, -1, Control.LIFE)], [])
    (loss, *_) = fill(spool, "b/0", 0, 60)
    assert (loss.stream, loss.messages) == ("a", 5)
    first = spool.read(0, 1, 1)[0][1]
    assert (first.stream, first.control, first.epoch) == ("a", Control.LIFE, 2)
    spool.close()


def test_one_record_beyond_the_bound_is_dropped_and_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 64 * KIB)
    (loss,) = fill(spool, "a", 0, 1, size=100 * KIB)
    assert loss.messages == 1
    assert [(one.control, one.seq) for _, one in spool.read(0, 9, 1)] == [(Control.FENCE, 0)]
    spool.close()


def test_the_file_keeps_its_size_while_records_come_and_go(tmp_path: Path) -> None:
    """A bound of 4 MiB, 200 MiB through it, in sizes that leave holes of every size."""
    spool = Spool(tmp_path, 4 << 20)
    for turn in range(400):
        records = [record("a", 1, 50 * turn + more, size=700 + 397 * (more % 50)) for more in range(50)]
        spool.commit(records, [], through=max(0, spool.last_key - 50 * (turn % 7)))
    assert (tmp_path / SPOOL_FILE).stat().st_size < 12 << 20
    spool.close()


def test_a_file_without_room_changes_nothing_and_what_is_dropped_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_SPARE_BYTES", -(7 << 20))
    spool = Spool(tmp_path, 4 << 20)
    for turn in range(10):
        fill(spool, "a", 20 * turn, 20, size=3000)
    with pytest.raises(BackendFull, match="limit"):
        fill(spool, "a", 200, 300, size=3000)
    waiting = spool.waiting
    assert waiting == 200
    assert [one.seq for _, one in spool.read(0, 10_000, 1 << 30)] == list(range(waiting))
    (loss,) = spool.make_room()
    assert loss.messages == pytest.approx(waiting / 8, abs=2)
    fill(spool, "a", waiting, 5, size=3000)
    left = [one.seq for _, one in spool.read(0, 10_000, 1 << 30)]
    assert left == list(range(loss.seq, waiting + 5))
    spool.close()


def test_a_spool_whose_bound_was_lowered_drops_down_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_SPARE_BYTES", 1 << 20)
    spool = Spool(tmp_path, 16 << 20)
    for turn in range(50):
        fill(spool, "a", 100 * turn, 100, size=3000)
    spool.close()
    assert (tmp_path / SPOOL_FILE).stat().st_size > 15 << 20
    spool = Spool(tmp_path, 1 << 20)
    (loss,) = spool.commit([record("a", 1, 5000)], [])
    assert spool.waiting_bytes <= 1 << 20
    assert [one.seq for _, one in spool.read(0, 10_000, 1 << 30)] == list(range(loss.seq, 5001))
    spool.close()


def test_two_processes_do_not_share_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    with pytest.raises(BackendBusy, match=str(os.getpid())):
        Spool(tmp_path, 1 << 20)
    spool.close()


def test_another_directory_is_another_lineage(tmp_path: Path) -> None:
    lineages = set()
    for name in "ab":
        spool = Spool(tmp_path / name, 1 << 20)
        lineages.add(spool.lineage)
        spool.close()
    assert len(lineages) == 2
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in lineages)


def test_after_a_crash_of_the_machine_the_spool_is_another(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    fill(spool, "a", 0, 3)
    lineage = spool.lineage
    spool.close()
    boot = json.loads((tmp_path / "boot.json").read_text())
    (tmp_path / "boot.json").write_text(json.dumps({**boot, "boot_id": "an earlier one", "clean": False}))
    spool = Spool(tmp_path, 1 << 20)
    assert spool.discarded_after_crash
    assert spool.lineage != lineage
    assert spool.waiting == 0
    spool.close()


def test_a_file_that_is_no_spool_is_refused_and_left(tmp_path: Path) -> None:
    LmdbBackend(tmp_path).close()
    (tmp_path / "index.mdb").rename(tmp_path / SPOOL_FILE)
    before = (tmp_path / SPOOL_FILE).read_bytes()
    with pytest.raises(BackendFormat):
        Spool(tmp_path, 1 << 20)
    assert (tmp_path / SPOOL_FILE).read_bytes() == before


def test_a_damaged_spool_is_refused_with_what_to_do(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    fill(spool, "a", 0, 30)
    spool.close()
    with (tmp_path / SPOOL_FILE).open("r+b") as file:
        file.write(b"\xff" * 8192)
    with pytest.raises(BackendCorrupt, match="mv "):
        Spool(tmp_path, 1 << 20)


@pytest.mark.parametrize("table", [b"streams", b"published"])
@pytest.mark.parametrize(("key", "value"), [(b"a", b"\xc1"), (b"\xff", None)])
def test_a_cursor_that_cannot_be_read_is_damage(table: bytes, key: bytes, value: bytes | None, tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.commit([], [Cursor("a", 1, 5)], 0, [("a", Position(1, 5))])
    spool.close()
    with lmdb.open(str(tmp_path / SPOOL_FILE), subdir=False, max_dbs=4) as env:
        place = env.open_db(table, create=False)
        with env.begin(write=True, db=place) as txn:
            txn.put(key, txn.get(b"a") if value is None else value)
    spool = Spool(tmp_path, 1 << 20)
    with pytest.raises(BackendCorrupt, match="is damaged"):
        spool.cursors() if table == b"streams" else spool.published()
    spool.close()
