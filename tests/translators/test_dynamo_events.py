"""What Dynamo's events mean for one address, and what a peer may send."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import CacheTier, ClearBlocks, IdentityScope, Operation, RemoveBlocks, StoreRun
from kvcensus.translators.dynamo import POSITION_MAX, DynamoTranslator
from kvcensus.translators.dynamo_envelope import CACHE_OWNER, DynamoAddress
from kvcensus.translators.hashes import HASHES_MAX
from kvcensus.translators.translation import ClearScope, Rejection, RejectReason, Translation, TranslatorOptions

from .dynamo_messages import ENCODINGS, PUBLISHED_MS, block, envelope, event, in_json, pack, removed, run, stored

IN_EVERY_ENCODING = pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
DEVICE: dict[str, Any] = {"storage_tier": "device"}


def translate(payload: bytes, address: DynamoAddress = DynamoAddress(7, 0), **options: Any) -> Translation:  # noqa: B008
    return DynamoTranslator(TranslatorOptions(address.name, "m", "t", **options), address).translate(payload, 0)


def operation_of(data: Any, **more: Any) -> Operation:
    translation = translate(pack([event(data, **more)]))
    assert translation.rejections == []
    (operation,) = translation.operations
    return operation


# what an event becomes


@IN_EVERY_ENCODING
def test_events_become_operations_in_order(encode: Callable[[Any], bytes]) -> None:
    payload = encode([event(stored(1, 2), 1, **DEVICE), event(removed(2), 2, **DEVICE), event("cleared", 3, **DEVICE)])
    translation = translate(payload)

    at_ms = translation.engine_ms
    assert at_ms in (0, PUBLISHED_MS)
    assert translation == Translation(
        [run(1, 2, at_ms=at_ms), RemoveBlocks("7/0", (block(2),), CacheTier.HBM, 0), ClearBlocks("7/0")],
        [],
        engine_ms=at_ms,
        rank=0,
        stored_events=1,
        removed_events=1,
        cleared_events=1,
        hashes=3,
    )


def test_the_envelope_tells_the_time_and_what_it_wraps_does_not() -> None:
    inner = pack([event(stored(1))])
    assert translate(envelope(inner)).engine_ms == PUBLISHED_MS
    assert translate(inner).engine_ms == 0


def test_a_time_that_is_none_is_unknown() -> None:
    message = pack({"publisher_id": 1, "sequence": 0, "published_at": 2**63, "topic": "", "payload": pack([])})
    assert translate(message).engine_ms == 0


def test_facts_are_handed_back() -> None:
    assert DynamoTranslator(TranslatorOptions("7"), DynamoAddress(7, 0)).translate(pack([]), 6).facts == 6


@pytest.mark.parametrize("number", [0, 1, 127, 2**31, 2**63, 2**64 - 222])
def test_a_hash_is_its_8_bytes(number: int) -> None:
    for encode in (pack, in_json):
        operations = translate(encode([event(stored(number, parent=number), **DEVICE)])).operations
        assert operations == [run(number, parent=block(number))]


def test_a_signed_hash_is_the_same_pattern() -> None:
    assert operation_of(removed(-222)) == operation_of(removed(2**64 - 222))


@pytest.mark.parametrize(
    ("spelling", "tier"),
    [
        ("device", CacheTier.HBM),
        ("host_pinned", CacheTier.CPU_DRAM),
        ("disk", CacheTier.LOCAL_SSD),
        ("external", CacheTier.OBJECT_STORE),
    ],
)
def test_each_tier_is_known(spelling: str, tier: CacheTier) -> None:
    assert operation_of(stored(1), storage_tier=spelling) == run(1, tier=tier)
    assert operation_of(removed(1), storage_tier=spelling) == RemoveBlocks("7/0", (block(1),), tier, 0)
    assert operation_of({"tier_cleared": spelling}, storage_tier="device") == ClearBlocks("7/0", tier)
    assert operation_of("cleared", storage_tier=spelling) == ClearBlocks("7/0", None)


def test_before_1_1_there_is_no_tier_and_every_copy_counts() -> None:
    assert operation_of(stored(1)) == run(1, counts=True)
    assert operation_of(removed(1)) == RemoveBlocks("7/0", (block(1),), CacheTier.HBM, 0)
    assert translate(pack([event(stored(1))]), count_copies=False).operations == [run(1)]


@pytest.mark.parametrize(
    ("parent", "position", "expected"),
    [
        (None, None, (b"", None)),
        (None, 0, (b"", None)),
        (None, 4, (None, 4)),
        (9, None, (block(9), None)),
        (9, 4, (block(9), 4)),
        (9, 0, (block(9), None)),
    ],
)
def test_parent_and_position_tell_the_place(
    parent: int | None, position: int | None, expected: tuple[bytes | None, int | None]
) -> None:
    operation = operation_of(stored(1, parent=parent, start_position=position), **DEVICE)
    assert operation == run(1, parent=expected[0], index=expected[1])


def test_scope_is_what_the_configuration_says_and_otherwise_unknown() -> None:
    (configured,) = translate(pack(event(stored(1))), tenant_id="acme").operations
    assert isinstance(configured, StoreRun)
    assert configured.scope == IdentityScope("m", "t", "?", "acme")


def test_more_spellings_and_sizes_come_from_the_configuration() -> None:
    options: dict[str, Any] = {"media": {"tape": CacheTier.OBJECT_STORE}, "bytes_per_block": 7}
    (operation,) = translate(pack(event(stored(1), storage_tier="tape")), **options).operations
    assert isinstance(operation, StoreRun)
    assert (operation.tier, operation.bytes_per_block) == (CacheTier.OBJECT_STORE, 7)


@pytest.mark.parametrize("data", ["cleared", {"cleared": None}, {"cleared": {}}])
def test_a_clear_may_be_a_word_or_a_map(data: Any) -> None:
    assert operation_of(data) == ClearBlocks("7/0")


def test_a_clear_may_be_of_the_device_alone_but_not_a_cache_owner_s() -> None:
    owner = DynamoAddress(7, 0, CACHE_OWNER)
    options: dict[str, Any] = {"clears": ClearScope.DEVICE}
    assert translate(pack(event("cleared")), **options).operations == [ClearBlocks("7/0", CacheTier.HBM)]
    payload = pack(event("cleared", residency_domain=CACHE_OWNER))
    assert translate(payload, owner, **options).operations == [ClearBlocks("7@cache_owner/0")]


# whose an event is


@IN_EVERY_ENCODING
def test_an_address_gets_its_own_events_only(encode: Callable[[Any], bytes]) -> None:
    other: dict[str, Any] = {"residency_domain": CACHE_OWNER, "storage_tier": "disk"}
    payload = encode(
        [
            event(removed(1), 1),
            event(removed(2), 1, rank=1),
            event(removed(3), 1, worker=8),
            event(removed(4), 2, **other),
        ]
    )

    def removals(address: DynamoAddress) -> list[tuple[str, bytes]]:
        operations = translate(payload, address).operations
        return [(one.worker_id, one.block_hashes[0]) for one in operations if isinstance(one, RemoveBlocks)]

    assert removals(DynamoAddress(7, 0)) == [("7/0", block(1))]
    assert removals(DynamoAddress(7, 1)) == [("7/1", block(2))]
    assert removals(DynamoAddress(8, 0)) == [("8/0", block(3))]
    assert removals(DynamoAddress(7, 0, CACHE_OWNER)) == [("7@cache_owner/0", block(4))]


def test_what_is_bad_elsewhere_is_not_this_address_s() -> None:
    events = [event(removed(1)), event(removed("x"), worker=8), event(removed("x"), rank=1), {"event": 5}]
    translation = translate(pack(events))
    assert (len(translation.operations), translation.rejections) == (1, [])


# what is bad


def between_siblings(encode: Callable[[Any], bytes], bad: Any) -> Rejection:
    """The rejection of an event that stands between two good ones, of which nothing is lost."""
    before, after = event(stored(1, 2), 1, **DEVICE), event(removed(2), 3, **DEVICE)
    translation = translate(encode([before, bad, after]))
    assert translation.operations == translate(encode([before, after])).operations
    assert (translation.stored_events, translation.removed_events, translation.cleared_events) == (1, 1, 0)
    (rejection,) = translation.rejections
    assert rejection.event == 1
    assert rejection.raw == (in_json(bad) if encode is in_json else pack(bad))
    return rejection


STORED, REMOVED = "event.data.stored", "event.data.removed"


@pytest.mark.parametrize("encode", [in_json, envelope], ids=["json", "envelope"])
@pytest.mark.parametrize(
    ("bad", "reason", "field"),
    [
        (event("melted"), RejectReason.EVENT_TYPE, "event.data"),
        (event({"melted": {}}), RejectReason.EVENT_TYPE, "event.data"),
        (event({}), RejectReason.EVENT_SHAPE, "event.data"),
        (event({**stored(1), **removed(1)}), RejectReason.EVENT_SHAPE, "event.data"),
        (event(5), RejectReason.EVENT_SHAPE, "event.data"),
        (event({"stored": 5}), RejectReason.EVENT_SHAPE, STORED),
        (event({"stored": {"parent_hash": None}}), RejectReason.EVENT_SHAPE, "blocks"),
        (event({"removed": {}}), RejectReason.EVENT_SHAPE, "block_hashes"),
        (event({"removed": {"block_hashes": 5}}), RejectReason.EVENT_SHAPE, f"{REMOVED}.block_hashes"),
        (event(removed(1, "x")), RejectReason.BLOCK_HASH, f"{REMOVED}.block_hashes[1]"),
        (event(removed(1, 2.5)), RejectReason.BLOCK_HASH, f"{REMOVED}.block_hashes[1]"),
        (event(stored(1, None)), RejectReason.BLOCK_HASH, f"{STORED}.blocks[1].block_hash"),
        (event(stored(1, parent="x")), RejectReason.EVENT_SHAPE, f"{STORED}.parent_hash"),
        (event(stored(1, start_position=-1)), RejectReason.EVENT_SHAPE, f"{STORED}.start_position"),
        (event(stored(1, start_position=POSITION_MAX + 1)), RejectReason.EVENT_SHAPE, f"{STORED}.start_position"),
        (event(stored(1), storage_tier="tape"), RejectReason.MEDIUM, "storage_tier"),
        (event(removed(1), storage_tier="tape"), RejectReason.MEDIUM, "storage_tier"),
        (event(stored(1), storage_tier=None), RejectReason.EVENT_SHAPE, "storage_tier"),
        (event({"tier_cleared": "tape"}), RejectReason.MEDIUM, "event.data.tier_cleared"),
        (event("cleared", residency_domain=None), RejectReason.EVENT_SHAPE, "residency_domain"),
        (event("cleared", residency_domain="galaxy"), RejectReason.EVENT_SHAPE, "residency_domain"),
    ],
)
def test_a_bad_field_is_named(encode: Callable[[Any], bytes], bad: Any, reason: RejectReason, field: str) -> None:
    rejection = between_siblings(encode, bad)
    assert (rejection.reason, rejection.field) == (reason, f"events[1].{field}")


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_a_hash_of_more_than_64_bits_is_named(number: int) -> None:
    rejection = between_siblings(in_json, event(removed(1, number)))
    assert (rejection.reason, rejection.field) == (RejectReason.BLOCK_HASH, f"events[1].{REMOVED}.block_hashes[1]")
    rejection = between_siblings(in_json, event(stored(1, parent=number)))
    assert (rejection.reason, rejection.field) == (RejectReason.BLOCK_HASH, f"events[1].{STORED}.parent_hash")


@pytest.mark.parametrize("data", [stored(1), removed(1)])
@pytest.mark.parametrize("tier", [{}, DEVICE])
def test_a_cache_owner_has_nothing_on_a_device(data: Any, tier: dict[str, Any]) -> None:
    owner = DynamoAddress(7, 0, CACHE_OWNER)
    translation = translate(pack(event(data, residency_domain=CACHE_OWNER, **tier)), owner)
    assert translation.operations == []
    assert [rejection.field for rejection in translation.rejections] == ["events[0].storage_tier"]


def test_a_cache_owner_may_clear() -> None:
    payload = pack(event("cleared", residency_domain=CACHE_OWNER, **DEVICE))
    assert translate(payload, DynamoAddress(7, 0, CACHE_OWNER)).operations == [ClearBlocks("7@cache_owner/0")]
    assert translate(payload).operations == []


def test_too_many_hashes_are_refused() -> None:
    events = [event(removed(*range(HASHES_MAX)), **DEVICE), event(removed(1), **DEVICE)]
    translation = translate(pack(events))
    assert len(translation.operations) == 1
    assert [rejection.reason for rejection in translation.rejections] == [RejectReason.BLOCK_HASH]


def test_what_cannot_be_read_at_all_is_refused_whole() -> None:
    for payload in (b"", b"\xc1", pack(5), pack([1.5, [["BlockRemoved", [1]]], 0]), b"[" * 9000, envelope(b"")):
        translation = translate(payload)
        assert translation.operations == []
        assert [rejection.reason for rejection in translation.rejections] == [RejectReason.PAYLOAD]


# anything at all

anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["stored", "removed", "cleared", "blocks", "block_hashes", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(st.binary() | st.builds(lambda inner: envelope(inner), st.binary()))
def test_no_bytes_raise(payload: bytes) -> None:
    translate(payload)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.sampled_from([pack, in_json, envelope]))
def test_damage_never_raises(at: int, damage: bytes, encode: Callable[[Any], bytes]) -> None:
    payload = encode([event(stored(1, 2)), event(removed(1), 5, **DEVICE)])
    at = min(at, len(payload) - 1)
    translate(payload[:at] + damage + payload[at + len(damage) :])


@given(anything, st.sampled_from(["worker_id", "event", "storage_tier", "residency_domain", "data"]))
def test_siblings_of_anything_are_applied(value: Any, field: str) -> None:
    bad = event(value) if field == "data" else {**event(removed(9), rank=1), field: value}
    translation = translate(pack([event(removed(1)), bad, event(removed(2))]))
    hashes = [one.block_hashes for one in translation.operations if isinstance(one, RemoveBlocks)]
    assert (hashes[0], hashes[-1]) == ((block(1),), (block(2),))
    assert len(translation.operations) + len(translation.rejections) <= 3
