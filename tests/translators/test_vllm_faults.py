"""What a peer may send, and how much of it is lost: a bad event costs itself, and nothing raises."""

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.translators.hashes import HASHES_MAX
from kvcensus.translators.translation import Rejection, RejectReason, Translation, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator
from kvcensus.translators.wire import EVENTS_MAX

from ..captures_reader import load_capture
from .wire_families import ARRAYS, CLEARED, MAPS, Family, removed, stored

pack = msgspec.msgpack.encode
BOTH = pytest.mark.parametrize("family", [ARRAYS, MAPS], ids=["arrays", "maps"])


def translate(payload: bytes) -> Translation:
    return VllmTranslator(TranslatorOptions("engine")).translate(payload, 0)


def between_siblings(family: Family, event: Any) -> Rejection:
    """The rejection of an event that stands between two good ones, of which nothing is lost."""
    events = [family.event(stored([1, 2])), event, family.event(removed([2]))]
    translation = translate(pack([1.5, events, 0]))
    assert translation.operations == translate(family.batch([stored([1, 2]), removed([2])])).operations
    assert (translation.stored_events, translation.removed_events) == (1, 1)
    (rejection,) = translation.rejections
    assert rejection.event == 1
    assert rejection.raw == pack(event)
    assert rejection.detail
    return rejection


@BOTH
@pytest.mark.parametrize(
    ("event", "reason", "field"),
    [
        (stored([1, "a"]), RejectReason.BLOCK_HASH, "block_hashes[1]"),
        (stored([b""]), RejectReason.BLOCK_HASH, "block_hashes[0]"),
        (stored([b"x" * 241]), RejectReason.BLOCK_HASH, "block_hashes[0]"),
        (removed([2**63, 1.5]), RejectReason.BLOCK_HASH, "block_hashes[1]"),
        (stored(parent_block_hash=b""), RejectReason.BLOCK_HASH, "parent_block_hash"),
        (stored(parent_block_hash="root"), RejectReason.EVENT_SHAPE, "parent_block_hash"),
        (stored(block_hashes=7), RejectReason.EVENT_SHAPE, "block_hashes"),
        (removed(block_hashes=None), RejectReason.EVENT_SHAPE, "block_hashes"),
        (stored(token_ids="text"), RejectReason.EVENT_SHAPE, "token_ids"),
        (stored(token_ids={}), RejectReason.EVENT_SHAPE, "token_ids"),
        (stored(block_size=-1), RejectReason.EVENT_SHAPE, "block_size"),
        (stored(block_size=True), RejectReason.EVENT_SHAPE, "block_size"),
        (stored(block_size=2**31), RejectReason.EVENT_SHAPE, "block_size"),
        (stored(block_size=None), RejectReason.EVENT_SHAPE, "block_size"),
        (stored(lora_id="a"), RejectReason.EVENT_SHAPE, "lora_id"),
        (stored(lora_name={"cache_salt": "s"}), RejectReason.EVENT_SHAPE, "lora_name"),
        (stored(extra_keys="salt"), RejectReason.EVENT_SHAPE, "extra_keys"),
        (stored(extra_keys=["salt"]), RejectReason.EVENT_SHAPE, "extra_keys"),
        (stored(group_idx=-1), RejectReason.EVENT_SHAPE, "group_idx"),
        (stored(kv_cache_spec_kind=1), RejectReason.EVENT_SHAPE, "kv_cache_spec_kind"),
        (stored(medium=1), RejectReason.EVENT_SHAPE, "medium"),
        (stored(medium="CXL"), RejectReason.MEDIUM, "medium"),
        (removed(medium="tape"), RejectReason.MEDIUM, "medium"),
        (removed(group_idx=2**31), RejectReason.EVENT_SHAPE, "group_idx"),
    ],
)
def test_a_bad_field_is_named(family: Family, event: dict[str, Any], reason: RejectReason, field: str) -> None:
    rejection = between_siblings(family, family.event(event))
    assert (rejection.reason, rejection.field) == (reason, f"events[1].{field}")


@BOTH
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (["BlockMoved", [1]], RejectReason.EVENT_TYPE),
        ({"type": "BlockMoved", "block_hashes": [1]}, RejectReason.EVENT_TYPE),
        ([], RejectReason.EVENT_SHAPE),
        ({}, RejectReason.EVENT_SHAPE),
        ([5], RejectReason.EVENT_SHAPE),
        ({"type": None}, RejectReason.EVENT_SHAPE),
        (None, RejectReason.EVENT_SHAPE),
        ("AllBlocksCleared", RejectReason.EVENT_SHAPE),
        (["BlockStored", [1], None, [1]], RejectReason.EVENT_SHAPE),
    ],
)
def test_an_event_of_no_known_kind_costs_itself(family: Family, event: Any, reason: RejectReason) -> None:
    rejection = between_siblings(family, event)
    assert (rejection.reason, rejection.field) == (reason, "events[1]")


def test_an_unknown_type_and_an_unknown_medium_are_called_by_name() -> None:
    assert "'BlockMoved'" in between_siblings(MAPS, {"type": "BlockMoved"}).detail
    assert "'CXL'" in between_siblings(MAPS, MAPS.event(stored(medium="CXL"))).detail


@pytest.mark.parametrize("field", ["block_hashes", "parent_block_hash", "token_ids", "block_size"])
def test_a_missing_key_is_named(field: str) -> None:
    event = dict(MAPS.event(stored()))
    del event[field]
    assert between_siblings(MAPS, event).field == f"events[1].{field}"


def test_what_later_releases_add_is_ignored() -> None:
    events = [stored(), removed(), CLEARED]
    longer = [[*ARRAYS.event(event), "new", {"a": 1}] for event in events]
    wider = [MAPS.event(event) | {"new": [1], "session_id": "s"} for event in events]
    plain = translate(MAPS.batch(events)).operations
    assert translate(pack([1.5, longer, 0, "new"])).operations == plain
    assert translate(pack([1.5, wider, 0, {}])).operations == plain


# Payloads


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        b"\x80",
        pack("text"),
        pack([1.5]),
        pack(["now", [], 0]),
        pack([1.5, 5, 0]),
        pack([1.5, None, 0]),
        MAPS.batch([stored()])[:-1],
        MAPS.batch([stored()]) + b"\x00",
        b"\xdd\x7f\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\xdd\x7f\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\x91\xdf\xff\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\x91\xc6\x7f\xff\xff\xff",
        b"\x93\xcb" + bytes(8) + b"\x91" * 100_000 + b"\x00\x00",
        b"\x93\xcb" + bytes(8) + b"\x91" + b"\x81\xa1a" * 50_000 + b"\x00\x00",
    ],
)
def test_what_is_no_batch_is_one_rejection(payload: bytes) -> None:
    translation = translate(payload)
    (rejection,) = translation.rejections
    assert translation.operations == []
    assert (rejection.reason, rejection.event, rejection.raw) == (RejectReason.PAYLOAD, None, payload)
    assert rejection.detail


@pytest.mark.parametrize("rank", [-1, True, "0", 1.5, 65536, [0]])
def test_a_rank_that_is_none_costs_the_payload(rank: Any) -> None:
    """Its events belong to a worker that nobody can name."""
    translation = translate(pack([1.5, [MAPS.event(stored())], rank]))
    (rejection,) = translation.rejections
    assert translation.operations == []
    assert (rejection.reason, rejection.field) == (RejectReason.RANK, "data_parallel_rank")


@pytest.mark.parametrize("ts", [float("nan"), float("inf"), float("-inf"), -1.0, 1e300, 2**64 - 1])
def test_a_clock_that_is_none_costs_only_the_time(ts: float) -> None:
    translation = translate(MAPS.batch([stored()], ts=ts))
    (rejection,) = translation.rejections
    assert (rejection.reason, rejection.field) == (RejectReason.PAYLOAD, "ts")
    assert (len(translation.operations), translation.engine_ms) == (1, 0)


@pytest.mark.parametrize("field", [b"BlockStored", b"GPU", b"adapter", b"full_attention"])
def test_text_that_is_not_utf8_is_refused(field: bytes) -> None:
    event = stored(lora_name="adapter", group_idx=0, kv_cache_spec_kind="full_attention")
    payload = MAPS.batch([event, removed()]).replace(field, b"\xff" * len(field), 1)
    translation = translate(payload)
    assert [rejection.reason for rejection in translation.rejections] == [RejectReason.EVENT_SHAPE]
    assert translation.removed_events == 1


def test_keys_nested_too_deeply_cost_the_payload_and_no_more() -> None:
    payload = MAPS.batch([stored(extra_keys=["deep"])]).replace(pack("deep"), b"\x91" * 200_000 + b"\x00")
    assert [rejection.reason for rejection in translate(payload).rejections] == [RejectReason.PAYLOAD]


# Damage to real payloads

REAL = [
    message.payload
    for name in ("vllm-0.9.2-clear", "vllm-0.12.0-byteshash", "vllm-0.32.0-swa", "vllm-0.32.0-lora")
    for message in sorted(load_capture(name).messages, key=lambda message: len(message.payload))[40:70:3]
]
real = st.sampled_from(REAL)


def accounted(payload: bytes) -> None:
    """Each event of a payload that can be told apart is an operation or a rejection."""
    translation = translate(payload)
    try:
        _, events, *_ = msgspec.msgpack.decode(payload, type=tuple[Any, list[msgspec.Raw], msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    refused = {rejection.reason for rejection in translation.rejections if rejection.event is None}
    if refused & {RejectReason.RANK, RejectReason.PAYLOAD} and not translation.operations:
        return
    of_events = [rejection for rejection in translation.rejections if rejection.event is not None]
    assert len(translation.operations) + len(of_events) == len(events)


@given(real, st.data())
def test_flipped_bits_raise_nothing_and_lose_no_event(payload: bytes, data: st.DataObject) -> None:
    damaged = bytearray(payload)
    for place in data.draw(st.lists(st.integers(0, len(payload) * 8 - 1), min_size=1, max_size=4)):
        damaged[place // 8] ^= 1 << place % 8
    accounted(bytes(damaged))


@given(real, st.data())
def test_a_cut_payload_is_one_rejection(payload: bytes, data: st.DataObject) -> None:
    translation = translate(payload[: data.draw(st.integers(0, len(payload) - 1))])
    assert [rejection.reason for rejection in translation.rejections] == [RejectReason.PAYLOAD]
    assert translation.operations == []


@given(st.binary(max_size=60))
def test_noise_raises_nothing(payload: bytes) -> None:
    accounted(payload)
    accounted(b"\x93\xcb" + bytes(8) + b"\x91" + payload + b"\x00")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(real, values, st.data())
def test_an_event_replaced_by_anything_leaves_its_siblings_alone(
    payload: bytes, value: Any, data: st.DataObject
) -> None:
    ts, events, rank = msgspec.msgpack.decode(payload)
    at = data.draw(st.integers(0, len(events)))
    translator = VllmTranslator(TranslatorOptions("engine"))
    whole = translator.translate(payload, 1)
    damaged = translator.translate(pack([ts, [*events[:at], value, *events[at:]], rank]), 1)
    assert damaged.operations == whole.operations
    assert [rejection.event for rejection in damaged.rejections] == [at]


@given(real, values, st.data())
def test_a_field_replaced_by_anything_leaves_its_siblings_alone(
    payload: bytes, value: Any, data: st.DataObject
) -> None:
    ts, events, rank = msgspec.msgpack.decode(payload)
    at = data.draw(st.integers(0, len(events) - 1))
    translator = VllmTranslator(TranslatorOptions("engine"))
    whole = translator.translate(payload, 1)
    event = events[at]
    event[data.draw(st.sampled_from(list(event) if isinstance(event, dict) else range(len(event))))] = value
    damaged = translator.translate(pack([ts, events, rank]), 1)
    siblings = [*whole.operations[:at], *whole.operations[at + 1 :]]
    if damaged.rejections:
        assert [rejection.event for rejection in damaged.rejections] == [at]
        assert damaged.operations == siblings
    else:
        assert [*damaged.operations[:at], *damaged.operations[at + 1 :]] == siblings


def test_many_bad_events_cost_each_its_share() -> None:
    event = pack(["BlockRemoved", [1], "TAPE"])
    payload = b"\x93" + pack(1.5) + b"\xdd" + (20_000).to_bytes(4, "big") + event * 20_000 + pack(0)
    begun = time.thread_time()
    rejections = translate(payload).rejections
    took_s = time.thread_time() - begun
    assert [one.raw for one in rejections] == [event] * 20_000
    assert took_s < 3


def test_more_events_than_an_engine_sends_are_no_batch() -> None:
    event = pack(["AllBlocksCleared"])
    most = b"\x93" + pack(1.5) + b"\xdd" + EVENTS_MAX.to_bytes(4, "big") + event * EVENTS_MAX + pack(0)
    assert translate(most).cleared_events == EVENTS_MAX
    more = b"\x93" + pack(1.5) + b"\xdd" + (EVENTS_MAX + 1).to_bytes(4, "big") + event * (EVENTS_MAX + 1) + pack(0)
    (rejection,) = translate(more).rejections
    assert (rejection.reason, rejection.field) == (RejectReason.PAYLOAD, "events")


@pytest.mark.parametrize("events", [1, 4])
def test_more_hashes_than_a_cache_has_are_refused_where_they_pass_the_limit(events: int) -> None:
    each = HASHES_MAX // events
    sent = [["BlockRemoved", [7] * each, "GPU"]] * events + [["BlockRemoved", [7], "GPU"]]
    translation = translate(pack([1.5, sent, 0]))
    assert translation.removed_events == events
    assert [one.field for one in translation.rejections] == [f"events[{events}].block_hashes"]


def test_an_event_with_more_hashes_than_a_cache_has_is_refused_unread() -> None:
    (rejection,) = translate(pack([1.5, [["BlockRemoved", [7] * (HASHES_MAX + 1), "GPU"]], 0])).rejections
    assert (rejection.reason, rejection.field) == (RejectReason.BLOCK_HASH, f"events[0].block_hashes[{HASHES_MAX}]")
