"""The thread that owns the ZMQ sockets."""

from __future__ import annotations

import time

from kvcensus.daemon.frame_queue import FrameQueue
from kvcensus.daemon.sources.zmq import ZmqIntake

LOOK_S = 1.0


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
