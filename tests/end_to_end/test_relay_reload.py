"""SIGHUP to a relay: sources come, go and change while the others are relayed, and the bus may be another one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine

from ..nats_servers import NatsServer, nats_server
from .daemon_process import wait_until
from .relay_process import Follower, Publishing, RelayProcess, messages, stored


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path) as running:
        yield running


def source(name: str, engine: ReplayedEngine, more: str = "") -> str:
    endpoints = f'endpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"'
    return f'[[sources]]\nname = "{name}"\n{endpoints}\n{more}\n'


class Reloaded(RelayProcess):
    """A relay whose configuration is written again and again."""

    def __init__(self, directory: Path, engine: ReplayedEngine) -> None:
        self.config = directory / "relay.toml"
        super().__init__(directory / "relay", engine, "--config", str(self.config))

    def write(self, server: NatsServer, *sources: str, relay: str = "", connection: str = "") -> None:
        bus = f'[relay]\nstream = "KV"\ncreate_stream = true\n{relay}\n'
        servers = f'[relay.connection]\nservers = ["{server.url}"]\nreconnect_max_ms = 500\n{connection}\n'
        self.config.write_text(bus + servers + "".join(sources))

    def reload(self, event: str = "reloaded") -> dict[str, object]:
        """SIGHUP, and the line of the log that says what came of it."""

        def lines() -> list[dict[str, object]]:
            return [line for line in self.log() if line["event"] == event]

        before = len(lines())
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(lines()) > before, event, 60)
        return lines()[-1]

    def published(self) -> dict[str, int]:
        """The last acknowledged number by stream."""
        return {one["stream"]: one["published_seq"] for one in self.state()["streams"]}

    def wait_published_of(self, name: str, seq: int) -> None:
        wait_until(lambda: self.published().get(name) == seq, f"number {seq} of {name} is published", 60)


def test_sources_are_added_and_removed_while_another_one_is_relayed(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(1000)
    with ReplayedEngine(sent) as steady, ReplayedEngine(messages(40, seed=8)) as other:
        relay = Reloaded(tmp_path, steady)
        relay.write(server, source("steady", steady))
        with relay:
            publishing = Publishing(steady, len(sent))
            publishing.start()
            relay.write(server, source("steady", steady), source("other", other))
            relay.reload()
            other.publish(20)
            relay.wait_published_of("other", 19)

            relay.write(server, source("steady", steady))
            relay.reload()
            assert relay.published().keys() == {"steady"}
            wait_until(lambda: other.subscribers == 0, "nobody listens to it")
            other.publish(10)

            relay.write(server, source("steady", steady), source("other", other))
            relay.reload()
            relay.wait_published_of("other", 29)
            publishing.join()
            relay.wait_published_of("steady", len(sent) - 1)
            assert relay.terminate() == 0
    for name, numbers in (("steady", range(1000)), ("other", range(30))):
        follower = Follower([one for one in stored(server) if one.worker == name])
        assert follower.last == numbers[-1]
        assert len(follower.payloads) == len(numbers), "it went on from where it was, as the same life"
        assert (follower.lives, follower.fences, follower.duplicates) == (1, [], 0)


def test_a_source_that_is_changed_under_load_loses_and_doubles_nothing(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(2000)
    with ReplayedEngine(sent) as engine:
        relay = Reloaded(tmp_path, engine)
        relay.write(server, source("w", engine))
        with relay:
            publishing = Publishing(engine, len(sent))
            publishing.start()
            for model in "abcd":
                relay.write(server, source("w", engine, f'model = "{model}"'))
                relay.reload()
            publishing.join()
            relay.wait_published_of("w", len(sent) - 1)
            assert relay.metric("kvcensus_relay_duplicate_acknowledgements_total") == 0
            assert relay.terminate() == 0
    deliveries = stored(server)
    follower = Follower(deliveries)
    assert follower.payloads == [message.payload for message in sent]
    assert (follower.lives, follower.fences, follower.duplicates) == (1, [], 0)
    assert deliveries[-1].model == "d"


def test_it_goes_on_over_another_server_with_what_the_first_one_did_not_take(
    tmp_path: Path, server: NatsServer
) -> None:
    sent = messages(400)
    with ReplayedEngine(sent) as engine, nats_server(tmp_path / "other") as other:
        relay = Reloaded(tmp_path, engine)
        relay.write(server, source("w", engine))
        with relay:
            engine.publish(100)
            relay.wait_published_of("w", 99)
            server.kill()
            engine.publish(200)
            wait_until(lambda: bool(relay.problems()), "the first server is missed")
            relay.write(other, source("w", engine))
            relay.reload()
            engine.publish_rest()
            relay.wait_published_of("w", 399)
            assert relay.problems() == []
        server.start()
        payloads = [one.payload for one in (*stored(server), *stored(other)) if not one.control]
        assert payloads == [message.payload for message in sent]


def test_a_secret_that_was_replaced_is_used_at_once_and_nothing_else_connects_anew(
    tmp_path: Path, server: NatsServer
) -> None:
    token = tmp_path / "token"
    token.write_text("the-first-one\n")
    token.chmod(0o600)
    with ReplayedEngine(messages(20)) as engine:
        relay = Reloaded(tmp_path, engine)
        relay.write(server, source("w", engine), connection=f'token_file = "{token}"')
        with relay:
            engine.publish(10)
            relay.wait_published_of("w", 9)
            relay.reload()
            assert relay.metric("kvcensus_relay_connections_total") == 1
            token.write_text("another-one\n")
            relay.reload()
            wait_until(lambda: relay.metric("kvcensus_relay_connections_total") == 2, "it has connected anew")
            engine.publish_rest()
            relay.wait_published_of("w", 19)


def test_what_cannot_be_changed_while_it_runs_is_named_and_stays(tmp_path: Path, server: NatsServer) -> None:
    with ReplayedEngine(messages(20)) as engine:
        relay = Reloaded(tmp_path, engine)
        relay.write(server, source("w", engine))
        with relay:
            relay.write(server, source("w", engine), relay='heartbeat_ms = 100\nprefix = "elsewhere"')
            assert relay.reload()["needs_restart"] == ["relay.prefix", "relay.heartbeat_ms"]
            relay.config.write_text("nonsense")
            relay.reload("reload_refused")
            relay.write(server)
            assert "nothing to relay" in str(relay.reload("reload_refused")["detail"])
            engine.publish_rest()
            relay.wait_published_of("w", 19)
    assert len(stored(server)) == 21, "twenty messages and the beginning of the life, on the subject as before"


def test_a_relay_from_flags_has_nothing_to_read_and_goes_on(tmp_path: Path, server: NatsServer) -> None:
    with (
        ReplayedEngine(messages(5)) as engine,
        RelayProcess(tmp_path / "relay", engine, "--nats", server.url, "--create-stream") as relay,
    ):
        assert relay.process is not None
        relay.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(line["event"] == "reload_ignored" for line in relay.log()), "it says so")
        engine.publish_rest()
        relay.wait_published(4)
