"""A reload that hands a worker from one source to another: what the first one left is gone before the other begins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import zmq

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.model import Cursor
from kvcensus.daemon.config import Config, NatsConfig, NatsServers, SourceConfig, SourceType
from kvcensus.daemon.progress import never_followed
from kvcensus.daemon.service import Service

from ..nats_servers import Talk, nats_server, talking
from .nats_following import STREAM, Relay, payload, wait_until


class Both(NamedTuple):
    """A worker `w` that can be followed in two ways: an engine of its own, and a stream of a bus with blocks 0 to 4."""

    source: SourceConfig
    bus: NatsConfig
    talk: Talk
    engine: zmq.Socket[bytes]

    def is_heard_by(self, service: Service, seq: int) -> bool:
        """Let the engine store another block from 100 on, and say whether the index has one."""
        self.engine.send_multipart([b"", seq.to_bytes(8, "big"), payload(100 + seq)])
        return max(held(service), default=0) >= 100


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    with (
        nats_server(tmp_path / "nats") as server,
        talking(server.url) as talk,
        zmq.Context() as context,
        context.socket(zmq.PUB) as engine,
    ):
        talk.add_stream(STREAM, ["kvevents.>"])
        Relay(talk, durable=True).send(*range(5))
        endpoint = f"tcp://127.0.0.1:{engine.bind_to_random_port('tcp://127.0.0.1')}"
        servers = NatsServers(servers=(server.url,))
        bus = NatsConfig(name="bus", type=SourceType.VLLM, stream=STREAM, connection=servers)
        yield Both(SourceConfig(name="w", endpoint=endpoint), bus, talk, engine)


def held(service: Service) -> set[int]:
    return {int.from_bytes(one.key.block_hash, "big") for one in service.backend.snapshot()}


def test_a_worker_goes_from_a_source_to_a_bus_and_back(tmp_path: Path, both: Both) -> None:
    alone = Config(data_dir=str(tmp_path / "index"), backend="lmdb", sources=(both.source,))
    relayed = msgspec.structs.replace(alone, sources=(), nats=(both.bus,))
    service = Service(alone)
    service.start()
    numbers = count()
    try:
        for _ in range(3):
            wait_until(lambda: both.is_heard_by(service, next(numbers)), "the engine is followed")
            service.reload(relayed)
            wait_until(lambda: [one.status().position for one in service.buses()] == [5], "the bus is read")
            assert held(service) == set(range(5))
            assert service.backend.cursors()["w"].source == "bus"
            service.reload(alone)
            assert not held(service) & set(range(5))
    finally:
        service.stop(10)


def test_a_new_source_takes_its_worker_from_a_bus_that_stays(tmp_path: Path, both: Both) -> None:
    relayed = Config(data_dir=str(tmp_path / "index"), backend="lmdb", nats=(both.bus,))
    service = Service(relayed)
    service.start()
    numbers = count(100)
    try:
        wait_until(lambda: held(service) == set(range(5)), "the bus is read")
        service.reload(msgspec.structs.replace(relayed, sources=(both.source,)))
        assert [(one.stream, one.source) for one in service.statuses()] == [("w", "w")]
        wait_until(lambda: both.is_heard_by(service, next(numbers)), "the engine is followed")
        assert not held(service) & set(range(5))
        other = Relay(both.talk, "other", durable=True)
        Relay(both.talk, durable=True).send(5)
        other.send(7)
        wait_until(lambda: 7 in held(service), "the bus is followed")
        assert 5 not in held(service)
        assert service.backend.cursors()["w"].source == "w"
    finally:
        service.stop(10)


def test_a_worker_that_left_its_bus_stays_away_though_the_process_ended_before_it_was_forgotten(tmp_path: Path) -> None:
    servers = NatsServers(servers=("nats://127.0.0.1:1",))
    bus = NatsConfig(name="bus", type=SourceType.VLLM, stream=STREAM, connection=servers)
    backend = LmdbBackend(tmp_path)
    backend.apply([], [never_followed(Cursor(stream="w", epoch=3, seq=9, source="bus", worker_id="w"))])
    backend.close()
    service = Service(Config(data_dir=str(tmp_path), backend="lmdb", nats=(bus,)))
    try:
        service.start()
        assert service.statuses() == []
        assert service.backend.cursors() == {}
    finally:
        service.stop(10)


def test_a_worker_that_a_source_took_over_from_a_bus_is_no_longer_that_of_the_bus(tmp_path: Path) -> None:
    servers = NatsServers(servers=("nats://127.0.0.1:1",))
    bus = NatsConfig(name="bus", type=SourceType.VLLM, stream=STREAM, connection=servers)
    backend = LmdbBackend(tmp_path)
    backend.apply([], [Cursor(stream="w", epoch=3, seq=9, source="bus", worker_id="w", life="spool:1")])
    backend.close()
    alone = Config(data_dir=str(tmp_path), backend="lmdb", nats=(bus,))
    both = msgspec.structs.replace(alone, sources=(SourceConfig(name="w", endpoint="tcp://127.0.0.1:1"),))
    for config, followed in ((both, [("w", "w", 9)]), (alone, [])):
        service = Service(config)
        try:
            service.start()
            assert [(one.stream, one.source, one.last_seq) for one in service.statuses()] == followed
        finally:
            service.stop(10)
