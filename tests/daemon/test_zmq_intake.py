"""The thread that owns the ZMQ sockets."""

from __future__ import annotations

import time

import pytest
import zmq
from structlog.testing import capture_logs

from kvcensus.daemon.config import SourceConfig
from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.following import stream_of
from kvcensus.daemon.frame_queue import FrameQueue
from kvcensus.daemon.sources import zmq as zmq_source
from kvcensus.daemon.sources.zmq import ZmqIntake
from kvcensus.daemon.sources.zmq_sockets import ZmqOptions
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
        deadline = time.monotonic() + WAIT_S
        while not wanted.intake.connected:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        other.bind(places[0])
    intake.stop()
    intake.join(WAIT_S)
    assert intake.error is None
