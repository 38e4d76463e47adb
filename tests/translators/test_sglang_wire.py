"""Every family of SGLang's wire, from samples written by the releases themselves and from random batches."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import (
    ROOT,
    CacheTier,
    ClearBlocks,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import TranslatorOptions

from .sglang_families import CLEARED, FAMILIES, Event, Family

OPTIONS = TranslatorOptions("engine", "model", "tokenizer", "tenant", bytes_per_block=7)
HBM = CacheTier.HBM
SEVEN = (b"\xff" * 7 + b"\xf9",)


def scope(tenant: str = "tenant", adapter: str | None = None) -> IdentityScope:
    return IdentityScope("model", "tokenizer", adapter, tenant)


def store(worker: str, rank: int | None, tokens: int, tenant: str = "tenant") -> StoreRun:
    return StoreRun(worker, rank, scope(tenant), HBM, SEVEN, ROOT, 0, tokens, 1500, 7, True, False, count_copies=False)


# A clear, a page of 4 tokens with the hash -7, a page of 2 bigrams, the removal of -7; ts 1.5, rank 0 or none.
SAMPLES = {
    "0.4.6.post5": """
        92cb3ff80000000000009491b0416c6c426c6f636b73436c6561726564
        96ab426c6f636b53746f72656491f9c0940102030404c0
        96ab426c6f636b53746f72656491f9c09292010292020302c092ac426c6f636b52656d6f76656491f9
    """,
    "0.4.7 to 0.5.8.post1": """
        93cb3ff80000000000009491b0416c6c426c6f636b73436c6561726564
        96ab426c6f636b53746f72656491f9c0940102030404c0
        96ab426c6f636b53746f72656491f9c09292010292020302c092ac426c6f636b52656d6f76656491f900
    """,
    "0.5.9 to 0.5.17": """
        93cb3ff80000000000009491b0416c6c426c6f636b73436c6561726564
        97ab426c6f636b53746f72656491f9c0940102030404c0a3475055
        97ab426c6f636b53746f72656491f9c09292010292020302c0a3475055
        93ac426c6f636b52656d6f76656491f9a347505500
    """,
}


@pytest.mark.parametrize("releases", SAMPLES)
def test_a_sample_of_each_family_of_arrays(releases: str) -> None:
    translation = SglangTranslator(OPTIONS).translate(bytes.fromhex(SAMPLES[releases]), 0)
    rank = None if releases == "0.4.6.post5" else 0
    worker = "engine" if rank is None else "engine/0"
    assert translation.rejections == []
    assert translation.operations == [
        ClearBlocks(worker),
        store(worker, rank, 4),
        store(worker, rank, 2),
        RemoveBlocks(worker, SEVEN, HBM, 0),
    ]
    assert (translation.engine_ms, translation.rank) == (1500, rank)
    assert (translation.stored_events, translation.removed_events, translation.cleared_events) == (2, 1, 1)


def test_a_salted_sample_of_0_5_18_and_0_5_19() -> None:
    event = bytes.fromhex("98ab426c6f636b53746f72656491f9c0940102030404c0a347505581aa63616368655f73616c74a27331")
    payload = bytes.fromhex("93cb3ff800000000000091") + event + b"\x00"
    translation = SglangTranslator(OPTIONS).translate(payload, 0)
    assert translation.rejections == []
    assert translation.operations == [store("engine/0", 0, 4, "s1")]


def test_a_sample_of_the_maps_since_0_5_20() -> None:
    sample = """
        93cb3ff80000000000009581a474797065b0416c6c426c6f636b73436c656172656487a474797065ab426c6f636b53746f726564ac62
        6c6f636b5f68617368657391f9b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f
        73697a6504a76c6f72615f6964c0a66d656469756da347505589a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368
        657391f9b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6504a76c6f72
        615f6964c0a66d656469756da3475055aa63616368655f73616c74a27331aa73657373696f6e5f6964a47365737387a474797065ab42
        6c6f636b53746f726564ac626c6f636b5f68617368657391f9b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473
        92920102920203aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da347505583a474797065ac426c6f636b52656d
        6f766564ac626c6f636b5f68617368657391f9a66d656469756da347505500
    """
    translation = SglangTranslator(OPTIONS).translate(bytes.fromhex(sample), 0)
    assert translation.rejections == []
    assert translation.operations == [
        ClearBlocks("engine/0"),
        store("engine/0", 0, 4),
        store("engine/0", 0, 4, "s1"),
        store("engine/0", 0, 2),
        RemoveBlocks("engine/0", SEVEN, HBM, 0),
    ]


TIERS = {
    None: HBM,
    "GPU": HBM,
    "CPU_PINNED": CacheTier.CPU_DRAM,
    "DISK": CacheTier.LOCAL_SSD,
    "EXTERNAL": CacheTier.OBJECT_STORE,
}
hashes = st.integers(-(2**63), 2**63 - 1)
token_lists = (lambda count: list(range(count)), lambda count: [(token, token + 1) for token in range(count)])


@st.composite
def stored_events(draw: st.DrawFn) -> Event:
    block_hashes = draw(st.lists(hashes, max_size=5))
    block_size = draw(st.integers(0, 5))
    count = draw(st.just(len(block_hashes) * block_size) | st.integers(0, 12))
    return {
        "type": "BlockStored",
        "block_hashes": block_hashes,
        "parent_block_hash": draw(st.none() | hashes),
        "token_ids": draw(st.sampled_from(token_lists))(count),
        "block_size": block_size,
        "lora_id": None,
        "medium": draw(st.sampled_from(list(TIERS))),
        "cache_salt": draw(st.none() | st.text(max_size=5)),
        "session_id": draw(st.none() | st.text(max_size=5)),
        "lora_name": draw(st.none() | st.text(max_size=5)),
    }


removed_events = st.fixed_dictionaries(
    {
        "type": st.just("BlockRemoved"),
        "block_hashes": st.lists(hashes, max_size=5),
        "medium": st.sampled_from(list(TIERS)),
    }
)
events = stored_events() | removed_events | st.just(CLEARED)


def pattern(block_hash: int) -> bytes:
    return block_hash.to_bytes(8, "big", signed=True)


def expected(event: Event, worker: str, rank: int | None, at_ms: int) -> Operation:
    if event["type"] == "AllBlocksCleared":
        return ClearBlocks(worker)
    blocks = tuple(map(pattern, event["block_hashes"]))
    tier = TIERS[event.get("medium")]
    if event["type"] == "BlockRemoved":
        return RemoveBlocks(worker, blocks, tier, 0)
    salt, parent, size = event.get("cache_salt"), event["parent_block_hash"], event["block_size"]
    whole = bool(event["token_ids"]) and len(blocks) * size == len(event["token_ids"])
    return StoreRun(
        worker,
        rank,
        scope("tenant" if salt is None else salt, event.get("lora_name")),
        tier,
        blocks,
        (ROOT if parent is None else pattern(parent)) if whole else None,
        0,
        size,
        at_ms,
        7,
        whole,
        False,
        False,
        None,
    )


@given(st.sampled_from(FAMILIES), st.lists(events, max_size=4), st.none() | st.integers(0, 64))
def test_any_batch_means_the_same_in_each_family(family: Family, batch: list[Event], rank: int | None) -> None:
    translation = SglangTranslator(OPTIONS).translate(family.batch(batch, 1700000000.25, rank), 0)
    rank = rank if family.rank else None
    worker = "engine" if rank is None else f"engine/{rank}"
    assert translation.rejections == []
    assert translation.operations == [expected(family.knows(event), worker, rank, 1700000000250) for event in batch]
    assert translation.rank == rank


@given(st.lists(st.tuples(st.sampled_from(FAMILIES), events), max_size=4))
def test_an_engine_may_be_upgraded_in_place(batches: list[tuple[Family, Event]]) -> None:
    translator = SglangTranslator(OPTIONS)
    for family, event in batches:
        translation = translator.translate(family.batch([event]), 0)
        worker, rank = ("engine/0", 0) if family.rank else ("engine", None)
        assert translation.operations == [expected(family.knows(event), worker, rank, 1500)]


@given(st.sampled_from(FAMILIES), st.sampled_from(FAMILIES), st.lists(events, min_size=1, max_size=3))
def test_families_may_be_mixed_within_a_payload(one: Family, other: Family, batch: list[Event]) -> None:
    mixed = [family.event(event) for event in batch for family in (one, other)]
    translation = SglangTranslator(OPTIONS).translate(msgspec.msgpack.encode([1.5, mixed, 0]), 0)
    assert translation.rejections == []
    wanted = [expected(family.knows(event), "engine/0", 0, 1500) for event in batch for family in (one, other)]
    assert translation.operations == wanted
