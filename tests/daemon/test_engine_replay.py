"""The replayed engine on real sockets: what a consumer sees of it live, on replay, and across restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.engine_sockets import ReplayFraming
from kvcensus.daemon.recording import RecordedMessage, Recording

CAPTURES = Path(__file__).parents[1] / "captures"
RESTARTED = Recording(CAPTURES / "vllm-0.32.0-restart.jsonl.gz")
END = b"\xff" * 8
QUIET_MS = 100
"""How long a socket is watched before it is said to have nothing."""

Frames = list[bytes]


def message(seq: int, payload: bytes = b"") -> RecordedMessage:
    return RecordedMessage(
        received_ns=seq * 10_000_000, frames=(b"kv", seq.to_bytes(8, "big"), payload or b"payload %d" % seq)
    )


def messages(count: int, start: int = 0) -> list[RecordedMessage]:
    return [message(seq) for seq in range(start, start + count)]


class Consumer:
    """A subscriber and a replay client."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._sub: zmq.Socket[bytes] | None = None

    def subscribe(self, engine: ReplayedEngine, topic: bytes = b"") -> None:
        self._sub = self._context.socket(zmq.SUB)
        self._sub.subscribe(topic)
        self._sub.connect(engine.endpoint)
        assert engine.wait_subscribers(1)

    def bind(self) -> str:
        self._sub = self._context.socket(zmq.SUB)
        self._sub.subscribe(b"")
        self._sub.bind("tcp://127.0.0.1:0")
        return self._sub.get_string(zmq.LAST_ENDPOINT)

    def live(self, count: int) -> list[Frames]:
        """The next `count` live messages."""
        assert self._sub is not None
        got: list[Frames] = []
        while len(got) < count and self._sub.poll(5000):
            got.append(self._sub.recv_multipart())
        return got

    def quiet(self) -> bool:
        assert self._sub is not None
        return not self._sub.poll(QUIET_MS)

    def replay(self, engine: ReplayedEngine, start: bytes, *, kind: int = zmq.DEALER) -> list[Frames]:
        """Every answer to one request, the end marker included."""
        with self._context.socket(kind) as socket:
            socket.connect(engine.replay_endpoint)
            socket.send_multipart([b"", start])
            got: list[Frames] = []
            while not got or got[-1][-2] != END:
                assert socket.poll(5000), "no answer"
                got.append(socket.recv_multipart())
            return got

    def is_answered(self, engine: ReplayedEngine, request: Frames) -> bool:
        with self._context.socket(zmq.DEALER) as socket:
            socket.connect(engine.replay_endpoint)
            socket.send_multipart(request)
            return bool(socket.poll(QUIET_MS))


@pytest.fixture
def consumer() -> Iterator[Consumer]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Consumer(context)
    context.destroy(linger=0)


def seqs(frames: list[Frames]) -> list[int]:
    return [int.from_bytes(one[-2], "big") for one in frames if one[-2] != END]


def test_a_subscriber_gets_the_recorded_frames(consumer: Consumer) -> None:
    recorded = list(RESTARTED)
    with ReplayedEngine(RESTARTED) as engine:
        consumer.subscribe(engine)
        assert engine.publish_rest() == engine.published_count == len(recorded)
        assert [tuple(one) for one in consumer.live(len(recorded))] == [one.frames for one in recorded]
        assert consumer.quiet()


def test_nothing_is_published_before_it_is_asked_for(consumer: Consumer) -> None:
    with ReplayedEngine(messages(10)) as engine:
        consumer.subscribe(engine)
        assert consumer.quiet()
        assert engine.publish(3) == 3
        assert seqs(consumer.live(3)) == [0, 1, 2]
        assert consumer.quiet()
        assert engine.publish(100) == 7
        assert engine.publish() == 0
        assert engine.published_count == 10


@pytest.mark.parametrize(
    ("framing", "reply", "end"),
    [
        (ReplayFraming.OLD, [b"", (1).to_bytes(8, "big"), b"payload 1"], [b"", END, b""]),
        (ReplayFraming.NEW, [b"", b"kv", (1).to_bytes(8, "big"), b"payload 1"], [b"", b"", END, b""]),
    ],
)
def test_both_framings_of_a_replay(consumer: Consumer, framing: ReplayFraming, reply: Frames, end: Frames) -> None:
    with ReplayedEngine(messages(2), framing=framing) as engine:
        engine.publish_rest()
        assert consumer.replay(engine, (1).to_bytes(8, "big")) == [reply, end]


@pytest.mark.parametrize("start", [b"\x05", b"\x00\x05", (5).to_bytes(8, "big"), (5).to_bytes(16, "big")])
def test_the_start_of_a_replay_may_have_any_width(consumer: Consumer, start: bytes) -> None:
    with ReplayedEngine(messages(8)) as engine:
        engine.publish_rest()
        assert seqs(consumer.replay(engine, start)) == [5, 6, 7]


def test_a_start_past_the_end_gets_the_end_marker_alone(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3)) as engine:
        engine.publish_rest()
        assert seqs(consumer.replay(engine, b"\x03")) == []
        assert seqs(consumer.replay(engine, END)) == []


def test_a_short_buffer_silently_starts_later(consumer: Consumer) -> None:
    with ReplayedEngine(messages(30), buffer_steps=4) as engine:
        engine.publish_rest()
        assert seqs(consumer.replay(engine, b"\x00")) == [26, 27, 28, 29]


def test_a_whole_buffer_is_replayed_to_a_client_with_the_default_queue(consumer: Consumer) -> None:
    with ReplayedEngine(messages(10_000)) as engine:
        engine.publish_rest()
        assert seqs(consumer.replay(engine, b"\x00")) == list(range(10_000))


def test_an_invalid_request_gets_no_answer_and_does_no_harm(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3)) as engine:
        engine.publish_rest()
        assert not consumer.is_answered(engine, [b"\x00"])
        assert not consumer.is_answered(engine, [b"", b"\x00", b"more"])
        assert not consumer.is_answered(engine, [b"x", b"\x00"])
        assert consumer.is_answered(engine, [b"", b"\x00"])
        assert engine.replay_requests == 4


def test_without_a_replay_socket_there_is_no_address(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3), replay_bind="") as engine:
        consumer.subscribe(engine)
        assert engine.replay_endpoint == ""
        engine.publish_rest()
        assert seqs(consumer.live(3)) == [0, 1, 2]


def test_an_engine_that_connects_reaches_a_consumer_that_binds(consumer: Consumer) -> None:
    endpoint = consumer.bind()
    with ReplayedEngine(messages(3), live=endpoint, live_binds=False) as engine:
        assert engine.endpoint == endpoint
        assert consumer.quiet(), "a socket that binds subscribes when it is looked at"
        assert engine.wait_subscribers()
        engine.publish_rest()
        assert seqs(consumer.live(3)) == [0, 1, 2]


def test_a_dropped_message_is_on_replay_only(consumer: Consumer) -> None:
    with ReplayedEngine(messages(4)) as engine:
        consumer.subscribe(engine)
        engine.publish(1)
        engine.drop(2)
        engine.publish(1)
        assert seqs(consumer.live(2)) == [0, 3]
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 1, 2, 3]


def test_a_skipped_number_is_nowhere(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3)) as engine:
        consumer.subscribe(engine)
        engine.publish(1)
        engine.publish(1, live=False, keep=False)
        engine.publish(1)
        assert seqs(consumer.live(2)) == [0, 2]
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 2]


def test_a_duplicate_is_live_only(consumer: Consumer) -> None:
    with ReplayedEngine(messages(2)) as engine:
        consumer.subscribe(engine)
        engine.publish(2)
        engine.duplicate()
        assert seqs(consumer.live(3)) == [0, 1, 1]
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 1]


def test_a_mute_engine_answers_again_when_asked_again(consumer: Consumer) -> None:
    with ReplayedEngine(messages(2)) as engine:
        engine.publish_rest()
        engine.mute()
        assert not consumer.is_answered(engine, [b"", b"\x00"])
        engine.mute(False)
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 1]


def test_a_lost_buffer_has_only_what_came_after(consumer: Consumer) -> None:
    with ReplayedEngine(messages(4)) as engine:
        engine.publish(2)
        engine.lose_buffer()
        engine.publish(2)
        assert seqs(consumer.replay(engine, b"\x00")) == [2, 3]


def test_a_restart_begins_the_numbers_again_on_the_same_sockets(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3)) as engine:
        consumer.subscribe(engine)
        engine.publish_rest()
        engine.restart()
        assert seqs(consumer.replay(engine, b"\x00")) == []
        engine.publish(2)
        assert seqs(consumer.live(5)) == [0, 1, 2, 0, 1]
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 1]


def test_a_restart_within_the_recording_empties_the_buffer(consumer: Consumer) -> None:
    recorded = [one.seq for one in RESTARTED]
    second_life = recorded[recorded.index(0, 1) :]
    with ReplayedEngine(RESTARTED) as engine:
        engine.publish_rest()
        assert seqs(consumer.replay(engine, b"\x00")) == second_life


def test_the_same_number_twice_is_a_restart_only_with_another_payload(consumer: Consumer) -> None:
    with ReplayedEngine([message(0), message(0)]) as engine:
        engine.publish(1)
        assert not engine.upcoming_is_restart()
    with ReplayedEngine([message(0), message(0, b"another life")]) as engine:
        engine.publish(1)
        assert engine.upcoming_is_restart()
        engine.publish(1)
        assert [one[-1] for one in consumer.replay(engine, b"\x00")] == [b"another life", b""]


def test_messages_that_are_none_are_published_but_never_replayed(consumer: Consumer) -> None:
    odd = [
        RecordedMessage(received_ns=0, frames=frames)
        for frames in ((), (b"",), (b"kv", b"\x01", b"payload"), (b"kv", bytes(8), b"payload", b"more"))
    ]
    with ReplayedEngine([*odd, message(1)]) as engine:
        consumer.subscribe(engine)
        engine.publish_rest()
        assert [len(one) for one in consumer.live(4)] == [1, 3, 4, 3]
        assert seqs(consumer.replay(engine, b"\x00")) == [1]


def test_subscribers_are_counted_as_they_come_and_go(consumer: Consumer) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ReplayedEngine(messages(1)) as engine:
        assert not engine.wait_subscribers(1, timeout_s=0.01)
        consumer.subscribe(engine, b"kv")
        other = Consumer(context)
        other.subscribe(engine, b"kv")
        assert engine.wait_subscribers(2)
        context.destroy(linger=0)
        deadline = time.monotonic() + 5
        while engine.subscribers != 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_recorded_pace_and_a_factor_of_it(consumer: Consumer) -> None:
    with ReplayedEngine(messages(11)) as engine:
        consumer.subscribe(engine)
        began = time.monotonic()
        engine.play(speed=0.5)
        assert 0.2 <= time.monotonic() - began < 2
        assert seqs(consumer.live(11)) == list(range(11))
    with ReplayedEngine(messages(11)) as engine:
        began = time.monotonic()
        engine.play(speed=0)
        assert time.monotonic() - began < 0.09


def test_lives_repeat_the_recording(consumer: Consumer) -> None:
    with ReplayedEngine(messages(3)) as engine:
        consumer.subscribe(engine)
        engine.play(speed=0, lives=3)
        assert seqs(consumer.live(9)) == [0, 1, 2] * 3
        assert seqs(consumer.replay(engine, b"\x00")) == [0, 1, 2]


def test_every_restart_takes_its_pause() -> None:
    with ReplayedEngine([*messages(2), *messages(2)]) as engine:
        began = time.monotonic()
        engine.play(speed=0, lives=2, restart_pause_s=0.05)
        assert time.monotonic() - began >= 0.15, "one within each life, one between them"


def test_endless_play_ends_when_told() -> None:
    stopping = threading.Event()
    with ReplayedEngine(messages(3)) as engine:
        threading.Timer(0.05, stopping.set).start()
        engine.play(speed=0, lives=None, stopping=stopping)
        assert engine.published_count > 3


def test_endless_play_of_nothing_ends() -> None:
    with ReplayedEngine([]) as engine:
        engine.play(lives=None)
        assert engine.published_count == 0


def test_a_stopped_engine_says_so() -> None:
    engine = ReplayedEngine(messages(3))
    with pytest.raises(RuntimeError, match="not served"):
        engine.publish()
    engine.start().stop()
    with pytest.raises(RuntimeError, match="not served"):
        engine.publish()


def test_an_endpoint_is_free_again_after_the_stop() -> None:
    with ReplayedEngine([]) as engine:
        endpoint, replay_endpoint = engine.endpoint, engine.replay_endpoint
        with pytest.raises(zmq.ZMQError):
            ReplayedEngine([], live=endpoint)
    with ReplayedEngine([], live=endpoint, replay_bind=replay_endpoint) as again:
        assert (again.endpoint, again.replay_endpoint) == (endpoint, replay_endpoint)


def test_a_second_life_repeats_no_message_byte_for_byte(consumer: Consumer) -> None:
    payload = b"\x93\xcb" + bytes(8) + b"\x90\x00"
    with ReplayedEngine([message(0, payload)]) as engine:
        consumer.subscribe(engine)
        engine.publish()
        engine.restart()
        engine.publish()
        first, second = (frames[2] for frames in consumer.live(2))
    assert first == payload
    assert second != payload
    assert (second[:2], second[10:]) == (payload[:2], payload[10:])
