"""What a peer may send to SGLang's translator: a bad event costs itself, and nothing raises."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Rejection, RejectReason, Translation, TranslatorOptions

from ..captures_reader import load_capture
from .sglang_families import ARRAYS, CLEARED, MAPS, WITHOUT_MEDIUM, Family, removed, stored

pack = msgspec.msgpack.encode
BOTH = pytest.mark.parametrize("family", [ARRAYS, MAPS], ids=["arrays", "maps"])


def translate(payload: bytes) -> Translation:
    return SglangTranslator(TranslatorOptions("engine")).translate(payload, 0)


def between_siblings(family: Family, event: Any) -> Rejection:
    """The rejection of an event that stands between two good ones, of which nothing is lost."""
    events = [family.event(stored([1, 2])), event, family.event(removed([2]))]
    translation = translate(pack([1.5, events, 0]))
    assert translation.operations == translate(family.batch([stored([1, 2]), removed([2])])).operations
    assert (translation.stored_events, translation.removed_events) == (1, 1)
    (rejection,) = translation.rejections
    assert (rejection.event, rejection.raw) == (1, pack(event))
    return rejection


@BOTH
@pytest.mark.parametrize(
    ("event", "reason", "field"),
    [
        (stored([1, "a"]), RejectReason.BLOCK_HASH, "block_hashes[1]"),
        (removed([2**63, 1.5]), RejectReason.BLOCK_HASH, "block_hashes[1]"),
        (stored(parent_block_hash=b""), RejectReason.BLOCK_HASH, "parent_block_hash"),
        (stored(parent_block_hash="root"), RejectReason.EVENT_SHAPE, "parent_block_hash"),
        (stored(block_hashes=7), RejectReason.EVENT_SHAPE, "block_hashes"),
        (removed(block_hashes=None), RejectReason.EVENT_SHAPE, "block_hashes"),
        (stored(token_ids="text"), RejectReason.EVENT_SHAPE, "token_ids"),
        (stored(block_size=-1), RejectReason.EVENT_SHAPE, "block_size"),
        (stored(medium=1), RejectReason.EVENT_SHAPE, "medium"),
        (stored(medium="TAPE"), RejectReason.MEDIUM, "medium"),
        (removed(medium="TAPE"), RejectReason.MEDIUM, "medium"),
    ],
)
def test_a_bad_field_is_named(family: Family, event: dict[str, Any], reason: RejectReason, field: str) -> None:
    rejection = between_siblings(family, family.event(event))
    assert (rejection.reason, rejection.field) == (reason, f"events[1].{field}")


@pytest.mark.parametrize(
    ("family", "field"), [(ARRAYS, "metadata.cache_salt"), (MAPS, "cache_salt")], ids=["arrays", "maps"]
)
def test_a_salt_that_is_no_text_is_named(family: Family, field: str) -> None:
    rejection = between_siblings(family, family.event(stored(cache_salt=5)))
    assert (rejection.reason, rejection.field) == (RejectReason.EVENT_SHAPE, f"events[1].{field}")


def test_an_adapter_where_sglang_has_a_map_is_an_event_of_vllm() -> None:
    rejection = between_siblings(ARRAYS, [*ARRAYS.event(stored()), "adapter"])
    assert (rejection.reason, rejection.field) == (RejectReason.EVENT_SHAPE, "events[1].metadata")


@BOTH
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (["LoadStat", 1], RejectReason.EVENT_TYPE),
        ({"type": "BlockMoved"}, RejectReason.EVENT_TYPE),
        ([], RejectReason.EVENT_SHAPE),
        (None, RejectReason.EVENT_SHAPE),
    ],
)
def test_an_event_of_no_known_kind_costs_itself(family: Family, event: Any, reason: RejectReason) -> None:
    assert between_siblings(family, event).reason is reason


def test_what_later_releases_add_is_ignored() -> None:
    events = [stored(cache_salt="s"), removed(), CLEARED]
    wider = [MAPS.event(event) | {"extra_keys": [["s"]], "group_idx": 3} for event in events]
    longer = [
        [*ARRAYS.event(stored(cache_salt="s")), "new"],
        [*ARRAYS.event(removed()), "new"],
        [*ARRAYS.event(CLEARED), "new"],
    ]
    plain = translate(MAPS.batch(events)).operations
    assert translate(pack([1.5, wider, 0])).operations == plain
    assert translate(pack([1.5, longer, 0, "new"])).operations == plain


REAL = [
    message.payload
    for name in ("sglang-0.5.23-evict", "sglang-0.5.23-page1", "sglang-0.5.23-clear")
    for message in sorted(load_capture(name).messages, key=lambda message: len(message.payload))[:30:3]
]
OLD = [family.batch(msgspec.msgpack.decode(payload)[1]) for payload in REAL[::3] for family in (ARRAYS, WITHOUT_MEDIUM)]
real = st.sampled_from(REAL + OLD)


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
def test_a_field_replaced_by_anything_leaves_its_siblings_alone(
    payload: bytes, value: Any, data: st.DataObject
) -> None:
    ts, events, rank = msgspec.msgpack.decode(payload)
    at = data.draw(st.integers(0, len(events) - 1))
    whole = translate(payload)
    event = events[at]
    event[data.draw(st.sampled_from(list(event) if isinstance(event, dict) else range(len(event))))] = value
    damaged = translate(pack([ts, events, rank]))
    siblings = [*whole.operations[:at], *whole.operations[at + 1 :]]
    if damaged.rejections:
        assert [rejection.event for rejection in damaged.rejections] == [at]
        assert damaged.operations == siblings
    else:
        assert [*damaged.operations[:at], *damaged.operations[at + 1 :]] == siblings
