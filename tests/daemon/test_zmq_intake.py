"""The thread that owns the ZMQ sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest
import zmq
from structlog.testing import capture_logs

from kvcensus.daemon.config import SourceConfig
from kvcensus.daemon.engine_sockets import BUFFER_STEPS, EngineSockets, ReplayFraming
from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.following import stream_of
from kvcensus.daemon.frame_queue import FrameQueue
from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.sources import zmq as zmq_source
from kvcensus.daemon.sources.zmq import ZmqIntake
from kvcensus.daemon.sources.zmq_sockets import ZmqOptions
from kvcensus.daemon.status import StreamState
from kvcensus.daemon.streams.verdicts import Retire

LOOK_S = 1.0
RETRY_MS = 200
WAIT_S = 60.0


def test_an_intake_that_follows_nothing_rests() -> None:
    intake = ZmqIntake(FrameQueue(10, 1000))
    intake.start()
    used_s = time.process_time()
    time.sleep(LOOK_S)
    used_s = time.process_time() - used_s
    intake.stop()
    intake.join(10)
    assert not intake.is_alive()
    assert used_s < LOOK_S / 10


def test_an_engine_that_never_answers_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_source, "_NOT_REACHED_MS", 200)
    intake = ZmqIntake(FrameQueue(10, 1000))
    reached, unreached = stream("reached"), stream("unreached")
    with zmq.Context() as context, context.socket(zmq.PUB) as engine, capture_logs() as lines:
        port = engine.bind_to_random_port("tcp://127.0.0.1")
        intake.add(reached, ZmqOptions(f"tcp://127.0.0.1:{port}"))
        intake.add(unreached, ZmqOptions("tcp://no-such-host.invalid:5557"))
        intake.start()
        time.sleep(LOOK_S)
        intake.stop()
        intake.join(WAIT_S)
    said = [(one["stream"], one["endpoint"]) for one in lines if one["event"] == "engine_not_reached"]
    assert said == [("unreached", "tcp://no-such-host.invalid:5557")]


def stream(name: str) -> FollowedStream:
    source = SourceConfig(endpoint="tcp://127.0.0.1:9", name=name)
    return stream_of(source, source.streams()[0], None)


def test_an_endpoint_that_cannot_be_used_is_tried_again_for_as_long_as_it_is_wanted() -> None:
    """Two endpoints to bind, both taken at first. One stream is removed before they are free."""
    queue = FrameQueue(10, 1000)
    intake = ZmqIntake(queue)
    removed, wanted = stream("removed"), stream("wanted")
    with zmq.Context() as context, context.socket(zmq.PULL) as other, context.socket(zmq.PUB) as engine:
        places = [f"tcp://127.0.0.1:{other.bind_to_random_port('tcp://127.0.0.1')}" for _ in range(2)]
        for one, place in zip((removed, wanted), places, strict=True):
            intake.add(one, ZmqOptions(place, bind=True, reconnect_max_ms=RETRY_MS))
        intake.remove("removed", retire=True)
        intake.start()
        assert queue.take(WAIT_S) == [(removed, Retire())], "what it held before is dropped all the same"
        for place in places:
            other.unbind(place)
        engine.connect(places[1])
        wait_until(lambda: wanted.intake.connected == 1)
        other.bind(places[0])
    intake.stop()
    intake.join(WAIT_S)
    assert intake.error is None


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def messages(count: int) -> list[RecordedMessage]:
    return [RecordedMessage(0, (b"", seq.to_bytes(8, "big"), b"%d" % seq)) for seq in range(count)]


def test_what_a_dead_engine_left_unread_is_no_sign_of_life() -> None:
    """The writer is slow, so most of what the engine published is unread when it dies."""
    queue = FrameQueue(10, 1_000_000)
    intake = ZmqIntake(queue)
    source = SourceConfig(endpoint="tcp://127.0.0.1:9", replay_endpoint="tcp://127.0.0.1:10", name="engine")
    engine_stream = stream_of(source, source.streams()[0], None)
    engine = EngineSockets("tcp://127.0.0.1:0", True, "tcp://127.0.0.1:0", BUFFER_STEPS, ReplayFraming.NEW)
    engine.start()
    intake.add(engine_stream, ZmqOptions(engine.endpoint, replay_endpoint=engine.replay_endpoint))
    intake.start()
    engine.wait_subscribers(1, WAIT_S)
    wait_until(lambda: engine_stream.state.state is StreamState.LIVE)
    engine.ask(lambda: engine.publish(messages(3000), True, True))
    wait_until(lambda: engine_stream.intake.messages > 10)
    engine.stop(linger_ms=1000)
    deadline = time.monotonic() + WAIT_S
    while not engine_stream.intake.disconnects:
        assert time.monotonic() < deadline
        queue.take(0.05)
    ended = time.monotonic() + LOOK_S
    while time.monotonic() < ended:
        queue.take(0.05)
    intake.stop()
    intake.join(WAIT_S)
    assert engine_stream.state.state is StreamState.DISCONNECTED
    assert engine_stream.intake.connected == 0


def test_who_connects_to_a_socket_that_binds_and_is_no_publisher_takes_nothing_from_the_engine() -> None:
    """The probe of a port, a request of HTTP, another kind of ZMQ socket."""
    intake = ZmqIntake(FrameQueue(10, 1000))
    bound = stream("bound")
    with zmq.Context() as context, context.socket(zmq.PUB) as engine, context.socket(zmq.REP) as other:
        port = engine.bind_to_random_port("tcp://127.0.0.1")
        engine.unbind(f"tcp://127.0.0.1:{port}")
        intake.add(bound, ZmqOptions(f"tcp://127.0.0.1:{port}", bind=True, reconnect_max_ms=RETRY_MS))
        intake.start()
        engine.connect(f"tcp://127.0.0.1:{port}")
        wait_until(lambda: bound.intake.connected == 1)
        socket.create_connection(("127.0.0.1", port)).close()
        wait_until(lambda: bound.intake.handshake_failures == 1)
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(64))
        wait_until(lambda: bound.intake.handshake_failures == 2)
        other.connect(f"tcp://127.0.0.1:{port}")
        time.sleep(LOOK_S)
        assert (bound.intake.connected, bound.intake.disconnects) == (1, 0)
        engine.close(linger=0)
        wait_until(lambda: bound.intake.disconnects == 1)
    intake.stop()
    intake.join(WAIT_S)
    assert intake.error is None
