"""The relay between a real engine's sockets and a real JetStream: what dies, and what the stream has afterwards.

KVCENSUS_RELAY_KILLS=100 makes the kills a longer drill.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nats.js.api import DiscardPolicy

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.relay.convention import delivery_of
from kvcensus.daemon.streams.delivery import Control, Delivery

from ..nats_servers import NatsServer, nats_server, talking
from .daemon_process import wait_until
from .relay_process import JETSTREAM, WORKER, Follower, Publishing, RelayProcess, messages, stored

KILLS = int(os.environ.get("KVCENSUS_RELAY_KILLS", "8"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path) as running:
        yield running


def relay(tmp_path: Path, engine: ReplayedEngine, server: NatsServer, *arguments: str) -> RelayProcess:
    return RelayProcess(tmp_path / "relay", engine, "--nats", server.url, "--create-stream", *arguments)


def test_kill_nine_of_the_relay_loses_nothing_and_doubles_nothing(tmp_path: Path, server: NatsServer) -> None:
    source = random.Random(1)
    sent = messages(700 * KILLS)
    with ReplayedEngine(sent) as engine:
        relaying = relay(tmp_path, engine, server).start()
        publishing = Publishing(engine, len(sent))
        publishing.start()
        for _ in range(KILLS):
            time.sleep(source.uniform(0.05, 0.8))
            relaying.kill()
            relaying.start()
        publishing.join()
        relaying.wait_published(len(sent) - 1)
        relaying.kill()
    follower = Follower(stored(server))
    assert follower.payloads == [message.payload for message in sent]
    assert follower.lives == 1
    assert follower.duplicates == 0


def test_kill_nine_of_the_broker_loses_nothing(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(4000)
    with ReplayedEngine(sent) as engine, relay(tmp_path, engine, server) as relaying:
        publishing = Publishing(engine, len(sent))
        publishing.start()
        for _ in range(4):
            time.sleep(0.5)
            server.kill()
            wait_until(lambda: bool(relaying.problems()), "the relay notices")
            assert str(server.port) in relaying.problems()[0]
            server.start()
        publishing.join()
        relaying.wait_published(len(sent) - 1)
        assert relaying.problems() == []
        assert relaying.metric("kvcensus_relay_connections_total") > 1
    follower = Follower(stored(server))
    assert follower.payloads == [message.payload for message in sent]
    assert follower.lives == 1


def test_kills_of_relay_and_broker_mixed_lose_nothing(tmp_path: Path, server: NatsServer) -> None:
    source = random.Random(2)
    sent = messages(500 * KILLS)
    with ReplayedEngine(sent) as engine:
        relaying = relay(tmp_path, engine, server).start()
        publishing = Publishing(engine, len(sent))
        publishing.start()
        for _ in range(KILLS):
            time.sleep(source.uniform(0.05, 0.5))
            victims = source.sample([relaying, server], source.randint(1, 2))
            for victim in victims:
                victim.kill()
            time.sleep(source.uniform(0.0, 0.3))
            for victim in victims:
                victim.start()
        publishing.join()
        relaying.wait_published(len(sent) - 1)
        relaying.kill()
    follower = Follower(stored(server))
    assert follower.payloads == [message.payload for message in sent]
    assert follower.lives == 1


def test_an_outage_within_the_bound_delivers_everything(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(3000)
    with ReplayedEngine(sent) as engine, relay(tmp_path, engine, server) as relaying:
        engine.publish(100)
        relaying.wait_published(99)
        server.kill()
        engine.publish_rest()
        wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 2999, "all is spooled")
        assert relaying.metric("kvcensus_relay_spool_records") >= 2900
        assert relaying.metric("kvcensus_relay_spool_oldest_age_seconds") > 0
        server.start()
        relaying.wait_published(2999)
        assert relaying.metric("kvcensus_relay_spool_records") == 0
    assert Follower(stored(server)).payloads == [message.payload for message in sent]


BOUNDED = """
[relay]
spool_max_bytes = 1048576

[relay.connection]
servers = ["{url}"]

[[sources]]
name = "pod-1"
endpoint = "{endpoint}"
replay_endpoint = "{replay_endpoint}"
max_message_bytes = 1000000
"""


def test_an_outage_beyond_the_bound_drops_the_oldest_and_says_so(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(5000, size=1000)
    with ReplayedEngine(sent) as engine:
        config = tmp_path / "relay.toml"
        config.write_text(
            BOUNDED.format(url=server.url, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        )
        arguments = ("--config", str(config), "--stream", JETSTREAM, "--create-stream")
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish(100)
            relaying.wait_published(99)
            server.kill()
            engine.publish_rest()
            wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 4999, "all is spooled")
            assert relaying.state()["waiting_bytes"] <= 1 << 20
            server.start()
            relaying.wait_published(4999)
            dropped = relaying.metric("kvcensus_relay_stream_dropped_messages_total", stream=WORKER, cause="bound")
            relaying.terminate()
            said = [line for line in relaying.log() if line["event"] == "messages_dropped"]
    deliveries = stored(server)
    follower = Follower(deliveries)
    (lost_to,) = {delivery.seq for delivery in deliveries if delivery.control is Control.FENCE}
    assert follower.payloads == [message.payload for message in sent[lost_to + 1 :]]
    assert dropped == lost_to + 1 - 100
    assert sum(line["messages"] for line in said) == dropped
    assert {(line["worker"], line["cause"]) for line in said} == {(WORKER, "bound")}


def test_what_is_left_at_the_end_is_sent_at_the_next_start(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(500)
    with ReplayedEngine(sent) as engine:
        relaying = relay(tmp_path, engine, server).start()
        engine.publish(100)
        relaying.wait_published(99)
        server.kill()
        engine.publish_rest()
        wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 499, "all is spooled")
        started = time.monotonic()
        assert relaying.terminate() == 0
        assert time.monotonic() - started < 5
        server.start()
        engine.lose_buffer()
        relaying.start()
        wait_until(lambda: relaying.state()["waiting"] == 0 and relaying.state()["connected"], "the spool is sent")
        relaying.terminate()
    payloads = [delivery.payload for delivery in stored(server) if not delivery.control]
    assert payloads == [message.payload for message in sent]


def test_the_end_waits_for_what_is_under_way(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(9000)
    with ReplayedEngine(sent) as engine:
        relaying = relay(tmp_path, engine, server).start()
        engine.publish_rest()
        wait_until(lambda: relaying.state()["streams"][0]["spooled_seq"] == 8999, "all is spooled")
        assert relaying.terminate() == 0
        assert relaying.log()[-1]["all_published"]
    assert Follower(stored(server)).payloads == [message.payload for message in sent]


def test_another_life_of_the_engine_is_another_epoch(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(300, seed=1) + messages(200, seed=2)
    with ReplayedEngine(sent) as engine, relay(tmp_path, engine, server) as relaying:
        engine.publish(300)
        relaying.wait_published(299)
        engine.publish_rest()
        relaying.wait_published(199)
    deliveries = stored(server)
    assert [delivery.epoch for delivery in deliveries if delivery.control is Control.LIFE] == [1, 2]
    assert Follower(deliveries).payloads == [message.payload for message in sent[300:]]


def test_a_hole_is_told_though_the_source_tolerates_it(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(5) + messages(5, first=6)
    with ReplayedEngine(sent) as engine:
        config = tmp_path / "relay.toml"
        text = BOUNDED.format(url=server.url, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        config.write_text(text + 'on_hole = "tolerate"\nreplay_attempts = 1\n')
        arguments = ("--config", str(config), "--stream", JETSTREAM, "--create-stream")
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish(5)
            relaying.wait_published(4)
            engine.publish_rest()
            relaying.wait_published(10)
            warned = [line["detail"] for line in relaying.log() if line["event"] == "configuration"]
    follower = Follower(stored(server))
    assert follower.fences == [5]
    assert follower.payloads == [message.payload for message in sent[5:]]
    assert any("on_hole" in detail for detail in warned)


def test_a_lost_spool_is_another_lineage(tmp_path: Path, server: NatsServer) -> None:
    sent = messages(300)
    with ReplayedEngine(sent) as engine:
        relaying = relay(tmp_path, engine, server).start()
        engine.publish(200)
        relaying.wait_published(199)
        lineage = relaying.state()["lineage"]
        relaying.kill()
        shutil.rmtree(relaying.spool)
        relaying.start()
        engine.publish_rest()
        relaying.wait_published(299)
        relaying.kill()
    deliveries = stored(server)
    assert [delivery.lineage == lineage for delivery in deliveries] == [True] * 201 + [False] * 301
    follower = Follower(deliveries)
    assert (follower.lives, follower.payloads) == (2, [message.payload for message in sent])


def test_a_message_that_the_server_does_not_take_is_a_fence(tmp_path: Path) -> None:
    sent = [*messages(3), *messages(1, size=9000, first=3), *messages(3, first=4)]
    with (
        nats_server(tmp_path, {"max_payload": 4096}) as server,
        ReplayedEngine(sent) as engine,
        relay(tmp_path, engine, server) as relaying,
    ):
        engine.publish_rest()
        relaying.wait_published(6)
        metric = "kvcensus_relay_stream_dropped_messages_total"
        assert relaying.metric(metric, stream=WORKER, cause="too_large") == 1
        assert [line["seq"] for line in relaying.log() if line["event"] == "message_too_large"] == [3]
        told = [(delivery.seq, delivery.control) for delivery in stored(server)]
    assert told == [
        (-1, "life"), (0, ""), (1, ""), (2, ""), (3, "fence"), (4, ""), (5, ""), (6, ""),
    ]  # fmt: skip


def test_a_message_that_the_stream_does_not_take_is_a_fence(tmp_path: Path, server: NatsServer) -> None:
    sent = [*messages(3), *messages(1, size=9000, first=3), *messages(3, first=4)]
    with talking(server.url) as talk:
        talk.add_stream(JETSTREAM, ["kvevents.>"], max_msg_size=4096)
    with ReplayedEngine(sent) as engine, relay(tmp_path, engine, server) as relaying:
        engine.publish_rest()
        relaying.wait_published(6)
        told = [(delivery.seq, delivery.control) for delivery in stored(server)]
    assert [one for one in told if one[0] == 3] == [(3, "fence")]
    assert [seq for seq, control in told if not control] == [0, 1, 2, 4, 5, 6]


def test_a_missing_stream_is_named_until_somebody_makes_it(tmp_path: Path, server: NatsServer) -> None:
    with (
        ReplayedEngine(messages(10)) as engine,
        RelayProcess(tmp_path / "relay", engine, "--nats", server.url) as relaying,
    ):
        engine.publish_rest()
        wait_until(lambda: bool(relaying.problems()), "it is not ready")
        (problem,) = relaying.problems()
        assert f"there is no stream {JETSTREAM}" in problem
        with talking(server.url) as talk:
            talk.add_stream(JETSTREAM, ["kvevents.>"])
        relaying.wait_published(9)
        assert relaying.problems() == []


def test_a_stream_with_other_subjects_is_named(tmp_path: Path, server: NatsServer) -> None:
    with talking(server.url) as talk:
        talk.add_stream(JETSTREAM, ["elsewhere.>"])
        with ReplayedEngine(messages(10)) as engine, relay(tmp_path, engine, server) as relaying:
            engine.publish_rest()
            wait_until(lambda: bool(relaying.problems()), "it is not ready")
            assert "kvevents._.pod-1.-" in relaying.problems()[0]
            talk.add_stream("OTHER", ["kvevents.>"])
            wait_until(lambda: "error 10060" in "".join(relaying.problems()), "the other stream refuses")


def test_a_subject_without_permission_is_named(tmp_path: Path) -> None:
    settings = {"authorization": {"users": [{"user": "u", "password": "p", "permissions": {"publish": ["$JS.API.>"]}}]}}
    secret = tmp_path / "password"
    secret.write_text("p")
    secret.chmod(0o600)
    with nats_server(tmp_path, settings) as server, ReplayedEngine(messages(10)) as engine:
        config = tmp_path / "relay.toml"
        text = BOUNDED.format(url=server.url, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        config.write_text(text.replace("[[sources]]", f'user = "u"\npassword_file = "{secret}"\n\n[[sources]]'))
        arguments = ("--config", str(config), "--stream", JETSTREAM, "--create-stream")
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            engine.publish_rest()
            wait_until(lambda: bool(relaying.problems()), "it is not ready")
            assert "no permission to publish to kvevents._.pod-1.-" in relaying.problems()[0]
            assert str(secret) in relaying.problems()[0]


@pytest.fixture
def beats(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Delivery]]:
    """The signs of life as they come."""
    found: list[Delivery] = []

    async def note(message: object) -> None:
        beat = delivery_of(message.subject, message.headers, message.data)  # type: ignore[attr-defined]
        assert isinstance(beat, Delivery)
        found.append(beat)

    monkeypatch.setenv("KVCENSUS__RELAY__HEARTBEAT_MS", "100")
    with talking(server.url) as talk:
        talk.do(talk.client.subscribe("kvalive.>", cb=note))
        yield found


def test_signs_of_life_follow_the_engine(tmp_path: Path, server: NatsServer, beats: list[Delivery]) -> None:
    with ReplayedEngine(messages(30)) as engine:
        relaying = relay(tmp_path, engine, server).start()
        engine.publish(20)
        wait_until(lambda: bool(beats) and beats[-1].seq == 19, "a sign of life")
        assert (beats[-1].worker, beats[-1].epoch, beats[-1].control) == (WORKER, 1, Control.ALIVE)
        assert beats[-1].lineage == relaying.state()["lineage"]
        engine.stop()
        wait_until(lambda: beats[-1].control is Control.GONE, "the engine is gone")
        relaying.terminate()
        assert beats[-1].control is Control.GONE


def test_who_cannot_tell_what_was_missed_gives_no_sign_of_life(
    tmp_path: Path, server: NatsServer, beats: list[Delivery]
) -> None:
    with ReplayedEngine(messages(30)) as engine:
        config = tmp_path / "relay.toml"
        config.write_text(BOUNDED.format(url=server.url, endpoint=engine.endpoint, replay_endpoint=""))
        arguments = ("--config", str(config), "--stream", JETSTREAM, "--create-stream")
        with RelayProcess(tmp_path / "relay", engine, *arguments) as relaying:
            wait_until(lambda: engine.subscribers == 1, "it listens")
            engine.publish(10)
            wait_until(lambda: bool(beats) and beats[-1].seq == 9, "a sign of life")
            assert beats[-1].control is Control.ALIVE
            relaying.kill()
            engine.publish(5)
            relaying.start()
            wait_until(lambda: relaying.state()["streams"][0]["state"] == "live", "it is back")
            before = len(beats)
            wait_until(lambda: len(beats) > before + 3, "further signs")
            assert {beat.control for beat in beats[before + 1 :]} == {Control.GONE}
            engine.publish(1)
            wait_until(lambda: beats[-1].seq == 15 and beats[-1].control is Control.ALIVE, "it is sure again")


def test_who_cannot_publish_gives_no_sign_of_life(tmp_path: Path, server: NatsServer, beats: list[Delivery]) -> None:
    """Signs of life need no stream: followers would have the worker for up to date, and what it says waits here."""
    with talking(server.url) as talk, ReplayedEngine(messages(20)) as engine:
        talk.add_stream(JETSTREAM, ["kvevents.*.*.*"], max_msgs=11, discard=DiscardPolicy.NEW)
        with RelayProcess(tmp_path / "relay", engine, "--nats", server.url) as relaying:
            engine.publish(10)
            wait_until(lambda: bool(beats) and beats[-1].seq == 9, "a sign of life")
            engine.publish(10)
            wait_until(lambda: "maximum messages exceeded" in "".join(relaying.problems()), "the stream is full")
            wait_until(lambda: beats[-1].control is Control.GONE, "those of before have come")
            before = len(beats)
            wait_until(lambda: len(beats) > before + 3, "further signs")
            assert {beat.control for beat in beats[before + 1 :]} == {Control.GONE}
            talk.purge_stream(JETSTREAM)
            wait_until(lambda: beats[-1].control is Control.ALIVE, "it publishes again")


def test_two_relays_do_not_share_a_spool(tmp_path: Path, server: NatsServer) -> None:
    with ReplayedEngine(messages(1)) as engine, relay(tmp_path, engine, server) as relaying:
        other = relay(tmp_path, engine, server).start(wait=False)
        assert other.process is not None
        assert other.process.wait(20) == 75
        assert str(relaying.process.pid) in other.log_path.read_text()  # type: ignore[union-attr]
