"""The real relay as a process, an engine with numbered messages, and what is in the stream afterwards."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.relay.convention import delivery_of
from kvcensus.daemon.streams.delivery import Control, Delivery

from ..nats_servers import NatsServer, talking
from .daemon_process import DaemonProcess, wait_until

JETSTREAM = "KV"
WORKER = "pod-1"


class RelayProcess(DaemonProcess):
    """`kvcensus relay` with the given arguments, its spool and its log in `directory`."""

    def __init__(self, directory: Path, engine: ReplayedEngine, *arguments: str) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(directory)
        self.spool = directory / "spool"
        self._command = [sys.executable, "-m", "kvcensus.daemon.cli", "relay", *arguments]
        if "--config" not in arguments:
            self._command += ["--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint]
            self._command += ["--worker", WORKER, "--stream", JETSTREAM]
        self._command += ["--spool-dir", str(self.spool), "--http", f"127.0.0.1:{self.port}"]

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/relay")
        return found

    def wait_published(self, seq: int, timeout_s: float = 30.0) -> None:
        """Until the bus has acknowledged number `seq` of the only stream, and nothing waits."""

        def there() -> bool:
            state = self.state()
            (stream,) = state["streams"]
            return state["waiting"] == 0 and bool(stream["published_seq"] == seq)

        wait_until(there, f"number {seq} is published", timeout_s)


def messages(count: int, size: int = 200, first: int = 0, seed: int = 7) -> list[RecordedMessage]:
    """Messages of an engine with numbers from `first` on and random payloads."""
    source = random.Random(seed)
    return [
        RecordedMessage(0, (b"", number.to_bytes(8, "big"), source.randbytes(size)))
        for number in range(first, first + count)
    ]


class Publishing(threading.Thread):
    """Publishes all of an engine's messages at a pace, from a thread."""

    def __init__(self, engine: ReplayedEngine, count: int, at_a_time: int = 5, pause_s: float = 0.004) -> None:
        super().__init__(daemon=True)
        self._engine = engine
        self._count = count
        self._at_a_time = at_a_time
        self._pause_s = pause_s

    def run(self) -> None:
        done = 0
        while done < self._count:
            done += self._engine.publish(self._at_a_time)
            time.sleep(self._pause_s)


def stored(server: NatsServer) -> list[Delivery]:
    """Everything in the stream, in order."""
    with talking(server.url) as talk:
        count = talk.stream_info(JETSTREAM).state.messages
        found = talk.do(_fetch(talk.jetstream, count))
    deliveries = [delivery_of(one.subject, one.headers, one.data) for one in found]
    assert not [one for one in deliveries if isinstance(one, str)]
    return [one for one in deliveries if isinstance(one, Delivery)]


async def _fetch(jetstream: Any, count: int) -> list[Any]:
    unacknowledged = ConsumerConfig(ack_policy=AckPolicy.NONE)
    subscription = await jetstream.pull_subscribe("kvevents.>", stream=JETSTREAM, config=unacknowledged)
    found: list[Any] = []
    while len(found) < count:
        found += await subscription.fetch(min(1000, count - len(found)), timeout=10)
    await subscription.unsubscribe()
    return found


class Follower:
    """What the rules of the convention make of a stream of deliveries of one worker."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self.life = ("", -1)
        self.last = -1
        self.payloads: list[bytes] = []
        self.fences: list[int] = []
        self.duplicates = 0
        self.lives = 0
        for delivery in deliveries:
            self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        life = (delivery.lineage, delivery.epoch)
        if life != self.life:
            assert life[0] != self.life[0] or life[1] > self.life[1], f"{life} after {self.life}"
            self.life, self.last, self.payloads, self.fences = life, -1, [], []
            self.lives += 1
        if delivery.control is Control.FENCE:
            self.fences.append(delivery.seq)
            self.payloads = []
            self.last = max(self.last, delivery.seq)
        elif delivery.control is Control.NONE and delivery.seq <= self.last:
            self.duplicates += 1
        elif delivery.control is Control.NONE:
            assert delivery.seq == self.last + 1, f"{delivery.seq} after {self.last}, and no fence"
            self.last = delivery.seq
            self.payloads.append(delivery.payload)
