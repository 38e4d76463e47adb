"""Dynamo's messages of every captured release, over each transport that can carry them, into the real daemon."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvcensus.translators.dynamo_envelope import Opened
from kvcensus.translators.media import Media

from ..dynamo_captures import NAMES, BusMessage, messages_of, published
from ..nats_servers import nats_server, talking
from .daemon_process import DaemonProcess, wait_until

Held = dict[str, dict[str, set[str]]]
"""By worker and tier: the blocks."""


def has_envelopes(name: str) -> bool:
    opened = [message.open() for message in messages_of(name)]
    return all(isinstance(one, Opened) and one.publisher_id is not None for one in opened)


WITH_ENVELOPES = [name for name in NAMES if has_envelopes(name)]
SUBJECT = "namespace.my-ns.component.back_end.endpoint.generate.kv-events"


def token_of(name: str) -> str:
    return name.replace(".", "-")


@pytest.fixture(scope="module", params=["core", "jetstream"])
def central(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that follows every capture as a bus of its own, with all of it sent."""
    directory = tmp_path_factory.mktemp(request.param)
    durable = request.param == "jetstream"
    with nats_server(directory) as server, talking(server.url) as client:
        table = "".join(
            f"[[nats]]\nname = '{name}'\ntype = 'dynamo'\nworker_prefix = '{name}:'\n"
            f"subjects = ['{token_of(name)}.>']\nstream = '{token_of(name) if durable else ''}'\n"
            f"[nats.connection]\nservers = ['{server.url}']\n"
            for name in NAMES
        )
        if durable:
            for name in NAMES:
                client.add_stream(token_of(name), [f"{token_of(name)}.>"])
        with following(directory, table) as daemon:
            wait_until(lambda: all(bus["state"] == "live" for bus in buses(daemon).values()), "every bus is followed")
            for name in NAMES:
                for subject, payload in nats_messages(name):
                    (client.store if durable else client.publish)(f"{token_of(name)}.{subject}", payload)
            yield daemon


def truth(name: str) -> Held:
    """What each worker held at the end of its last life."""
    lives: dict[int, list[str]] = defaultdict(list)
    last: dict[int, tuple[Any, str, int]] = {}
    for message in messages_of(name):
        opened = message.open()
        assert isinstance(opened, Opened)
        (address,) = opened.addresses
        ((low, high),) = opened.event_ids
        before = last.get(address.rank)
        if before is None or before[:2] != (address, opened.lineage) or low <= before[2]:
            lives[address.rank].append(f"{address.name}/{address.rank}")
        last[address.rank] = (address, opened.lineage, high)
    held: Held = {}
    for rank, workers in lives.items():
        for worker, life in zip(workers, published(name).held[rank], strict=True):
            held[worker] = {
                str(Media().tier_of(tier)): {block.to_bytes(8, "big").hex() for block in blocks}
                for tier, blocks in life.items()
                if blocks
            }
    return {worker: tiers for worker, tiers in held.items() if tiers}


def found(daemon: DaemonProcess, prefix: str = "") -> Held:
    held: Held = defaultdict(lambda: defaultdict(set))
    for record in daemon.snapshot():
        if record["worker_id"].startswith(prefix):
            held[record["worker_id"].removeprefix(prefix)][record["tier"]].add(record["block_hash"])
    return held


@contextmanager
def following(directory: Path, table: str) -> Iterator[DaemonProcess]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kvcensus.toml").write_text(table)
    with DaemonProcess(directory, "--config", str(directory / "kvcensus.toml")) as daemon:
        yield daemon


def buses(daemon: DaemonProcess) -> dict[str, dict[str, Any]]:
    return {bus["bus"]: bus for bus in daemon.get("/v1/streams")["buses"]}


def settled(daemon: DaemonProcess, name: str, prefix: str = "") -> None:
    expected = truth(name)
    wait_until(lambda: found(daemon, prefix) == expected, f"{name} is in the index")
    streams = [one for one in daemon.get("/v1/streams")["streams"] if one["stream"].startswith(prefix)]
    assert {stream["trust"] for stream in streams} == {"fresh"}
    assert all(daemon.metric("kvcensus_stream_gaps_total", stream=stream["stream"]) == 0 for stream in streams)


def frames_of(message: BusMessage) -> list[bytes]:
    if message.frames:
        return list(message.frames)
    opened = message.open()
    assert isinstance(opened, Opened)
    assert opened.publisher_id is not None
    assert opened.sequence is not None
    numbers = (opened.publisher_id.to_bytes(8, "big"), opened.sequence.to_bytes(8, "big"))
    return [b"kv-events", *numbers, b"\x01" + len(message.payload).to_bytes(4, "big") + message.payload]


def nats_messages(name: str) -> list[tuple[str, bytes]]:
    return [(one.subject or SUBJECT, one.payload or one.frames[-1][5:]) for one in messages_of(name)]


@pytest.mark.parametrize("name", WITH_ENVELOPES)
def test_over_zmq(name: str, tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        table = f"[[sources]]\ntype = 'dynamo'\nname = 'plane'\nendpoint = 'tcp://127.0.0.1:{port}'\n"
        with following(tmp_path, table) as daemon:
            wait_until(lambda: buses(daemon)["plane"]["state"] == "live", "the daemon follows")
            time.sleep(0.1)
            for message in messages_of(name):
                publisher.send_multipart(frames_of(message))
            settled(daemon, name)


@pytest.mark.parametrize("name", NAMES)
def test_over_nats(central: DaemonProcess, name: str) -> None:
    settled(central, name, f"{name}:")


def test_a_killed_daemon_goes_on_from_its_position(tmp_path: Path) -> None:
    name = "dynamo-1.1.1-jetstream"
    with nats_server(tmp_path) as server, talking(server.url) as client:
        client.add_stream("s", ["s.>"])
        table = (
            f"[[nats]]\nname = 'plane'\ntype = 'dynamo'\nstream = 's'\n[nats.connection]\nservers = ['{server.url}']\n"
        )
        with following(tmp_path, table) as daemon:
            for at, (subject, payload) in enumerate(nats_messages(name)):
                if at == 3:
                    wait_until(lambda: buses(daemon)["plane"]["position"] == 3, "the position is committed")
                    daemon.kill()
                client.store(f"s.{subject}", payload)
            daemon.start()
            settled(daemon, name)
            streams = daemon.get("/v1/streams")["streams"]
            assert (
                sum(daemon.metric("kvcensus_stream_applied_messages_total", stream=s["stream"]) for s in streams)
                == len(nats_messages(name)) - 3
            )
