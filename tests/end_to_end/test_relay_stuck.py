"""A relay whose servers do not answer: it says so, goes to others, and ends in time all the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcensus.daemon.engine_replay import ReplayedEngine

from ..nats_servers import nats_server
from .daemon_process import wait_until
from .relay_process import Follower, RelayProcess, messages, stored
from .test_relay_reload import Reloaded, source

NEVER = "connect_timeout_ms = 600000\nping_interval_ms = 600000\n"


@contextmanager
def mute_port() -> Iterator[int]:
    """A port where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def configured(tmp_path: Path, url: str, engine: ReplayedEngine, relay: str = "") -> tuple[str, ...]:
    config = tmp_path / "relay.toml"
    config.write_text(
        f'[writer]\ndrain_deadline_ms = 200\n[relay]\nstream = "KV"\ncreate_stream = true\n{relay}'
        f'[relay.connection]\nservers = ["{url}"]\n{NEVER}' + source("w", engine)
    )
    return "--config", str(config)


def test_the_end_does_not_wait_for_a_server_that_says_nothing(tmp_path: Path) -> None:
    with mute_port() as port, ReplayedEngine(messages(10)) as engine:
        arguments = configured(tmp_path, f"nats://127.0.0.1:{port}", engine)
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish_rest()
            wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 9, "all is spooled")
            wait_until(lambda: "no server has let us in yet" in "".join(relaying.problems()), "it is not ready")
            assert relaying.terminate() == 0


def test_a_server_that_says_nothing_is_left_for_another_at_a_reload(tmp_path: Path) -> None:
    with mute_port() as port, nats_server(tmp_path) as server, ReplayedEngine(messages(10)) as engine:
        relaying = Reloaded(tmp_path, engine)
        relaying.write(server, source("w", engine))
        text = relaying.config.read_text()
        mute = text.replace(server.url, f"nats://127.0.0.1:{port}")
        relaying.config.write_text(mute.replace("reconnect_max_ms", f"{NEVER}reconnect_max_ms"))
        with relaying:
            engine.publish_rest()
            relaying.config.write_text(text)
            relaying.reload()
            relaying.wait_published_of("w", 9)


def test_a_server_that_stops_reading_is_told_of(tmp_path: Path) -> None:
    """With more on its way than the system keeps for a connection."""
    sent = messages(200, size=100_000)
    with nats_server(tmp_path) as server, ReplayedEngine(sent) as engine:
        arguments = configured(tmp_path, server.url, engine, "ack_timeout_ms = 1000\n")
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish(5)
            relaying.wait_published(4)
            server.pause()
            engine.publish_rest()
            wait_until(lambda: "acknowledges nothing for 1 s" in "".join(relaying.problems()), "it is not ready")
            server.go_on()
            relaying.wait_published(199, 60)
            assert relaying.problems() == []
        assert Follower(stored(server)).payloads == [message.payload for message in sent]


def test_the_end_does_not_wait_for_a_server_that_stops_reading(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, ReplayedEngine(messages(200, size=100_000)) as engine:
        arguments = configured(tmp_path, server.url, engine)
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish(5)
            relaying.wait_published(4)
            server.pause()
            engine.publish_rest()
            wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 199, "all is spooled")
            assert relaying.terminate() == 0
