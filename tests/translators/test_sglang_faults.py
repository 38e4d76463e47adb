"""What a peer may send to SGLang's translator: a bad event costs itself, and nothing raises."""

from typing import Any

import msgspec
import pytest

from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Rejection, RejectReason, Translation, TranslatorOptions

from . import siblings
from .sglang_families import ARRAYS, CLEARED, MAPS, Family, removed, stored

pack = msgspec.msgpack.encode
BOTH = pytest.mark.parametrize("family", [ARRAYS, MAPS], ids=["arrays", "maps"])


def translate(payload: bytes) -> Translation:
    return SglangTranslator(TranslatorOptions("engine")).translate(payload, 0)


def between_siblings(family: Family, event: Any) -> Rejection:
    good = stored([1, 2]), removed([2])
    return siblings.rejection_between(translate, [family.event(one) for one in good], event)


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
