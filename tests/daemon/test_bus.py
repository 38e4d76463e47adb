"""The state of a bus: what each message is to its workers, and what a missing number costs."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcensus.backends.model import Cursor
from kvcensus.daemon.status import StreamState
from kvcensus.daemon.streams.bus import Bus, BusLimits, Verdicts, WorkerLife
from kvcensus.daemon.streams.delivery import Control, Delivery
from kvcensus.daemon.streams.verdicts import Apply, Fence, NewEpoch, Retire


def relayed(seq: int, *, worker: str = "w", lineage: str = "r", epoch: int = 1, **more: object) -> list[Delivery]:
    """One message of a relay: numbered for its worker alone."""
    return [Delivery(worker, None, lineage, epoch, seq, b"%d" % seq, **more)]  # type: ignore[arg-type]


def enveloped(seq: int, *workers: str, publisher: str = "p") -> list[Delivery]:
    """One envelope of Dynamo, with events of some workers: numbered for all of them together."""
    return [Delivery(worker, 0, publisher, 0, seq, b"%d" % seq, shared=True) for worker in workers]


def legacy(seq: int, payload: bytes = b"", *, first: int = 1) -> list[Delivery]:
    """One event of an old Dynamo: nobody says which life it is of."""
    return [Delivery("w", 0, "", 0, seq, payload or b"%d" % seq, first=first)]


def bus(*, durable: bool = False, most: int = 100, **limits: int) -> Bus:
    workers: list[str] = []

    def admit(key: str, delivery: Delivery, life: WorkerLife) -> bool:
        workers.append(key)
        return len(workers) <= most

    one = Bus(BusLimits(durable=durable, **limits), admit)
    one.connected(0)
    return one


def told(verdicts: Verdicts) -> list[str]:
    """The verdicts in short: `w:epoch`, `w:fence@3`, `w:4`."""
    words = {NewEpoch: "epoch", Retire: "retire"}
    short = []
    for key, verdict in verdicts:
        if isinstance(verdict, Apply):
            short.append(f"{key}:{verdict.seq}")
        elif isinstance(verdict, Fence):
            short.append(f"{key}:fence@{verdict.seq}")
        else:
            short.append(f"{key}:{words[type(verdict)]}")
    return short


def feed(one: Bus, *messages: list[Delivery], now_ms: int = 0) -> list[str]:
    return [word for message in messages for word in told(one.receive(message, now_ms))]


def alone(verdicts: Verdicts) -> Verdicts:
    """The verdicts with each message on its own."""
    return [
        (key, one)
        for key, verdict in verdicts
        for one in (
            [Apply(seq, [payload]) for seq, payload in enumerate(verdict.payloads, verdict.seq)]
            if isinstance(verdict, Apply)
            else [verdict]
        )
    ]


RUNS = st.tuples(
    st.sampled_from("vw"),
    st.sampled_from("rq"),
    st.integers(1, 2),
    st.one_of(st.none(), st.integers(0, 6)),
    st.integers(1, 4),
)
HAPPENINGS = st.one_of(RUNS, RUNS, st.sampled_from(["lose the connection", "connect", "lose messages", "beat", "tick"]))


@given(st.booleans(), st.lists(HAPPENINGS, max_size=14))
def test_a_run_of_messages_is_what_its_messages_are_one_by_one(durable: bool, happenings: list[object]) -> None:
    together, apart = bus(durable=durable, lease_ms=900), bus(durable=durable, lease_ms=900)
    following: dict[tuple[str, str, int], int] = {}
    for now, happening in enumerate(happenings):
        if isinstance(happening, tuple):
            worker, lineage, epoch, start, count = happening
            seq = following.get((worker, lineage, epoch), 0) if start is None else start
            following[worker, lineage, epoch] = seq + count
            (head,) = relayed(seq, worker=worker, lineage=lineage, epoch=epoch)
            payloads = [b"%d" % one for one in range(seq, seq + count)]
            expected = [
                found
                for one in range(seq, seq + count)
                for found in apart.receive(relayed(one, worker=worker, lineage=lineage, epoch=epoch), 500 * now)
            ]
            assert alone(together.receive_run(head, payloads, 500 * now)) == expected
        else:
            told_to = []
            for one in (together, apart):
                if happening == "lose the connection":
                    told_to.append(one.disconnected())
                elif happening == "connect":
                    told_to.append(one.connected(500 * now))
                elif happening == "lose messages":
                    told_to.append(one.lost("x"))
                elif happening == "beat":
                    told_to.append(one.receive(relayed(3, control=Control.ALIVE), 500 * now))
                else:
                    told_to.append(one.tick(500 * now))
            assert told_to[0] == told_to[1]
        assert [vars(one) | {"_bus": 0, "counters": vars(one.counters)} for one in together.workers.values()] == [
            vars(one) | {"_bus": 0, "counters": vars(one.counters)} for one in apart.workers.values()
        ]


def test_a_worker_seen_from_its_first_message_is_believed() -> None:
    assert feed(bus(), relayed(0), relayed(1)) == ["w:epoch", "w:0", "w:1"]


def test_a_worker_whose_beginning_was_missed_is_fenced() -> None:
    assert feed(bus(), relayed(5), relayed(6)) == ["w:epoch", "w:fence@4", "w:5", "w:6"]


def test_a_missing_number_fences_its_worker_and_no_other() -> None:
    one = bus()
    feed(one, relayed(0), relayed(0, worker="v"))
    assert feed(one, relayed(2), relayed(1, worker="v")) == ["w:fence@1", "w:2", "v:1"]
    assert one.workers["w"].counters.missing == 1
    assert one.workers["v"].counters.missing == 0


def test_a_number_that_came_before_is_a_duplicate() -> None:
    one = bus()
    assert feed(one, relayed(0), relayed(1), relayed(0), relayed(1)) == ["w:epoch", "w:0", "w:1"]
    assert one.workers["w"].counters.duplicates == 2


def test_a_higher_epoch_of_the_same_lineage_is_a_new_life_and_a_lower_one_a_duplicate() -> None:
    one = bus()
    feed(one, relayed(0), relayed(1))
    assert feed(one, relayed(0, epoch=2), relayed(1, epoch=1)) == ["w:epoch", "w:0"]
    assert one.workers["w"].counters.restarts == 1


def test_another_lineage_is_a_new_life_and_the_former_one_may_not_come_back() -> None:
    one = bus()
    feed(one, relayed(0), relayed(0, lineage="s"))
    assert feed(one, relayed(1), relayed(2)) == ["w:fence@0"]
    assert feed(one, relayed(1, lineage="s")) == ["w:1"]


def test_a_new_life_is_told_before_it_has_sent_anything() -> None:
    one = bus()
    feed(one, relayed(0), relayed(1))
    assert feed(one, [Delivery("w", None, "r", 2, -1, control=Control.LIFE)]) == ["w:epoch"]
    assert feed(one, relayed(0, epoch=2)) == ["w:0"]


def test_a_new_life_told_twice_begins_once() -> None:
    one = bus()
    life = [Delivery("w", None, "r", 1, -1, control=Control.LIFE)]
    assert feed(one, life, relayed(0), life, relayed(1)) == ["w:epoch", "w:0", "w:1"]


def test_a_loss_that_the_publisher_tells_fences_and_what_follows_continues() -> None:
    one = bus()
    feed(one, relayed(0))
    fence = [Delivery("w", None, "r", 1, 7, control=Control.FENCE)]
    assert feed(one, fence, relayed(8)) == ["w:fence@7", "w:8"]
    assert feed(one, fence) == []


def test_a_loss_told_after_the_last_number_fences() -> None:
    one = bus()
    feed(one, relayed(0))
    assert feed(one, [Delivery("w", None, "r", 1, 0, control=Control.FENCE)]) == ["w:fence@0"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_loss_told_before_the_first_number_fences_once(durable: bool) -> None:
    one = bus(durable=durable)
    began = [relayed(-1, control=Control.LIFE), relayed(-1, control=Control.FENCE), relayed(0), relayed(1)]
    assert feed(one, *began) == ["w:epoch", "w:fence@-1", "w:0", "w:1"]
    assert feed(one, *began) == [], "it may have been cleared since, and is published again after an outage"
    assert one.refused == 0


def test_one_numbering_runs_across_the_workers_of_a_publisher() -> None:
    one = bus()
    said = feed(one, enveloped(0, "a"), enveloped(1, "b"), enveloped(2, "a", "b"))
    assert said == ["a/0:epoch", "a/0:0", "b/0:epoch", "b/0:1", "a/0:2", "b/0:2"]
    assert feed(one, enveloped(2, "a", "b")) == []


def test_a_gap_in_a_shared_numbering_fences_each_of_its_workers_once_and_before_what_follows() -> None:
    one = bus()
    feed(one, enveloped(0, "a"), enveloped(1, "b"), enveloped(0, "c", publisher="q"))
    said = feed(one, enveloped(4, "a", "b"))
    assert said == ["a/0:fence@3", "b/0:fence@3", "a/0:4", "b/0:4"]


def test_a_worker_new_to_a_publisher_that_was_not_heard_from_the_start_is_fenced() -> None:
    one = bus()
    feed(one, enveloped(3, "a"))
    assert feed(one, enveloped(4, "b")) == ["b/0:epoch", "b/0:fence@3", "b/0:4"]


def test_without_a_lineage_a_number_that_goes_back_is_a_new_life() -> None:
    one = bus()
    assert feed(one, legacy(1), legacy(2), legacy(1, b"other")) == ["w/0:epoch", "w/0:1", "w/0:2", "w/0:epoch", "w/0:1"]


def test_without_a_lineage_the_same_message_again_is_a_duplicate() -> None:
    one = bus()
    assert feed(one, legacy(1), legacy(2), legacy(1), legacy(3)) == ["w/0:epoch", "w/0:1", "w/0:2", "w/0:3"]


def test_without_a_lineage_each_worker_of_a_message_has_numbers_of_its_own() -> None:
    one = bus()
    apart = [Delivery(worker, 0, "", 0, seq, b"", first=1) for worker in "vw" for seq in (1, 2, 3, 5)]
    v1, v2, v3, _, w1, w2, w3, w5 = apart
    assert feed(one, [v1, w1]) == ["v/0:epoch", "v/0:1", "w/0:epoch", "w/0:1"]
    assert feed(one, [v2, w2], [w3]) == ["v/0:2", "w/0:2", "w/0:3"]
    assert feed(one, [v3, w5]) == ["v/0:3", "w/0:fence@4", "w/0:5"]
    assert told(one.torn([v3, w5], "unreadable")) == ["v/0:fence@3", "w/0:fence@5"]


def test_a_message_without_a_number_is_refused_where_a_loss_would_not_be_seen() -> None:
    one = bus()
    assert feed(one, [Delivery("w", None, "", 0, -1, b"x")]) == []
    assert one.refused == 1


def test_a_message_without_a_number_is_taken_from_a_bus_that_loses_nothing() -> None:
    one = bus(durable=True)
    message = [Delivery("w", None, "", 0, -1, b"x")]
    assert feed(one, message, message) == ["w:epoch", "w:fence@-1", "w:0", "w:1"]


def test_no_more_workers_are_followed_than_are_admitted() -> None:
    one = bus(most=1)
    assert feed(one, relayed(0), relayed(0, worker="v"), relayed(1)) == ["w:epoch", "w:0", "w:1"]
    assert one.refused == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_worker_that_is_admitted_after_some_of_its_messages_is_fenced(shared: bool) -> None:
    full = True
    one = Bus(BusLimits(), lambda *_: not full)
    one.connected(0)
    first, second = (enveloped(seq, "w") if shared else [Delivery("w", 0, "r", 1, seq)] for seq in (0, 1))
    assert feed(one, first) == []
    full = False
    assert feed(one, second) == ["w/0:epoch", "w/0:fence@0", "w/0:1"]


def test_a_worker_that_was_refused_or_dropped_before_a_restart_is_fenced_when_its_publisher_goes_on_with_it() -> None:
    one = bus(durable=True)
    one.restore(Cursor("a/0", 1, 3, worker_id="a/0", life="p:0"), 0)
    assert feed(one, enveloped(4, "b")) == ["b/0:epoch", "b/0:fence@3", "b/0:4"]


def test_what_numbers_no_worker_is_not_remembered() -> None:
    one = bus(most=1)
    for n in range(20):
        feed(one, relayed(0, lineage=f"r{n}"), relayed(9, lineage=f"r{n - 1}"))
        feed(one, relayed(0, worker=f"refused-{n}"), enveloped(0, f"refused-{n}", publisher=f"p{n}"))
    assert one.workers.keys() == {"w"}
    assert len(one._numberings) == 1


def test_what_the_bus_itself_lost_fences_everybody() -> None:
    one = bus(durable=True)
    feed(one, relayed(0), relayed(0, worker="v"))
    assert told(one.lost("expired")) == ["w:fence@0", "v:fence@0"]
    assert feed(one, relayed(1)) == ["w:1"]


def test_after_a_restart_the_next_number_continues_and_a_later_one_fences() -> None:
    for seq, said in ((4, ["w:4"]), (6, ["w:fence@5", "w:6"]), (3, [])):
        one = bus()
        one.restore(Cursor("w", 1, 3, worker_id="w", life="r:1"), 0)
        assert feed(one, relayed(seq)) == said


def test_after_a_restart_a_shared_numbering_goes_on_from_its_highest_number() -> None:
    one = bus()
    one.restore(Cursor("a/0", 1, 3, worker_id="a/0", life="p:0"), 0)
    one.restore(Cursor("b/0", 1, 7, worker_id="b/0", life="p:0"), 0)
    assert feed(one, enveloped(8, "a"), enveloped(10, "b")) == ["a/0:8", "a/0:fence@9", "b/0:fence@9", "b/0:10"]


def test_a_bus_that_keeps_nothing_proves_a_worker_by_its_next_number() -> None:
    one = bus()
    worker = one.restore(Cursor("w", 1, 3, worker_id="w", life="r:1"), 0)
    assert not worker.proven
    feed(one, relayed(4))
    assert worker.proven
    one.disconnected()
    one.connected(0)
    assert not worker.proven
    feed(one, [Delivery("w", None, "r", 1, 4, control=Control.ALIVE)])
    assert worker.proven


def test_a_sign_of_life_that_is_ahead_of_its_messages_leaves_a_doubt_until_they_come() -> None:
    one = bus()
    feed(one, relayed(0), [Delivery("w", None, "r", 1, 1, control=Control.ALIVE)])
    worker = one.workers["w"]
    assert not worker.proven
    assert feed(one, relayed(1)) == ["w:1"]
    assert worker.proven
    feed(one, [Delivery("w", None, "r", 2, -1, control=Control.ALIVE)])
    assert not worker.proven


def test_a_bus_that_keeps_its_messages_may_be_behind_the_signs_of_life() -> None:
    one = bus(durable=True)
    feed(one, relayed(0), [Delivery("w", None, "r", 1, 9, control=Control.ALIVE)])
    assert one.workers["w"].proven


def test_one_message_of_a_publisher_proves_all_of_its_workers() -> None:
    one = bus()
    feed(one, enveloped(0, "a"), enveloped(1, "b"))
    one.disconnected()
    one.connected(0)
    feed(one, enveloped(2, "a"))
    assert all(worker.proven for worker in one.workers.values())


@pytest.mark.parametrize("beats", [True, False])
def test_a_silent_worker_is_dropped_when_its_lease_ends(beats: bool) -> None:
    one = bus(lease_ms=1000, silent_lease_ms=5000)
    feed(one, relayed(0))
    if beats:
        feed(one, [Delivery("w", None, "r", 1, 0, control=Control.ALIVE)])
    lease = 1000 if beats else 5000
    assert told(one.tick(lease)) == []
    assert told(one.tick(lease + 1)) == ["w:retire"]
    assert feed(one, relayed(1)) == ["w:epoch", "w:fence@0", "w:1"]


def test_a_worker_that_was_dropped_is_fenced_when_its_publisher_goes_on_with_it() -> None:
    one = bus(silent_lease_ms=1000)
    feed(one, enveloped(0, "a"), enveloped(1, "b"))
    feed(one, enveloped(2, "b"), now_ms=900)
    assert told(one.tick(1100)) == ["a/0:retire"]
    assert feed(one, enveloped(3, "a", "b"), now_ms=1100) == ["a/0:epoch", "a/0:fence@2", "a/0:3", "b/0:3"]


def test_a_lease_does_not_run_while_the_bus_is_gone() -> None:
    one = bus(silent_lease_ms=1000)
    feed(one, relayed(0))
    one.disconnected()
    assert told(one.tick(9000)) == []
    one.connected(9000)
    assert told(one.tick(9500)) == []


def test_a_lease_is_the_long_one_while_signs_of_life_cannot_come_and_begins_anew_when_they_can() -> None:
    one = bus(lease_ms=1000, silent_lease_ms=5000)
    feed(one, relayed(0), [Delivery("w", None, "r", 1, 0, control=Control.ALIVE)])
    one.hears(False, 500)
    assert told(one.tick(5000)) == []
    one.hears(True, 5000)
    assert told(one.tick(6000)) == []
    assert told(one.tick(6001)) == ["w:retire"]


def test_a_relay_without_its_engine_shows_as_disconnected() -> None:
    one = bus()
    feed(one, relayed(0))
    worker = one.workers["w"]
    assert worker.state is StreamState.LIVE
    feed(one, [Delivery("w", None, "r", 1, 0, control=Control.GONE)])
    assert worker.state is StreamState.DISCONNECTED
    feed(one, [Delivery("w", None, "r", 1, 0, control=Control.ALIVE)])
    assert worker.state is StreamState.LIVE


WORKERS = ("a", "b", "c")


class BusMachine(RuleBasedStateMachine):
    """Publishers that restart, a wire that loses and repeats, a daemon that dies between commits.

    What must always hold: the messages applied to a worker since its last clear are consecutive ones of one life, and
    all of that life up to the last one, unless the worker was fenced. What must hold where nothing was lost: it has
    them all.
    """

    @initialize(shared=st.booleans(), durable=st.booleans())
    def begin(self, shared: bool, durable: bool) -> None:
        self.shared = shared
        self.limits = BusLimits(durable=durable)
        self.life = 0
        self.lineage = "p0"
        self.numbers: dict[str, int] = defaultdict(int)
        self.sent: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        self.wire: list[list[Delivery]] = []
        self.lossy: set[tuple[str, int]] = set()
        self.cursors: dict[str, Cursor] = {}
        self.applied: dict[str, list[int]] = defaultdict(list)
        self.of: dict[str, tuple[str, int]] = {}
        self.fenced: set[str] = set()
        self.contested: set[str] = set()
        self.start()

    def start(self) -> None:
        self.bus = Bus(self.limits, lambda key, delivery, life: True)
        for cursor in self.cursors.values():
            self.bus.restore(cursor, 0)
        self.bus.connected(0)

    @rule(workers=st.lists(st.sampled_from(WORKERS), min_size=1, max_size=3, unique=True))
    def publish(self, workers: list[str]) -> None:
        messages = [workers] if self.shared else [[worker] for worker in workers]
        for message in messages:
            numbering = "" if self.shared else message[0]
            seq = self.numbers[numbering]
            self.numbers[numbering] += 1
            for worker in message:
                self.sent[f"{worker}/0", self.lineage, self.life].append(seq)
            self.wire.append([Delivery(w, 0, self.lineage, self.life, seq, b"", shared=self.shared) for w in message])

    @rule(new_lineage=st.booleans())
    def restart(self, new_lineage: bool) -> None:
        self.life += 1
        if new_lineage or self.shared:
            self.lineage = f"p{self.life}"
        self.numbers.clear()

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        lost = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        self.lossy.add((lost[0].lineage, lost[0].epoch))

    @precondition(lambda self: 0 < len(self.wire) <= 64)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A relay goes back to what was not acknowledged, and sends it and all after it again."""
        self.wire += self.wire[data.draw(st.integers(0, len(self.wire) - 1)) :]

    @rule(most=st.integers(1, 8))
    def deliver(self, most: int) -> None:
        for _ in range(min(most, len(self.wire))):
            for key, verdict in self.bus.receive(self.wire.pop(0), 0):
                self.carry_out(key, verdict)
            self.commit()

    @rule()
    def die(self) -> None:
        self.start()

    @rule()
    def bus_loses(self) -> None:
        for key, verdict in self.bus.lost("expired"):
            self.carry_out(key, verdict)
        self.commit()

    def carry_out(self, key: str, verdict: object) -> None:
        if isinstance(verdict, NewEpoch):
            lineage, _, epoch = verdict.life.rpartition(":")
            self.of[key] = lineage, int(epoch)
            self.applied[key] = []
            self.fenced.discard(key)
            self.contested.discard(key)
        elif isinstance(verdict, Fence):
            self.fenced.add(key)
            if "two publishers" in verdict.reason:
                self.contested.add(key)
        elif isinstance(verdict, Apply):
            self.applied[key].append(verdict.seq)

    def commit(self) -> None:
        for key, worker in self.bus.workers.items():
            trust = "untrusted" if key in self.fenced else "fresh"
            life = f"{worker.lineage}:{worker.life}"
            self.cursors[key] = Cursor(key, worker.epoch, worker.applied, worker_id=key, trust=trust, life=life)

    @invariant()
    def what_is_applied_is_of_one_life_and_in_order(self) -> None:
        for key, applied in self.applied.items():
            sent = self.sent[(key, *self.of[key])]
            assert applied == sorted(set(applied))
            assert set(applied) <= set(sent)
            if key not in self.fenced:
                assert applied == sent[: len(applied)]

    def teardown(self) -> None:
        if not hasattr(self, "bus"):
            return
        self.deliver(len(self.wire))
        for key, applied in self.applied.items():
            sent = self.sent[(key, *self.of[key])]
            if self.of[key] not in self.lossy and key not in self.fenced:
                assert applied == sent
            # One that died has forgotten former lineages: what is repeated of them looks like a second publisher.
            if self.of[key] not in self.lossy and key not in self.contested:
                assert applied[-1:] == sent[-1:]


TestBus = BusMachine.TestCase
TestBus.settings = settings(
    max_examples=int(os.environ.get("KVCENSUS_STREAM_EXAMPLES", "150")), stateful_step_count=40, deadline=None
)
