"""A bus over core NATS, with real servers: what arrives is applied, what does not is fenced, and both are said."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kvcensus.daemon.config import SourceType
from kvcensus.daemon.status import StreamState, Trust
from kvcensus.daemon.streams.delivery import Control

from ..nats_servers import NatsServer, each_server, nats_server, secret_file, talking
from .nats_following import Following, Relay, following, stopped_writer, wait_until


@pytest.fixture(params=each_server())
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats", program=request.param) as running:
        yield running


@pytest.fixture
def current(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats") as running:
        yield running


def test_workers_are_found_by_what_they_send(server: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, server.url) as one, talking(server.url) as talk:
        one.lives()
        for worker in ("a", "b"):
            Relay(talk, worker).send(*range(5))
        one.holds(range(5), "a")
        one.holds(range(5), "b")
        one.is_believed(Trust.FRESH, "a")
        assert one.bus.workers == 2
        assert one.service.readiness().ready


def test_a_missing_message_fences_its_worker_alone(current: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, current.url) as one, talking(current.url) as talk:
        one.lives()
        a, b = Relay(talk, "a"), Relay(talk, "b")
        a.send(0, 1, 2)
        b.send(0, 1)
        a.send(4)
        b.send(2)
        one.holds({4}, "a")
        one.holds(range(3), "b")
        one.is_believed(Trust.UNTRUSTED, "a")
        assert "1 messages were lost before number 4" in one.stream("a").reason
        one.is_believed(Trust.FRESH, "b")


def test_a_lost_connection_is_doubt_until_the_next_number_or_sign_of_life(server: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, server.url) as one:
        one.lives()
        with talking(server.url) as talk:
            a, b = Relay(talk, "a"), Relay(talk, "b")
            a.send(0, 1)
            b.send(0, 1)
            one.holds(range(2), "b")
            server.kill()
            wait_until(lambda: one.bus.state is StreamState.DISCONNECTED, "the loss is noticed")
            one.says(f"nothing listens at {server.url}")
            one.is_believed(Trust.STALE, "a")
            problems = one.service.readiness().problems
            assert problems == [f"bus bus: nothing listens at {server.url}"]
            server.start()
            one.lives()
            assert one.bus.problem == ""
            one.is_believed(Trust.STALE, "a")
            a.send(2)
            b.beat(1)
            wait_until(lambda: one.trust("a") is Trust.FRESH, "the next number proves it")
            wait_until(lambda: one.trust("b") is Trust.FRESH, "the sign of life proves it")


def test_what_was_sent_while_the_connection_was_down_is_a_gap(current: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, current.url) as one:
        one.lives()
        with talking(current.url) as talk:
            relay = Relay(talk)
            relay.send(0, 1)
            one.holds(range(2))
            current.kill()
            wait_until(lambda: one.bus.state is StreamState.DISCONNECTED, "the loss is noticed")
            current.start()
            one.lives()
            relay.send(5)
            one.holds({5})
            one.is_believed(Trust.UNTRUSTED)


def test_a_relay_that_has_lost_its_engine_says_so(current: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, current.url) as one, talking(current.url) as talk:
        one.lives()
        relay = Relay(talk)
        relay.send(0)
        one.holds(range(1))
        relay.beat(0, Control.GONE)
        wait_until(lambda: one.trust() is Trust.STALE, "the engine is gone")
        relay.beat(0)
        wait_until(lambda: one.trust() is Trust.FRESH, "the engine is back")


def test_a_message_on_two_subscriptions_is_taken_once(current: NatsServer, tmp_path: Path) -> None:
    subjects = ("kvevents.>", "kvevents.*.w.*", "kvevents.*.*.*")
    with following(tmp_path, current.url, subjects=subjects) as one, talking(current.url) as talk:
        one.lives()
        Relay(talk).send(*range(100))
        one.holds(range(100))
        (worker,) = one.service.stream_counters()
        assert worker.intake.messages == 100
        assert worker.intake.duplicates == 0


def test_a_queue_group_of_others_takes_nothing_from_us(current: NatsServer, tmp_path: Path) -> None:
    async def ignore(message: object) -> None:
        pass

    with following(tmp_path, current.url) as one, talking(current.url) as talk:
        talk.do(talk.client.subscribe("kvevents.>", queue="routers", cb=ignore))
        one.lives()
        Relay(talk).send(*range(50))
        one.holds(range(50))


def test_a_slow_writer_makes_messages_wait_and_then_drop_which_is_counted_and_fences(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the writer is stopped the queue fills, then the buffers of the client, and the loop never blocks."""
    options = {"queue_max_messages": 100, "pending_max_messages": 200}
    with following(tmp_path, current.url, **options) as one, talking(current.url) as talk:
        one.lives()
        relay = Relay(talk)
        with stopped_writer(one, monkeypatch) as stands:
            relay.send(0)
            assert stands.wait(60)
            relay.send(*range(1, 3000))
            wait_until(lambda: one.dropped > 0, "messages are dropped")
            assert one.bus.state is StreamState.LIVE
        later = count(3000)

        def is_through() -> bool:
            relay.send(next(later))
            return max(one.held(), default=0) >= 3000

        wait_until(is_through, "the buffers are empty and messages come through")
        one.is_believed(Trust.UNTRUSTED)
        assert len(one.held()) < 3000


@pytest.mark.parametrize("most", [3000, 10_000])
def test_what_waits_for_a_slow_writer_is_applied_in_order_however_it_waits(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Up to half of the bound waits opened, the rest as it came: of 3,000 and a sign of life all, or the first half."""
    options = {"queue_max_messages": 100, "pending_max_messages": most}
    with following(tmp_path, current.url, **options) as one, talking(current.url) as talk:
        one.lives()
        relay = Relay(talk)
        relay.send(0)
        one.holds(range(1))
        with stopped_writer(one, monkeypatch) as stands:
            relay.send(1)
            assert stands.wait(60)
            relay.send(*range(2, 1200))
            relay.beat(1199)
            relay.send(*range(1200, 3000))
            (bus,) = one.service.buses()
            seen = 3000 if most == 10_000 else 1500
            wait_until(lambda: bus.counters.messages >= seen, "they are taken in")
            assert one.bus.state is StreamState.LIVE
        one.holds(range(3000))
        one.is_believed(Trust.FRESH)
        assert one.dropped == 0
        (worker,) = one.service.stream_counters()
        assert worker.intake.gaps == worker.intake.duplicates == 0


@pytest.mark.parametrize(("most", "sent", "opened"), [(65_536, 2000, 2000), (10_000, 7000, 5000)])
def test_a_lost_connection_is_noticed_while_the_writer_stands_still_and_what_waits_is_applied_and_proves_nothing(
    current: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, sent: int, opened: int
) -> None:
    """It waits opened, and the rest as it came."""
    options = {"queue_max_messages": 100, "pending_max_messages": most}
    with talking(current.url) as talk, following(tmp_path, current.url, **options) as one:
        one.lives()
        relay = Relay(talk)
        relay.send(0)
        one.holds(range(1))
        with stopped_writer(one, monkeypatch) as stands:
            relay.send(1)
            assert stands.wait(60)
            relay.send(*range(2, sent))
            (bus,) = one.service.buses()
            wait_until(lambda: bus.counters.messages >= opened, "they are taken in")
            assert one.bus.pending > 1000
            current.kill()
            wait_until(lambda: one.bus.state is StreamState.DISCONNECTED, "the loss is noticed")
        one.holds(range(sent))
        wait_until(lambda: one.bus.pending == 0, "nothing waits any more")
        current.start()
        one.lives()
        one.is_believed(Trust.STALE)


def test_what_has_arrived_is_applied_before_the_end(current: NatsServer, tmp_path: Path) -> None:
    with talking(current.url) as talk:
        with following(tmp_path, current.url) as one:
            one.lives()
            Relay(talk).send(*range(2000))
        with following(tmp_path, current.url) as again:
            assert again.held() == set(range(2000))
            assert again.stream().last_seq == 1999


def test_messages_that_cannot_be_read_are_refused_and_the_others_go_on(current: NatsServer, tmp_path: Path) -> None:
    with following(tmp_path, current.url, type=SourceType.DYNAMO, subjects=("x",)) as one, talking(current.url) as talk:
        one.lives()
        talk.publish("x", b"rubbish")
        talk.publish("x", b"")
        (bus,) = one.service.buses()
        wait_until(lambda: bus.counters.messages == 2, "both have come")
        assert one.bus.state is StreamState.LIVE


# Subjects without permission


def users(*allowed: str) -> dict[str, object]:
    us = {"user": "kv", "password": "x", "permissions": {"subscribe": list(allowed)}}
    return {"authorization": {"users": [us, {"user": "relay", "password": "y"}]}}


@pytest.fixture
def reach(tmp_path: Path) -> dict[str, object]:
    return {"user": "kv", "password_file": str(secret_file(tmp_path / "password", "x"))}


def lives_again(one: Following) -> None:
    wait_until(lambda: not one.bus.problem, "nothing is wrong any more")
    one.lives()


def test_a_subject_without_permission_is_named_and_tried_again(tmp_path: Path, reach: dict[str, object]) -> None:
    with (
        nats_server(tmp_path / "nats", users("kvalive.>")) as server,
        following(tmp_path, server.url, connection=reach) as one,
    ):
        one.says(f"{reach['password_file']} has no permission to subscribe to kvevents.*.*.*")
        readiness = one.service.readiness()
        assert not readiness.ready
        assert one.bus.problem in readiness.problems[0]
        server.reload(**users("kvalive.>", "kvevents.>"))
        lives_again(one)
        with talking(server.url, user="relay", password="y") as talk:
            Relay(talk).send(0)
            one.holds(range(1))


def test_a_refused_subject_does_not_stop_the_others(tmp_path: Path, reach: dict[str, object]) -> None:
    with (
        nats_server(tmp_path / "nats", users("kvevents.>")) as server,
        following(tmp_path, server.url, connection=reach) as one,
    ):
        one.says("has no permission to subscribe to kvalive.*.*.*")
        one.lives()
        with talking(server.url, user="relay", password="y") as talk:
            Relay(talk).send(0)
            one.holds(range(1))
        server.reload(**users("kvevents.>", "kvalive.>"))
        lives_again(one)


def test_a_permission_that_is_withdrawn(tmp_path: Path, reach: dict[str, object]) -> None:
    with (
        nats_server(tmp_path / "nats", users("kvevents.>", "kvalive.>")) as server,
        following(tmp_path, server.url, connection=reach) as one,
    ):
        one.lives()
        server.reload(**users("kvalive.>"))
        one.says("has no permission to subscribe to kvevents.*.*.*")
        server.reload(**users("kvalive.>", "kvevents.>"))
        lives_again(one)


def test_signs_of_life_that_are_withdrawn_end_nobody(tmp_path: Path, reach: dict[str, object]) -> None:
    leases = {"lease_ms": 4000, "stale_after_ms": 6000}
    with (
        nats_server(tmp_path / "nats", users("kvevents.>", "kvalive.>")) as server,
        following(tmp_path, server.url, connection=reach, **leases) as one,
        talking(server.url, user="relay", password="y") as talk,
    ):
        one.lives()
        relay = Relay(talk)
        relay.send(0)
        one.holds(range(1))
        relay.beat(0)
        server.reload(**users("kvevents.>"))
        one.is_believed(Trust.STALE)
        server.reload(**users("kvevents.>", "kvalive.>"))
        one.is_believed(Trust.FRESH)


def test_one_subject_of_two_that_is_withdrawn_is_doubt(tmp_path: Path, reach: dict[str, object]) -> None:
    one_of_them, both = ("kvevents._.a.*", "kvalive.>"), ("kvevents._.a.*", "kvevents._.b.*", "kvalive.>")
    with (
        nats_server(tmp_path / "nats", users(*both)) as server,
        following(tmp_path, server.url, connection=reach, subjects=both[:2]) as one,
        talking(server.url, user="relay", password="y") as talk,
    ):
        one.lives()
        a, b = Relay(talk, "a"), Relay(talk, "b")
        a.send(0)
        b.send(0)
        one.is_believed(Trust.FRESH, "b")
        server.reload(**users(*one_of_them))
        one.says("has no permission to subscribe to kvevents._.b.*")
        b.send(1)
        one.is_believed(Trust.STALE, "b")
        a.send(1)
        one.is_believed(Trust.FRESH, "a")
        server.reload(**users(*both))
        lives_again(one)
        one.is_believed(Trust.STALE, "b")
        b.send(2)
        one.is_believed(Trust.UNTRUSTED, "b")
