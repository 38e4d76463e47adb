"""A stream in another JetStream domain: relay and daemon talk to a leaf node, the stream is at its hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.status import Trust

from ..daemon.nats_following import following, payload, wait_until
from ..nats_servers import NatsServer, free_port, nats_server, talking
from .probing import probed
from .relay_process import JETSTREAM, WORKER, RelayProcess

SENT = 30


class Servers(NamedTuple):
    hub: NatsServer
    leaf: NatsServer


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Each has a JetStream of its own, in the domain of its name."""
    port = free_port()

    def settings(name: str, leafnodes: dict[str, object]) -> dict[str, object]:
        return {"jetstream": {"store_dir": str(tmp_path / "store" / name), "domain": name}, "leafnodes": leafnodes}

    ours, theirs = {"listen": f"127.0.0.1:{port}"}, {"remotes": [{"url": f"nats-leaf://127.0.0.1:{port}"}]}
    with (
        nats_server(tmp_path / "nats", settings("hub", ours), name="hub") as hub,
        nats_server(tmp_path / "nats", settings("leaf", theirs), name="leaf") as leaf,
    ):
        wait_until(lambda: "Leafnode connection created" in leaf.log(), "the leaf reaches its hub")
        yield Servers(hub, leaf)


def relay_at(server: NatsServer, domain: str, engine: ReplayedEngine, directory: Path) -> RelayProcess:
    config = directory / "relay.toml"
    config.write_text(
        f'[[sources]]\nname = "{WORKER}"\nendpoint = "{engine.endpoint}"\n'
        f'replay_endpoint = "{engine.replay_endpoint}"\n'
        f'[relay]\nstream = "{JETSTREAM}"\ncreate_stream = true\n'
        f'[relay.connection]\nservers = ["{server.url}"]\njetstream_domain = "{domain}"\n'
    )
    return RelayProcess(directory / "relay", engine, "--config", str(config))


def test_a_stream_at_the_hub_is_made_filled_and_followed_through_the_leaf(tmp_path: Path, servers: Servers) -> None:
    sent = [RecordedMessage(0, (b"", seq.to_bytes(8, "big"), payload(seq))) for seq in range(SENT)]
    with ReplayedEngine(sent) as engine, relay_at(servers.leaf, "hub", engine, tmp_path) as relaying:
        engine.publish(SENT)
        relaying.wait_published(SENT - 1)
        with talking(servers.hub.url) as talk:
            assert talk.stream_info(JETSTREAM).state.messages >= SENT
        with following(tmp_path, servers.leaf.url, stream=JETSTREAM, connection={"jetstream_domain": "hub"}) as one:
            one.holds(range(SENT), WORKER)
            one.is_believed(Trust.FRESH, WORKER)


def test_the_probe_looks_into_the_domain(tmp_path: Path, servers: Servers) -> None:
    with talking(servers.hub.url) as talk:
        talk.add_stream(JETSTREAM, ["kvevents.>"])
    toml = (
        f'[[nats]]\nname = "fleet"\ntype = "vllm"\nstream = "{JETSTREAM}"\n'
        f'[nats.connection]\nservers = ["{servers.leaf.url}"]\njetstream_domain = '
    )
    assert probed(tmp_path, toml + json.dumps("hub")).bus["jetstream"]["name"] == JETSTREAM
    other = probed(tmp_path, toml + json.dumps("leaf")).bus
    assert f"{servers.leaf.url} in domain leaf has no stream {JETSTREAM}" in other["problem"]


def test_a_domain_that_nobody_has_is_named(tmp_path: Path, servers: Servers) -> None:
    with following(tmp_path, servers.leaf.url, stream=JETSTREAM, connection={"jetstream_domain": "moon"}) as one:
        one.says(f"JetStream is not enabled at {servers.leaf.url} in domain moon")
