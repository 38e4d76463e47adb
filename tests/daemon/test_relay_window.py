"""What is on its way: in order, again from the first that failed, and never beyond its limits."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcensus.daemon.relay.convention import Address
from kvcensus.daemon.relay.record import Position, Record
from kvcensus.daemon.relay.window import Window
from kvcensus.daemon.streams.delivery import Control

ADDRESSES = (Address("a", None), Address("b", 3))
SIZE = 100


def record(key: int) -> Record:
    return Record(ADDRESSES[key % 2], 1, key, Control.NONE, key, bytes(SIZE))


def window(most: int = 8, most_bytes: int = 1 << 20) -> Window:
    opened = Window(most, most_bytes, 1000)
    send(opened, 1)
    opened.acknowledge(1)
    return opened


def send(into: Window, key: int, now_ms: int = 0) -> int:
    into.hold(key, record(key))
    return into.send(record(key), now_ms)


def test_records_are_done_in_order_whatever_the_order_of_their_answers() -> None:
    flight = window()
    two, three, four = (send(flight, key) for key in (2, 3, 4))
    assert flight.acknowledge(three) == []
    assert [done.key for done in flight.acknowledge(two)] == [2, 3]
    assert flight.through == 3
    (done,) = flight.acknowledge(four)
    assert (done.stream, done.position, done.spooled_at_ms) == ("a", Position(1, 4), 4)


def test_the_next_record_follows_the_last_one_sent() -> None:
    flight = window()
    send(flight, 2)
    send(flight, 9)
    assert (flight.after, flight.through, len(flight)) == (9, 1, 2)


def test_it_holds_no_more_than_its_limits() -> None:
    flight = window(most=3, most_bytes=250)
    assert flight.room() == (3, 250)
    send(flight, 2)
    send(flight, 3)
    assert flight.room() == (1, 50)
    send(flight, 4)
    assert flight.room() == (0, -50)


def test_after_a_failure_one_record_goes_alone_until_it_is_acknowledged() -> None:
    flight = window()
    two, three = send(flight, 2), send(flight, 3)
    assert flight.retreat().records == 2
    assert (flight.after, flight.room()[0]) == (1, 1)
    again = send(flight, 2)
    assert flight.room()[0] == 0
    assert flight.acknowledge(two) == flight.acknowledge(three) == []
    assert flight.answered(two) is None
    assert [done.key for done in flight.acknowledge(again)] == [2]
    assert flight.room()[0] == 8


def ready(flight: Window) -> list[int]:
    return [key for key, _ in flight.ready()]


def test_one_by_one_is_one_of_each_stream_and_nobody_waits_for_another() -> None:
    flight = window()
    flight.one_by_one = True
    for key in (2, 4, 6, 7, 9):
        flight.hold(key, record(key))
    assert ready(flight) == [2, 7]
    two, seven = flight.send(record(2), 0), flight.send(record(7), 0)
    assert ready(flight) == []
    assert flight.acknowledge(seven) == []
    assert ready(flight) == [9]
    assert [done.key for done in flight.acknowledge(two)] == [2]
    assert (ready(flight), flight.through) == ([4, 9], 2)
    assert flight.retreat().records == 1, "what was held was never published"
    assert (ready(flight), flight.after) == ([], 2)


def test_a_stream_that_several_servers_keep_from_now_on_waits_for_all_that_is_on_its_way() -> None:
    flight = window()
    first, second = send(flight, 2), send(flight, 4)
    flight.one_by_one = True
    flight.hold(6, record(6))
    flight.acknowledge(first)
    assert ready(flight) == []
    flight.acknowledge(second)
    assert ready(flight) == [6]


def test_a_late_answer_to_what_was_given_up_lets_nothing_go() -> None:
    flight = window()
    flight.one_by_one = True
    late = send(flight, 2)
    flight.retreat()
    send(flight, 2)
    flight.hold(4, record(4))
    assert flight.answered(late) is None
    assert flight.acknowledge(late) == []
    assert ready(flight) == []


def test_otherwise_what_is_held_is_published_at_once() -> None:
    flight = window()
    for key in (2, 3, 4):
        flight.hold(key, record(key))
    assert ready(flight) == [2, 3, 4]


def test_what_is_published_again_is_counted() -> None:
    flight = window()
    send(flight, 2)
    flight.retreat()
    send(flight, 2)
    send(flight, 3)
    assert flight.repeated == 1


def test_it_is_overdue_by_the_first_record_without_an_answer() -> None:
    flight = window()
    assert not flight.overdue(1 << 40)
    send(flight, 2, now_ms=0)
    send(flight, 3, now_ms=900)
    assert not flight.overdue(1000)
    assert flight.overdue(1001)


def test_what_the_server_took_before_what_it_lost_is_counted_by_stream() -> None:
    flight = window()
    tokens = {key: send(flight, key) for key in range(2, 8)}
    for key in (3, 4, 6):
        flight.acknowledge(tokens[key])
    retreat = flight.retreat()
    assert retreat.records == 6
    assert retreat.overtaken == {"a": 2}, "4 and 6 of a came before 2; 3 of b came before nothing of b that was lost"


class Wire:
    """A connection that delivers in order up to where it breaks, and a server that keeps what it has not had yet."""

    def __init__(self, most: int, last: int) -> None:
        self.flight = Window(most, 1 << 20, 10)
        self.last = last
        self.stored: list[int] = []
        self.now_ms = 0
        self._under_way: deque[tuple[int, int]] = deque()
        self._answers: deque[int] = deque()

    def send(self) -> None:
        if self.flight.room()[0] > 0 and self.flight.after < self.last:
            key = self.flight.after + 1
            self._under_way.append((send(self.flight, key, self.now_ms), key))

    def take(self) -> None:
        if self._under_way:
            token, key = self._under_way.popleft()
            if key not in self.stored:
                self.stored.append(key)
            self._answers.append(token)

    def answer(self) -> None:
        if self._answers:
            self.flight.acknowledge(self._answers.popleft())

    def lose_answer(self) -> None:
        if self._answers:
            self._answers.popleft()

    def lose_connection(self) -> None:
        self._under_way.clear()
        self._answers.clear()
        self.flight.retreat()

    def time_out(self) -> None:
        if self.flight.overdue(self.now_ms):
            self.flight.retreat()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["send", "take", "answer", "lose_answer", "lose_connection", "time_out"]), max_size=150),
    st.integers(1, 5),
)
def test_whatever_is_lost_the_server_gets_everything_and_in_order(steps: list[str], most: int) -> None:
    wire = Wire(most, last=30)
    for step in steps:
        wire.now_ms += 1
        getattr(wire, step)()
        assert len(wire.flight) <= most
        assert wire.stored == list(range(1, len(wire.stored) + 1))
        assert wire.flight.through <= len(wire.stored)
    for _ in range(20 * wire.last):
        wire.now_ms += 1
        for step in ("send", "take", "answer", "time_out"):
            getattr(wire, step)()
    assert wire.flight.through == wire.last
    assert wire.stored == list(range(1, wire.last + 1))


class Handovers:
    """Servers that lose any of the records on their way and keep the others, and a publisher of two streams."""

    def __init__(self, last: int) -> None:
        self.flight = Window(6, 1 << 20, 10)
        self.flight.one_by_one = True
        self.last = last
        self.stored: list[int] = []
        self.now_ms = 0
        self._under_way: list[tuple[int, int]] = []

    def send(self) -> None:
        while self.flight.room()[0] > 0 and self.flight.after < self.last:
            self.flight.hold(self.flight.after + 1, record(self.flight.after + 1))
        for key, one in self.flight.ready():
            self._under_way.append((self.flight.send(one, self.now_ms), key))

    def take_first(self) -> None:
        self._take(0)

    def take_last(self) -> None:
        self._take(-1)

    def lose_first(self) -> None:
        self._under_way = self._under_way[1:]

    def time_out(self) -> None:
        if self.flight.overdue(self.now_ms):
            self.flight.retreat()

    def _take(self, which: int) -> None:
        if self._under_way:
            token, key = self._under_way.pop(which)
            if key not in self.stored:
                self.stored.append(key)
            self.flight.acknowledge(token)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["send", "take_first", "take_last", "lose_first", "time_out"]), max_size=150))
def test_whatever_a_handover_loses_every_stream_is_stored_in_order(steps: list[str]) -> None:
    servers = Handovers(last=30)
    for step in steps:
        servers.now_ms += 3
        getattr(servers, step)()
    for _ in range(20 * servers.last):
        servers.now_ms += 3
        for step in ("send", "take_first", "time_out"):
            getattr(servers, step)()
    assert servers.flight.through == servers.last
    for which in (0, 1):
        assert [key for key in servers.stored if key % 2 == which] == [key for key in range(1, 31) if key % 2 == which]
