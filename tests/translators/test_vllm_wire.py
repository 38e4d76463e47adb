"""Every family of vLLM's wire, from samples written by the releases themselves and from random batches."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import (
    ROOT,
    CacheTier,
    ClearBlocks,
    GroupKind,
    GroupSpec,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)
from kvcensus.translators.translation import HashJoin, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from .wire_families import CLEARED, FAMILIES, Event, Family

OPTIONS = TranslatorOptions("engine", "model", "tokenizer", "tenant", hash_join=HashJoin.NEVER, bytes_per_block=7)

# A store of one block of 4 tokens with the hash 1122334455667788, its removal, a clear; ts 1.5, rank 0 or none.
SAMPLES = {
    "0.9.0": """
        92cb3ff80000000000009396ab426c6f636b53746f72656491cf1122334455667788c0940102030404c092ac426c6f636b52
        656d6f76656491cf112233445566778891b0416c6c426c6f636b73436c6561726564
    """,
    "0.9.1 to 0.10.1.1": """
        93cb3ff80000000000009396ab426c6f636b53746f72656491cf1122334455667788c0940102030404c092ac426c6f636b52
        656d6f76656491cf112233445566778891b0416c6c426c6f636b73436c656172656400
    """,
    "0.10.2 to 0.13.0": """
        93cb3ff80000000000009397ab426c6f636b53746f72656491cf1122334455667788c0940102030404c0a347505593ac426c
        6f636b52656d6f76656491cf1122334455667788a347505591b0416c6c426c6f636b73436c656172656400
    """,
    "0.14.0 to 0.16.0": """
        93cb3ff80000000000009398ab426c6f636b53746f72656491cf1122334455667788c0940102030404c0a3475055c093ac42
        6c6f636b52656d6f76656491cf1122334455667788a347505591b0416c6c426c6f636b73436c656172656400
    """,
    "0.17.0 to 0.19.1": """
        93cb3ff80000000000009399ab426c6f636b53746f72656491cf1122334455667788c0940102030404c0a3475055c091c093
        ac426c6f636b52656d6f76656491cf1122334455667788a347505591b0416c6c426c6f636b73436c656172656400
    """,
    "0.20.0 and 0.21.0": """
        93cb3ff8000000000000939aab426c6f636b53746f72656491cf1122334455667788c0940102030404c0a3475055c091c000
        94ac426c6f636b52656d6f76656491cf1122334455667788a34750550091b0416c6c426c6f636b73436c656172656400
    """,
    "0.22.0 and 0.23.0": """
        93cb3ff8000000000000939cab426c6f636b53746f72656491cf1122334455667788c0940102030404c0a3475055c091c000
        ae66756c6c5f617474656e74696f6ec094ac426c6f636b52656d6f76656491cf1122334455667788a34750550091b0416c6c
        426c6f636b73436c656172656400
    """,
    "0.24.0 to 0.32.0": """
        93cb3ff8000000000000938ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cf112233445566
        7788b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6504a76c
        6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797391c0a967726f75705f69
        647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e84a474797065ac426c6f636b52
        656d6f766564ac626c6f636b5f68617368657391cf1122334455667788a66d656469756da3475055a967726f75705f696478
        0081a474797065b0416c6c426c6f636b73436c656172656400
    """,
    "0.33.0": """
        93cb3ff800000000000093de000ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cf11223344
        55667788b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6504
        a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797391c0a967726f7570
        5f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e84a474797065ac426c6f63
        6b52656d6f766564ac626c6f636b5f68617368657391cf1122334455667788a66d656469756da3475055a967726f75705f69
        64780081a474797065b0416c6c426c6f636b73436c656172656400
    """,
}

GROUPED = ("0.20.0 and 0.21.0", "0.22.0 and 0.23.0", "0.24.0 to 0.32.0", "0.33.0")


@pytest.mark.parametrize("releases", SAMPLES)
def test_a_sample_of_each_family(releases: str) -> None:
    translation = VllmTranslator(OPTIONS).translate(bytes.fromhex(SAMPLES[releases]), 0)
    rank = None if releases == "0.9.0" else 0
    worker = "engine" if rank is None else "engine/0"
    scope = IdentityScope("model", "tokenizer", None, "tenant")
    block = (bytes.fromhex("1122334455667788"),)
    spec = GroupSpec(GroupKind.FULL, 0, 4) if releases in GROUPED else None
    assert translation.rejections == []
    assert translation.operations == [
        StoreRun(worker, rank, scope, CacheTier.HBM, block, ROOT, 0, 4, 1500, 7, True, False, True, spec),
        RemoveBlocks(worker, block, CacheTier.HBM, 0),
        ClearBlocks(worker),
    ]
    assert (translation.engine_ms, translation.rank, translation.facts) == (1500, rank, 1)
    assert (translation.stored_events, translation.removed_events, translation.cleared_events) == (1, 1, 1)


TIERS = {None: CacheTier.HBM, "GPU": CacheTier.HBM, "CPU": CacheTier.CPU_DRAM, "STORAGE": CacheTier.OBJECT_STORE}
KINDS = {
    None: GroupKind.FULL,
    "full_attention": GroupKind.FULL,
    "mla_attention": GroupKind.FULL,
    "sink_full_attention": GroupKind.FULL,
    "sliding_window": GroupKind.WINDOW,
    "sliding_window_mla": GroupKind.WINDOW,
    "mamba": GroupKind.STATE,
    "chunked_local_attention": GroupKind.OTHER,
    "encoder_only_attention": GroupKind.OTHER,
    "cross_attention": GroupKind.OTHER,
    "unknown": GroupKind.OTHER,
    "attention of next year": GroupKind.OTHER,
}
hashes = st.integers(-(2**63), 2**64 - 1) | st.binary(min_size=1, max_size=33)
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
        "token_ids": draw(st.sampled_from(token_lists))(count) or draw(st.sampled_from([None, []])),
        "block_size": block_size,
        "lora_id": draw(st.none() | st.integers(0, 2**40)),
        "medium": draw(st.sampled_from(list(TIERS))),
        "lora_name": draw(st.none() | st.text(max_size=5)),
        "extra_keys": draw(st.none() | st.just([None] * len(block_hashes))),
        "group_idx": draw(st.none() | st.integers(0, 3)),
        "kv_cache_spec_kind": draw(st.sampled_from(list(KINDS))),
        "kv_cache_spec_sliding_window": draw(st.none() | st.integers(0, 4096)),
    }


removed_events = st.fixed_dictionaries(
    {
        "type": st.just("BlockRemoved"),
        "block_hashes": st.lists(hashes, max_size=5),
        "medium": st.sampled_from(list(TIERS)),
        "group_idx": st.none() | st.integers(0, 3),
    }
)
events = stored_events() | removed_events | st.just(CLEARED)


def block(hash_: int | bytes) -> bytes:
    return hash_ if isinstance(hash_, bytes) else (hash_ % 2**64).to_bytes(8, "big")


def expected(event: Event, worker: str, rank: int | None, at_ms: int) -> Operation:
    if event["type"] == "AllBlocksCleared":
        return ClearBlocks(worker)
    blocks = tuple(block(hash_) for hash_ in event["block_hashes"])
    tier = TIERS[event.get("medium")]
    group = event.get("group_idx") or 0
    if event["type"] == "BlockRemoved":
        return RemoveBlocks(worker, blocks, tier, group)
    adapter = event.get("lora_name")
    if adapter is None and event["lora_id"] is not None:
        adapter = str(event["lora_id"])
    parent = event["parent_block_hash"]
    size = event["block_size"]
    whole = bool(event["token_ids"]) and len(blocks) * size == len(event["token_ids"])
    spec = GroupSpec(KINDS[event.get("kv_cache_spec_kind")], event.get("kv_cache_spec_sliding_window") or 0, size)
    return StoreRun(
        worker,
        rank,
        IdentityScope("model", "tokenizer", adapter, "tenant"),
        tier,
        blocks,
        (ROOT if parent is None else block(parent)) if whole else None,
        group,
        size,
        at_ms,
        7,
        whole,
        parent is not None,
        True,
        spec if size and event.get("group_idx") is not None and tier is CacheTier.HBM else None,
    )


@given(st.sampled_from(FAMILIES), st.lists(events, max_size=4), st.none() | st.integers(0, 64))
def test_any_batch_means_the_same_in_each_family(family: Family, batch: list[Event], rank: int | None) -> None:
    translation = VllmTranslator(OPTIONS).translate(family.batch(batch, 1700000000.25, rank), 0)
    rank = rank if family.rank else None
    worker = "engine" if rank is None else f"engine/{rank}"
    assert translation.rejections == []
    assert translation.operations == [expected(family.knows(event), worker, rank, 1700000000250) for event in batch]
    assert translation.rank == rank


@given(st.lists(st.tuples(st.sampled_from(FAMILIES), events), max_size=4))
def test_maps_and_arrays_may_stand_in_one_batch(batch: list[tuple[Family, Event]]) -> None:
    payload = msgspec.msgpack.encode([1.5, [family.event(event) for family, event in batch], 3])
    translation = VllmTranslator(OPTIONS).translate(payload, 0)
    assert translation.rejections == []
    assert translation.operations == [expected(family.knows(event), "engine/3", 3, 1500) for family, event in batch]


def test_a_translator_follows_an_engine_that_was_upgraded_and_back() -> None:
    translator = VllmTranslator(OPTIONS)
    samples = [bytes.fromhex(sample) for sample in SAMPLES.values()]
    for payload in [*samples, *reversed(samples)]:
        assert len(translator.translate(payload, 0).operations) == 3
