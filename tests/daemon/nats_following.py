"""A service that follows one NATS bus, and messages as a relay sends them. For tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.config import Config, NatsConfig, NatsServers, SourceType, WriterConfig
from kvcensus.daemon.relay.convention import (
    ALIVE_PREFIX,
    EVENTS_PREFIX,
    Address,
    address_headers,
    numbered,
    subject_of,
)
from kvcensus.daemon.service import Service
from kvcensus.daemon.status import BusStatus, StreamState, StreamStatus, Trust
from kvcensus.daemon.streams.delivery import Control

from ..nats_servers import Talk

STREAM = "KV"
WAIT_S = 20.0


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.01)


def block(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


def payload(seq: int) -> bytes:
    """A batch of vLLM that stores one block, whose hash is the number."""
    stored = {
        "type": "BlockStored",
        "block_hashes": [seq],
        "parent_block_hash": None,
        "token_ids": [0] * 16,
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return msgspec.msgpack.encode([1_700_000_000.0 + seq, [stored], None])


class Relay:
    """What one worker's relay sends: message `n` stores block `n`. `durable`: to JetStream."""

    def __init__(
        self, talk: Talk, worker: str = "w", *, durable: bool = False, lineage: str = "spool", topic: str = ""
    ) -> None:
        self._talk = talk
        self._durable = durable
        self._address = Address(worker, None, engine="vllm", topic=topic)
        self._headers = address_headers(f"{lineage}-{worker}", self._address)
        self.subject = subject_of(EVENTS_PREFIX, self._address)
        self.epoch = 1

    def send(self, *numbers: int) -> None:
        self._talk.do(self._send(numbers))

    async def _send(self, numbers: Iterable[int]) -> None:
        for seq in numbers:
            headers = numbered(self._headers, self.epoch, seq, Control.NONE)
            if self._durable:
                await self._talk.jetstream.publish(self.subject, payload(seq), headers=headers)
            else:
                await self._talk.client.publish(self.subject, payload(seq), headers=headers)
        await self._talk.flush()

    def beat(self, seq: int, control: Control = Control.ALIVE) -> None:
        subject = subject_of(ALIVE_PREFIX, self._address)
        self._talk.publish(subject, b"", numbered(self._headers, self.epoch, seq, control))


class Following:
    """A running service with one bus."""

    def __init__(self, service: Service, config: Config) -> None:
        self.service = service
        self._config = config

    def config(self, **changes: Any) -> Config:
        """The configuration with another bus, of the same name."""
        (bus,) = self._config.nats
        return msgspec.structs.replace(self._config, nats=(msgspec.structs.replace(bus, **changes),))

    @property
    def bus(self) -> BusStatus:
        (one,) = self.service.buses()
        return one.status()

    @property
    def dropped(self) -> int:
        (one,) = self.service.buses()
        return one.counters.dropped

    def stream(self, worker: str = "w") -> StreamStatus:
        return next(status for status in self.service.statuses() if status.stream == worker)

    def trust(self, worker: str = "w") -> Trust | None:
        return next((status.trust for status in self.service.statuses() if status.stream == worker), None)

    def held(self, worker: str = "w") -> set[int]:
        found = self.service.backend.snapshot()
        return {int.from_bytes(one.key.block_hash, "big") for one in found if one.worker_id == worker}

    def holds(self, numbers: range | set[int], worker: str = "w") -> None:
        """Wait until the worker holds these blocks and no others."""
        wait_until(lambda: self.held(worker) == set(numbers), f"{worker} holds {numbers}: {self.bus}")

    def is_believed(self, trust: Trust, worker: str = "w") -> None:
        """Wait until the worker is trusted so far: its stream shows a commit soon after the index does."""
        wait_until(lambda: self.trust(worker) is trust, f"{worker} is {trust}: {self.bus}")

    def lives(self) -> None:
        wait_until(lambda: self.bus.state is StreamState.LIVE, f"the bus is followed: {self.bus}")

    def says(self, problem: str) -> None:
        wait_until(lambda: problem in self.bus.problem, f"{problem!r} is said: {self.bus}")


@contextmanager
def stopped_writer(one: Following, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is committed meanwhile. The event is set once the writer stands still with its first messages."""
    stands, may_write = threading.Event(), threading.Event()
    apply = one.service.backend.apply

    def wait_and_apply(*arguments: object) -> object:
        stands.set()
        may_write.wait(30)
        return apply(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(one.service.backend, "apply", wait_and_apply)
    try:
        yield stands
    finally:
        may_write.set()


@contextmanager
def following(
    directory: Path, *servers: str, connection: dict[str, Any] | None = None, **options: Any
) -> Iterator[Following]:
    """A service with its index in `directory`; options are those of the bus, `queue_max_messages` of the writer."""
    reach = NatsServers(
        servers=servers,
        **({"connect_timeout_ms": 2000, "reconnect_max_ms": 200, "ping_interval_ms": 500} | (connection or {})),
    )
    writer = WriterConfig(queue_max_messages=options.pop("queue_max_messages", 10_000))
    options = {"name": "bus", "type": SourceType.VLLM, "connection": reach, "poll_ms": 100} | options
    config = Config(data_dir=str(directory / "index"), backend="lmdb", nats=(NatsConfig(**options),), writer=writer)
    service = Service(config)
    service.start()
    try:
        yield Following(service, config)
        assert service.failure() is None
    finally:
        service.stop(10)
