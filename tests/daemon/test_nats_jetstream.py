"""A bus over JetStream, with real servers: nothing is lost that the stream still has, and what it lost is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree as copy_tree
from shutil import rmtree as remove_tree
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvcensus.daemon import service
from kvcensus.daemon.config import SourceType
from kvcensus.daemon.sources.jetstream_api import Place, place_of
from kvcensus.daemon.status import StreamState, Trust
from kvcensus.daemon.streams.delivery import Control

from ..nats_servers import NatsServer, Talk, each_server, nats_cluster, nats_server, secret_file, talking
from .nats_following import STREAM, Following, Relay, following, payload, stopped_writer, wait_until


@pytest.fixture(params=each_server())
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats", program=request.param) as running:
        yield running


@pytest.fixture
def current(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats") as running:
        yield running


def stream(talk: Talk, **config: Any) -> None:
    talk.add_stream(STREAM, ["kvevents.>"], **config)


def keeps_up(one: Following, position: int) -> None:
    wait_until(lambda: one.bus.position == position, f"the stream is read up to {position}: {one.bus}")


# Where it begins and goes on


def test_what_was_sent_before_the_first_start_and_what_comes_later(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(*range(50))
        with following(tmp_path, server.url, stream=STREAM) as one:
            one.holds(range(50))
            one.lives()
            relay.send(*range(50, 100))
            one.holds(range(100))
            keeps_up(one, 100)
            wait_until(lambda: one.bus.pending == 0, "nothing is left to read")
            one.is_believed(Trust.FRESH)


def test_a_restart_goes_on_from_the_position_in_the_index(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(*range(20))
        with following(tmp_path, server.url, stream=STREAM) as one:
            one.holds(range(20))
        relay.send(*range(20, 30))
        with following(tmp_path, server.url, stream=STREAM) as again:
            again.holds(range(30))
            (worker,) = again.service.stream_counters()
            assert worker.intake.messages == 10
            assert worker.intake.duplicates == 0
            assert again.trust() is Trust.FRESH
            assert again.stream().epoch == 1


def test_messages_without_any_numbering_survive_a_restart(current: NatsServer, tmp_path: Path) -> None:
    """Only the position, committed with what it brought, tells a repeated message from a new life."""
    subjects = ("kvevents._.w.-",)
    with talking(current.url) as talk:
        stream(talk)
        for seq in range(10):
            talk.store(subjects[0], payload(seq), {"Kv-Engine": "vllm"})
        for _ in range(3):
            with following(tmp_path, current.url, stream=STREAM) as one:
                one.lives()
                one.holds(range(10))
                keeps_up(one, 10)
                assert one.stream().epoch == 1
                assert one.stream().last_seq == 9


def test_a_message_with_headers_of_its_own_is_in_order_with_those_before_it(
    current: NatsServer, tmp_path: Path
) -> None:
    with talking(current.url) as talk:
        stream(talk)
        usual, other = Relay(talk, durable=True), Relay(talk, durable=True, topic="other")
        usual.send(0, 1, 2)
        other.send(3)
        usual.send(4)
        with following(tmp_path, current.url, stream=STREAM) as one:
            keeps_up(one, 5)
            one.holds(range(5))
            one.is_believed(Trust.FRESH)
            (worker,) = one.service.stream_counters()
            assert worker.intake.gaps == worker.intake.duplicates == 0


def test_other_subjects_of_the_stream_are_passed_over(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        talk.add_stream(STREAM, ["kvevents.>", "other.>"])
        relay = Relay(talk, durable=True)
        options = {"stream": STREAM, "subjects": ("kvevents.*.*.*", "more")}
        with following(tmp_path, current.url, **options) as one:
            for seq in range(5):
                talk.store("other.thing", b"rubbish")
                relay.send(seq)
            one.holds(range(5))
            keeps_up(one, 10)
            talk.store("other.thing", b"rubbish")
            keeps_up(one, 11)
            one.is_believed(Trust.FRESH)


def test_signs_of_life_come_over_core_nats(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(0)
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds(range(1))
            one.lives()
            relay.beat(0, Control.GONE)
            wait_until(lambda: one.trust() is Trust.STALE, "the engine is gone")


def test_signs_of_life_that_may_not_be_heard_any_more_end_nobody(tmp_path: Path) -> None:
    def users(*denied: str) -> dict[str, object]:
        us = {"user": "kv", "password": "x", "permissions": {"subscribe": {"deny": list(denied)}}}
        return {"authorization": {"users": [us, {"user": "relay", "password": "y"}]}}

    reach = {"user": "kv", "password_file": str(secret_file(tmp_path / "password", "x"))}
    with (
        nats_server(tmp_path / "nats", users()) as server,
        talking(server.url, user="relay", password="y") as talk,
    ):
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(0)
        options = {"stream": STREAM, "lease_ms": 4000, "stale_after_ms": 6000}
        with following(tmp_path, server.url, connection=reach, **options) as one:
            one.holds(range(1))
            one.lives()
            relay.beat(0)
            server.reload(**users("kvalive.>"))
            one.is_believed(Trust.STALE)
            relay.send(1)
            one.holds(range(2))
            one.is_believed(Trust.FRESH)


def test_a_full_queue_asks_for_nothing_and_loses_nothing(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    options = {"stream": STREAM, "queue_max_messages": 100, "pending_max_messages": 200}
    with talking(current.url) as talk:
        stream(talk)
        with following(tmp_path, current.url, **options) as one:
            one.lives()
            apply = one.service.backend.apply

            def wait_and_apply(*arguments: object) -> object:
                may_write.wait(30)
                return apply(*arguments)  # type: ignore[arg-type]

            monkeypatch.setattr(one.service.backend, "apply", wait_and_apply)
            Relay(talk, durable=True).send(*range(800))
            wait_until(lambda: one.service.queue_depth()[0] >= 100, "the queue is full")
            wait_until(lambda: one.bus.pending > 300, "what is left to read is known")
            may_write.set()
            one.holds(range(800))
            one.is_believed(Trust.FRESH)


def test_a_bus_that_is_changed_while_the_writer_waits_is_taken_up_when_all_of_it_is_committed(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    monkeypatch.setattr(service, "_LONG_S", 0)
    with talking(current.url) as talk, following(tmp_path, current.url, stream=STREAM) as one:
        stream(talk)
        one.lives()
        (bus,) = one.service.buses()
        with stopped_writer(one, monkeypatch), capture_logs() as lines:
            Relay(talk, durable=True).send(*range(50))
            wait_until(lambda: bus.counters.messages == 50, "all are on their way to the writer")
            changed = one.config(stale_after_ms=12_345)
            reload = threading.Thread(target=one.service.reload, args=(changed, lambda: looks.append(None)))
            reload.start()
            wait_until(lambda: len(looks) >= 3 or not reload.is_alive(), "it waits")
            assert one.service.buses() == []
        reload.join()
        assert [line["event"] for line in lines].count("reload_waits") == 1
        one.lives()
        one.holds(range(50))
        keeps_up(one, 50)
        assert {found.ref_count for found in one.service.backend.snapshot()} == {1}


def test_the_end_comes_before_a_reload_that_waits_for_the_writer(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(current.url) as talk, following(tmp_path, current.url, stream=STREAM) as one:
        stream(talk)
        one.lives()
        with stopped_writer(one, monkeypatch):
            Relay(talk, durable=True).send(0)
            one.service.reload(one.config(stale_after_ms=12_345), lambda: True)
            assert one.service.buses() == []


# What goes wrong while it is followed


def test_a_killed_server_loses_nothing(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk, following(tmp_path, server.url, stream=STREAM) as one:
        one.says(f"{server.url} has no stream KV")
        stream(talk)
        one.lives()
        relay = Relay(talk, durable=True)
        relay.send(*range(10))
        one.holds(range(10))
        server.kill()
        wait_until(lambda: one.bus.state is StreamState.DISCONNECTED, "the loss is noticed")
        one.is_believed(Trust.STALE)
        server.start()
        relay.send(*range(10, 20))
        one.holds(range(20))
        one.lives()
        one.is_believed(Trust.FRESH)
        assert one.stream().epoch == 1


def test_a_consumer_that_is_gone_is_made_again(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.lives()
            relay.send(*range(10))
            one.holds(range(10))
            for number in range(1, 4):
                wait_until(lambda: bool(talk.do(talk.jetstream.consumers_info(STREAM))), "there is a consumer")
                for consumer in talk.do(talk.jetstream.consumers_info(STREAM)):
                    talk.do(talk.jetstream.delete_consumer(STREAM, consumer.name))
                relay.send(*range(10 * number, 10 * number + 10))
                one.holds(range(10 * number + 10))
            one.is_believed(Trust.FRESH)
        assert talk.do(talk.jetstream.consumers_info(STREAM)) == []


def test_a_stream_that_is_deleted_and_made_anew_fences_all(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk:
        stream(talk)
        a, b = Relay(talk, "a", durable=True), Relay(talk, "b", durable=True)
        with following(tmp_path, server.url, stream=STREAM) as one:
            a.send(*range(5))
            b.send(*range(5))
            one.holds(range(5), "b")
            talk.delete_stream(STREAM)
            stream(talk)
            a.send(5)
            one.holds({5}, "a")
            one.holds(set(), "b")
            assert one.trust("a") is one.trust("b") is Trust.UNTRUSTED
            assert one.stream("b").reason == "stream KV was deleted and made anew"
            keeps_up(one, 1)


def test_a_stream_made_anew_while_we_were_away(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(*range(5))
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds(range(5))
        talk.delete_stream(STREAM)
        stream(talk)
        relay.send(*range(5, 15))
        with following(tmp_path, current.url, stream=STREAM) as again:
            again.holds(range(5, 15))
            assert again.trust() is Trust.UNTRUSTED


def test_a_missing_stream_is_said_and_awaited(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        with following(tmp_path, current.url, stream=STREAM) as one:
            relay.send(0)
            one.holds(range(1))
            talk.delete_stream(STREAM)
            one.says(f"{current.url} has no stream KV")
            stream(talk)
            one.lives()
            assert one.bus.problem == ""


# What the stream no longer has


def test_messages_that_expired_before_they_were_read(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk:
        stream(talk, max_msgs=10)
        relay = Relay(talk, durable=True)
        relay.send(*range(5))
        with following(tmp_path, server.url, stream=STREAM) as one:
            one.holds(range(5))
        relay.send(*range(5, 30))
        with following(tmp_path, server.url, stream=STREAM) as again:
            again.holds(range(20, 30))
            assert again.trust() is Trust.UNTRUSTED
            assert "were lost before number 20" in again.stream().reason


def test_a_purge_before_the_messages_were_read(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        a, b = Relay(talk, "a", durable=True), Relay(talk, "b", durable=True)
        a.send(*range(5))
        b.send(*range(5))
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds(range(5), "b")
        a.send(5)
        talk.purge_stream(STREAM)
        with following(tmp_path, current.url, stream=STREAM) as again:
            wait_until(lambda: again.trust("a") is Trust.UNTRUSTED, "the loss is told although nothing follows it")
            assert again.trust("b") is Trust.UNTRUSTED, "nobody knows whose it was"
            assert again.stream("b").reason == "messages 11 to 11 of stream KV were gone before they were read"


def test_what_was_read_may_go(current: NatsServer, tmp_path: Path) -> None:
    """A stream that expires what we have is no loss, whether we are there or not."""
    with talking(current.url) as talk:
        stream(talk, max_msgs=3)
        relay = Relay(talk, durable=True)
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.lives()
            for seq in range(10):
                relay.send(seq)
                one.holds(range(seq + 1))
            talk.purge_stream(STREAM)
            relay.send(10)
            one.holds(range(11))
            one.is_believed(Trust.FRESH)
        talk.purge_stream(STREAM)
        with following(tmp_path, current.url, stream=STREAM) as again:
            again.lives()
            again.holds(range(11))
            assert again.trust() is Trust.FRESH


def test_a_message_deleted_from_the_middle(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        a, b = Relay(talk, "a", durable=True), Relay(talk, "b", durable=True)
        a.send(0, 1)
        b.send(0)
        talk.do(talk.jetstream.delete_msg(STREAM, 2))
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds({0}, "b")
            wait_until(lambda: one.trust("a") is Trust.UNTRUSTED, "the loss is told")


def test_a_loss_is_told_behind_the_messages_before_it(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        stream(talk)
        a, b = Relay(talk, "a", durable=True), Relay(talk, "b", durable=True)
        a.send(0, 1, 2)
        b.send(0, 1)
        talk.do(talk.jetstream.delete_msg(STREAM, 4))
        with following(tmp_path, current.url, stream=STREAM) as one:
            keeps_up(one, 5)
            one.is_believed(Trust.UNTRUSTED, "a")
            assert one.stream("a").last_seq == 2
        with following(tmp_path, current.url, stream=STREAM) as again:
            assert again.stream("a").last_seq == 2


def test_a_purge_while_the_writer_waits_is_noticed_without_a_message_after_it(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    options = {"stream": STREAM, "queue_max_messages": 10, "pending_max_messages": 20}
    with talking(current.url) as talk:
        stream(talk)
        with following(tmp_path, current.url, **options) as one:
            one.lives()
            apply = one.service.backend.apply

            def wait_and_apply(*arguments: object) -> object:
                may_write.wait(30)
                return apply(*arguments)  # type: ignore[arg-type]

            monkeypatch.setattr(one.service.backend, "apply", wait_and_apply)
            Relay(talk, durable=True).send(*range(1000))
            wait_until(lambda: one.service.queue_depth()[0] >= 10, "the queue is full")
            talk.purge_stream(STREAM)
            may_write.set()
            keeps_up(one, 1000)
            one.is_believed(Trust.UNTRUSTED)
            assert "of stream KV were gone before they were read" in one.stream().reason


def test_a_lost_connection_is_noticed_while_the_writer_stands_still(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(current.url) as talk, following(tmp_path, current.url, stream=STREAM, queue_max_messages=10) as one:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(0)
        one.is_believed(Trust.FRESH)
        with stopped_writer(one, monkeypatch) as stands:
            relay.send(1)
            assert stands.wait(60)
            relay.send(*range(2, 1000))
            wait_until(lambda: one.service.queue_depth()[0] >= 10, "the queue is full")
            current.kill()
            one.is_believed(Trust.STALE)
        current.start()
        one.holds(range(1000))
        one.is_believed(Trust.FRESH)
        assert {found.ref_count for found in one.service.backend.snapshot()} == {1}


def test_a_stream_that_went_back(current: NatsServer, tmp_path: Path) -> None:
    """A server restored from a copy of its store: numbers that were read are given to other messages."""
    store = tmp_path / "nats" / "n1" / "store"
    with talking(current.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(*range(5))
        current.stop()
        copy_tree(store, tmp_path / "copy")
        current.start()
        relay.send(*range(5, 10))
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds(range(10))
        current.stop()
        remove_tree(store)
        copy_tree(tmp_path / "copy", store)
        current.start()
        with following(tmp_path, current.url, stream=STREAM) as again:
            wait_until(lambda: again.trust() is Trust.UNTRUSTED, "the loss is told")
            assert again.stream().reason.startswith("stream KV ends at 5, before 10, which was read already")
            relay.send(*range(10, 15))
            keeps_up(again, 10)


def test_a_stream_that_went_back_and_has_passed_where_it_was(current: NatsServer, tmp_path: Path) -> None:
    """As before, but there are as many new messages as were lost by the time that anybody looks."""
    store = tmp_path / "nats" / "n1" / "store"
    with talking(current.url) as talk:
        stream(talk)
        relay, other = Relay(talk, durable=True), Relay(talk, "other", durable=True)
        other.send(0)
        current.stop()
        copy_tree(store, tmp_path / "copy")
        current.start()
        relay.send(*range(9))
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.holds(range(9))
            keeps_up(one, 10)
        with following(tmp_path, current.url, stream=STREAM) as one:
            one.is_believed(Trust.FRESH, "other")
        current.stop()
        remove_tree(store)
        copy_tree(tmp_path / "copy", store)
        current.start()
        other.send(1)
        relay.send(*range(9, 20))
        with following(tmp_path, current.url, stream=STREAM) as again:
            keeps_up(again, 13)
            again.is_believed(Trust.UNTRUSTED, "other")
            assert again.stream("other").reason.startswith(
                "message 10 of stream KV is another than the one that was read"
            )


# What is refused


def test_jetstream_that_is_not_enabled(tmp_path: Path) -> None:
    with (
        nats_server(tmp_path / "nats", jetstream=False) as server,
        following(tmp_path, server.url, stream=STREAM) as one,
    ):
        one.says(f"JetStream is not enabled at {server.url}, or its cluster has no leader")
        assert not one.service.readiness().ready


def test_a_stream_that_drops_what_somebody_has_read(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk, following(tmp_path, current.url, stream=STREAM) as one:
        stream(talk, retention="workqueue")
        one.says("stream KV has retention workqueue: it drops messages once somebody has read them")


@pytest.mark.parametrize(
    ("denied", "said"),
    [
        ("$JS.API.STREAM.INFO.KV", "has no permission to publish to $JS.API.STREAM.INFO.KV"),
        ("$JS.API.CONSUMER.CREATE.>", "has no permission to publish to $JS.API.CONSUMER.CREATE.KV.kvcensus-"),
        ("$JS.API.CONSUMER.MSG.NEXT.>", "has no permission to publish to $JS.API.CONSUMER.MSG.NEXT.KV.kvcensus-"),
    ],
)
def test_a_subject_without_permission(server: NatsServer, tmp_path: Path, denied: str, said: str) -> None:
    def users(deny: list[str]) -> dict[str, object]:
        us = {"user": "kv", "password": "x", "permissions": {"publish": {"deny": deny}, "subscribe": [">"]}}
        return {"authorization": {"users": [us, {"user": "relay", "password": "y"}]}}

    server.reload(**users([denied]))
    reach = {"user": "kv", "password_file": str(secret_file(tmp_path / "password", "x"))}
    with talking(server.url, user="relay", password="y") as talk:
        stream(talk)
        Relay(talk, durable=True).send(0)
        with following(tmp_path, server.url, connection=reach, stream=STREAM) as one:
            one.says(said)
            server.reload(**users([]))
            one.holds(range(1))
            wait_until(lambda: not one.bus.problem, "nothing is wrong any more")


def test_a_message_that_is_larger_than_may_wait(server: NatsServer, tmp_path: Path) -> None:
    with talking(server.url) as talk:
        stream(talk)
        relay = Relay(talk, durable=True)
        relay.send(*range(20))
        talk.store(relay.subject, bytes(5000))
        with following(tmp_path, server.url, stream=STREAM, pending_max_bytes=4000) as one:
            one.says("message 21 of stream KV is larger than half of pending_max_bytes (4000)")
            keeps_up(one, 20)
            assert one.held() == set(range(20))


# A cluster


def test_a_cluster_survives_its_leaders(tmp_path: Path) -> None:
    with nats_cluster(tmp_path / "nats") as cluster, talking(*cluster.urls) as talk:
        stream(talk, num_replicas=3)
        relay = Relay(talk, durable=True)
        with following(tmp_path, *cluster.urls, stream=STREAM) as one:
            relay.send(*range(10))
            one.holds(range(10))
            killed = cluster.leader_of(STREAM)
            killed.kill()
            wait_until(lambda: stored(relay, 10), "another leader takes messages", 60)
            relay.send(*range(11, 20))
            one.holds(range(20))
            killed.start()
            talk.do(talk.client.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{STREAM}", b"", timeout=10))
            wait_until(lambda: stored(relay, 20), "another leader takes messages", 60)
            one.holds(range(21))
            one.lives()
            one.is_believed(Trust.FRESH)
            assert one.stream().epoch == 1


def stored(relay: Relay, seq: int) -> bool:
    try:
        relay.send(seq)
    except Exception:  # noqa: BLE001 - no leader yet
        return False
    return True


# The protocol


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("$JS.ACK.KV.c.1.7.5.1700000000000000000.3", Place(7, 5, 3, 1_700_000_000_000_000_000)),
        ("$JS.ACK.hub.ACCHASH.KV.c.1.7.5.1700000000000000000.3", Place(7, 5, 3, 1_700_000_000_000_000_000)),
        ("$JS.ACK._.ACCHASH.KV.c.1.7.5.1700000000000000000.3.token", Place(7, 5, 3, 1_700_000_000_000_000_000)),
        ("", None),
        ("_INBOX.a.b", None),
        ("$JS.ACK.KV.c.1.x.5.1700000000000000000.3", None),
    ],
)
def test_the_place_of_a_message(reply: str, place: Place | None) -> None:
    assert place_of(reply) == place


def test_dynamo_in_jetstream_takes_every_subject_of_the_stream(current: NatsServer, tmp_path: Path) -> None:
    event = b'{"worker_id":7,"event":{"event_id":0,"data":{"stored":{"parent_hash":null,"blocks":[%s]}},"dp_rank":0}}'
    body = event % b'{"block_hash":1,"tokens_hash":2}'
    with talking(current.url) as talk:
        talk.add_stream(STREAM, ["any.*"])
        talk.store("any.queue", body)
        with following(tmp_path, current.url, type=SourceType.DYNAMO, stream=STREAM) as one:
            one.holds({1}, "7/0")
