"""What a peer may send, and how much of it is lost: a bad event costs itself, and nothing raises."""

import time
from typing import Any

import msgspec
import pytest

from kvcensus.translators.hashes import HASHES_MAX
from kvcensus.translators.translation import Rejection, RejectReason, Translation, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator
from kvcensus.translators.wire import EVENTS_MAX

from . import siblings
from .wire_families import ARRAYS, CLEARED, MAPS, Family, removed, stored

pack = msgspec.msgpack.encode
BOTH = pytest.mark.parametrize("family", [ARRAYS, MAPS], ids=["arrays", "maps"])


def translate(payload: bytes) -> Translation:
    return VllmTranslator(TranslatorOptions("engine")).translate(payload, 0)


def between_siblings(family: Family, event: Any) -> Rejection:
    good = stored([1, 2]), removed([2])
    return siblings.rejection_between(translate, [family.event(one) for one in good], event)


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
