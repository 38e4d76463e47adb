"""Whose a message of Dynamo is, and where it stands, whatever it is wrapped in."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.translators.dynamo_envelope import (
    CACHE_OWNER,
    DEFAULT_SUBJECTS,
    DynamoAddress,
    Opened,
    Origin,
    open_dynamo,
    open_dynamo_frames,
    parse_subject,
)
from kvcensus.translators.translation import Rejection, RejectReason

from .dynamo_messages import ENCODINGS, PUBLISHED_MS, envelope, event, in_json, pack, removed, stored

IN_EVERY_ENCODING = pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
GOOD = event(stored(1, 2), 4)
BIG = 17226992070398917606


def opened(payload: bytes) -> Opened:
    result = open_dynamo(payload)
    assert isinstance(result, Opened)
    return result


def refused(payload: bytes) -> Rejection:
    result = open_dynamo(payload)
    assert isinstance(result, Rejection)
    assert result.raw == payload
    return result


# envelope


def test_an_envelope_tells_publisher_sequence_time_and_topic() -> None:
    inner = pack([GOOD])
    assert opened(envelope(inner, BIG, 2**64 - 1)) == Opened(
        BIG, 2**64 - 1, PUBLISHED_MS, "kv-events", inner, [DynamoAddress(7, 0)], [(4, 4)], first=0
    )


@pytest.mark.parametrize(
    ("payload", "lineage"),
    [
        (envelope([GOOD], BIG), str(BIG)),
        (envelope(event(stored(1), worker=BIG, rank=3), BIG), f"{BIG}/3"),
        (envelope([], BIG), str(BIG)),
        (in_json(GOOD), ""),
    ],
    ids=["a publisher of its own", "a worker's, one a rank", "nobody's events", "no envelope"],
)
def test_the_lineage_is_whose_numbers_they_are(payload: bytes, lineage: str) -> None:
    assert opened(payload).lineage == lineage


@pytest.mark.parametrize("inner", [pack(GOOD), in_json(GOOD)], ids=["msgpack", "json"])
def test_one_event_needs_no_array(inner: bytes) -> None:
    assert opened(envelope(inner)).addresses == [DynamoAddress(7, 0)]
    assert opened(envelope(inner)).inner == inner
    assert opened(inner).addresses == [DynamoAddress(7, 0)]
    assert opened(inner).inner == inner


@pytest.mark.parametrize(("tier", "first"), [({}, 0), ({"storage_tier": "device"}, 1)], ids=["before 1.1", "since 1.1"])
def test_without_an_envelope_the_events_number_themselves(tier: dict[str, Any], first: int) -> None:
    payload = in_json(event(removed(1), 9, **tier))
    assert opened(payload) == Opened(None, None, 0, "", payload, [DynamoAddress(7, 0)], [(9, 9)], first)


@IN_EVERY_ENCODING
def test_each_worker_rank_and_domain_is_an_address_with_its_own_numbers(encode: Callable[[Any], bytes]) -> None:
    events = [
        event(stored(1), 5, BIG),
        event(stored(1), 8, BIG, residency_domain=CACHE_OWNER, storage_tier="disk"),
        event("cleared", 3, BIG),
        event(removed(1), 6, BIG, rank=1, residency_domain="worker"),
        event(removed(1), 4, BIG),
    ]
    result = opened(encode(events))

    assert result.addresses == [DynamoAddress(BIG, 0), DynamoAddress(BIG, 0, CACHE_OWNER), DynamoAddress(BIG, 1)]
    assert result.event_ids == [(3, 5), (8, 8), (6, 6)]
    assert [address.name for address in result.addresses] == [str(BIG), f"{BIG}@cache_owner", str(BIG)]


def test_the_rank_is_0_where_it_is_not_sent() -> None:
    assert opened(in_json({"worker_id": 7, "event": {"event_id": 0, "data": removed(1)}})).addresses == [
        (7, 0, "worker")
    ]


def test_a_domain_that_makes_no_sense_is_the_worker_s_to_refuse() -> None:
    for domain in (None, "galaxy", 7):
        assert opened(envelope([event("cleared", residency_domain=domain)])).addresses == [DynamoAddress(7, 0)]


def test_an_empty_array_is_nobody_s() -> None:
    assert opened(envelope([])).addresses == []


@pytest.mark.parametrize(("topic", "found"), [("kv-events", 1), ("kv-state-events-v2", 1), ("kv_metrics", 0), ("", 0)])
def test_only_kv_events_are_somebody_s(topic: str, found: int) -> None:
    result = opened(envelope([GOOD, {"other": 1}], topic=topic))
    assert (len(result.addresses), len(result.rejections)) == (found, found)


# what is bad


@IN_EVERY_ENCODING
@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"event": {"event_id": 1, "data": "cleared"}}, ".worker_id"),
        (event("cleared", worker="7"), ".worker_id"),  # type: ignore[arg-type]
        ({"worker_id": 7}, ".event"),
        ({"worker_id": 7, "event": {"data": "cleared"}}, ".event_id"),
        (event("cleared", -1), ".event.event_id"),
        (event("cleared", rank=-1), ".event.dp_rank"),
        (event("cleared", rank=2**31), ".event.dp_rank"),
        (5, ""),
    ],
)
def test_an_event_that_does_not_say_whose_it_is_costs_only_itself(
    encode: Callable[[Any], bytes], bad: Any, field: str
) -> None:
    result = opened(encode([GOOD, bad, event("cleared", 5)]))

    assert (result.addresses, result.event_ids) == ([DynamoAddress(7, 0)], [(4, 5)])
    (rejection,) = result.rejections
    assert (rejection.reason, rejection.event) == (RejectReason.EVENT_SHAPE, 1)
    assert rejection.field == f"events[1]{field}"
    assert rejection.raw in (pack(bad), in_json(bad))


def test_a_worker_id_of_more_than_64_bits_is_none() -> None:
    result = opened(in_json([GOOD, event("cleared", worker=2**64)]))
    assert [rejection.field for rejection in result.rejections] == ["events[1].worker_id"]
    assert opened(in_json(event("cleared", worker=-5))).addresses == [DynamoAddress(-5, 0)]


@pytest.mark.parametrize("inner", [b"", b"\xc1", b"{", pack([1, 2]), pack("text"), pack([GOOD])[:-1], b"[" + b"{}" * 3])
def test_an_envelope_tells_its_number_even_if_nothing_in_it_can_be_read(inner: bytes) -> None:
    result = opened(envelope(inner, 5, 17))
    assert (result.publisher_id, result.sequence, result.addresses) == (5, 17, [])
    assert len(result.rejections) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"{}",
        b'{"type":"io.nats.jetstream.api.v1.stream_info_response"}',
        b'{"worker_id":' + b"9" * 5000 + b"}",
        b"\xff\xff",
        pack({"publisher_id": 1}),
        pack([1.5, [["BlockRemoved", [1]]], 0]),
        envelope([GOOD])[:-1],
        b"\x91" * 5000,
        b"[" * 5000,
    ],
)
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    refused(payload)


@given(st.binary() | st.builds(lambda inner: envelope(inner), st.binary()) | st.text().map(str.encode))
def test_no_bytes_raise(payload: bytes) -> None:
    assert isinstance(open_dynamo(payload), Opened | Rejection)


@given(st.integers(0, 300), st.binary(min_size=1, max_size=4))
def test_damage_never_raises(at: int, damage: bytes) -> None:
    payload = envelope([GOOD, event(removed(1), 5)])
    at = min(at, len(payload) - 1)
    assert isinstance(open_dynamo(payload[:at] + damage + payload[at + len(damage) :]), Opened | Rejection)


# the ZMQ event plane


def frames(message: bytes, publisher: int = 5, sequence: int = 3) -> list[bytes]:
    framed = b"\x01" + len(message).to_bytes(4, "big") + message
    return [b"kv-events", publisher.to_bytes(8, "big"), sequence.to_bytes(8, "big"), framed]


def test_frames_of_the_event_plane_are_opened() -> None:
    message = envelope([GOOD], 5, 3)
    assert open_dynamo_frames(frames(message)) == open_dynamo(message)


@pytest.mark.parametrize(
    "bad",
    [
        [],
        frames(envelope([GOOD], 5, 3))[:3],
        [b"kv-events", b"12345678", b"1234567", b"\x01\0\0\0\0"],
        [*frames(envelope([GOOD], 5, 3))[:3], b""],
        [*frames(envelope([GOOD], 5, 3))[:3], b"\x02\0\0\0\0"],
        [*frames(envelope([GOOD], 5, 3))[:3], b"\x01\0\0\0\x09"],
        frames(envelope([GOOD], 5, 3), sequence=4),
        frames(envelope([GOOD], 5, 3), publisher=6),
        frames(b"nothing"),
        frames(pack([GOOD])),
    ],
)
def test_frames_that_are_not_of_the_event_plane_are_refused(bad: list[bytes]) -> None:
    assert isinstance(open_dynamo_frames(bad), Rejection)


@given(st.lists(st.binary(), max_size=5))
def test_no_frames_raise(some: list[bytes]) -> None:
    assert isinstance(open_dynamo_frames(some), Opened | Rejection)


# subjects


@pytest.mark.parametrize(
    ("subject", "origin"),
    [
        ("namespace.ns.component.backend.kv_events", Origin("ns", "backend")),
        ("namespace.my-ns.component.back_end.kv-events", Origin("my-ns", "back_end")),
        ("namespace.my-ns.component.back_end.endpoint.generate.kv-events", Origin("my-ns", "back_end", "generate")),
        ("namespace.a%2Eb.component.%C3%A9.endpoint.x%25.kv-events", Origin("a.b", "é", "x%")),
        ("namespace.a.b.component.backend.kv-events", Origin("a.b", "backend")),
        ("namespace.ns.component.backend.kv-state-events-v2", Origin("ns", "backend")),
        ("namespace.ns.component.backend.endpoint.e.kv-state-events-v2", Origin("ns", "backend", "e")),
        ("namespace-ns-component-backend-kv-events.queue", Origin("ns", "backend")),
        ("namespace-my-ns-component-back-end-kv-events.kv-events", Origin("my-ns", "back-end")),
        ("namespace.ns.component.backend.kv-metrics", None),
        ("namespace.ns.kv-events", None),
        ("namespace-ns-component-backend-kv-events.other", None),
        ("prefix.namespace.ns.component.backend.kv-events", None),
        ("kv-events", None),
        ("", None),
    ],
)
def test_subjects_of_every_release_name_an_origin(subject: str, origin: Origin | None) -> None:
    assert parse_subject(subject) == origin


def test_every_default_subject_is_one_of_dynamo_s() -> None:
    for pattern in DEFAULT_SUBJECTS:
        assert parse_subject(pattern.replace("*", "x")) is not None


@given(st.text())
def test_no_subject_raises(text: str) -> None:
    parse_subject(text)
    parse_subject(f"namespace.{text}.component.{text}.kv-events")


def test_only_what_names_the_event_is_decoded() -> None:
    broken_blocks = pack([event({"stored": {"parent_hash": "x", "blocks": 5}}, 4)])
    assert opened(envelope(broken_blocks)).addresses == [DynamoAddress(7, 0)]
    assert msgspec.msgpack.decode(opened(envelope(broken_blocks)).inner) is not None
