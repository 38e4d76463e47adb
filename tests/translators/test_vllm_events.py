"""What one vLLM event means."""

from typing import Any

import pytest

from kvcensus.backends.model import ROOT, CacheTier, ClearBlocks, GroupKind, GroupSpec, RemoveBlocks, StoreRun
from kvcensus.translators.events import INTEGER_HASHES_SEEN
from kvcensus.translators.translation import ClearScope, HashJoin, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from .wire_families import ARRAYS, CLEARED, MAPS, Event, Family, removed, stored


def operations(*events: Event, family: Family = MAPS, facts: int = 0, **options: Any) -> list[Any]:
    translator = VllmTranslator(TranslatorOptions("engine", "model", "tokenizer", **options))
    translation = translator.translate(family.batch(events), facts)
    assert translation.rejections == []
    return list(translation.operations)


def run(**fields: Any) -> StoreRun:
    (operation,) = operations(stored(**fields), tenant_id="house")
    assert isinstance(operation, StoreRun)
    return operation


def test_events_keep_their_order() -> None:
    events = [removed([1]), stored([1]), removed([1]), CLEARED, stored([2])]
    kinds = [type(operation) for operation in operations(*events)]
    assert kinds == [RemoveBlocks, StoreRun, RemoveBlocks, ClearBlocks, StoreRun]


# The place in the chain


def test_without_a_parent_full_blocks_start_at_the_root() -> None:
    found = run(hashes=[1, 2])
    assert (found.parent, found.consecutive, found.token_count) == (ROOT, True, 4)


def test_a_parent_is_the_block_before() -> None:
    found = run(parent_block_hash=-1)
    assert (found.parent, found.consecutive) == (b"\xff" * 8, True)


@pytest.mark.parametrize("token_ids", [None, []])
@pytest.mark.parametrize("block_size", [0, 64])
def test_a_placeholder_is_no_root(token_ids: list[int] | None, block_size: int) -> None:
    found = run(token_ids=token_ids, block_size=block_size, medium="CPU")
    assert (found.parent, found.consecutive, found.token_count) == (None, False, block_size)


@pytest.mark.parametrize("parent", [None, 9])
def test_fewer_hashes_than_tokens_have_no_known_place(parent: int | None) -> None:
    found = run(hashes=[1, 2], token_ids=list(range(12)), parent_block_hash=parent)
    assert (found.parent, found.consecutive, found.token_count) == (None, False, 4)


def test_no_hash_at_all_still_tells_of_the_group() -> None:
    found = run(
        hashes=[],
        token_ids=list(range(8)),
        group_idx=1,
        kv_cache_spec_kind="sliding_window",
        kv_cache_spec_sliding_window=64,
    )
    assert found.block_hashes == ()
    assert (found.group, found.spec) == (1, GroupSpec(GroupKind.WINDOW, 64, 4))


def test_bigram_tokens_count_as_pairs() -> None:
    assert run(token_ids=[[1, 2], [2, 3], [3, 4], [4, 5]]).consecutive


# Groups


def test_only_the_device_tells_of_its_groups() -> None:
    assert run(group_idx=0, kv_cache_spec_kind="full_attention", medium="CPU").spec is None


def test_a_stream_without_groups_tells_of_none() -> None:
    found = run()
    assert (found.group, found.spec) == (0, None)


def test_a_group_without_a_kind_still_has_a_block_size() -> None:
    assert run(group_idx=2).spec == GroupSpec(GroupKind.FULL, 0, 4)


def test_a_removal_is_of_one_tier_and_one_group() -> None:
    assert operations(removed([1], medium="CPU", group_idx=3)) == [
        RemoveBlocks("engine/0", (bytes(7) + b"\x01",), CacheTier.CPU_DRAM, 3)
    ]


# Adapters and tenants


@pytest.mark.parametrize(
    ("lora_id", "lora_name", "adapter"),
    [(None, None, None), (3, None, "3"), (3, "a", "a"), (None, "a", "a"), (None, "", ""), (0, None, "0")],
)
def test_the_adapter_is_the_name_or_else_the_id(
    lora_id: int | None, lora_name: str | None, adapter: str | None
) -> None:
    assert run(lora_id=lora_id, lora_name=lora_name).scope.adapter_id == adapter


@pytest.mark.parametrize(
    ("keys", "lora_name", "tenant"),
    [
        (None, None, "house"),
        ([], None, "house"),
        ([None], None, "house"),
        ([["salt"]], None, "salt"),
        ([["lora"]], "lora", "house"),
        ([["lora", "salt"]], "lora", "salt"),
        ([["lora", "lora"]], "lora", "lora"),
        ([[["image", 0], "salt"]], None, "salt"),
        ([[["image", -5]]], None, "house"),
        ([["lora", ["image", 0], ["image", 9], "salt", b"digest"]], "lora", "salt"),
        ([[b"digest"]], None, "house"),
        ([["image", "salt"]], None, "salt"),
    ],
)
def test_the_tenant_is_the_salt_of_the_first_block(keys: Any, lora_name: str | None, tenant: str) -> None:
    found = run(extra_keys=keys, lora_name=lora_name)
    assert found.scope.tenant_id == tenant
    assert not found.tenant_from_parent


def test_a_bare_image_of_old_releases_is_kept_apart_like_a_tenant() -> None:
    """0.17 and 0.18 write an image and a salt in the same way."""
    assert run(extra_keys=[["image"]]).scope.tenant_id == "image"


def test_a_later_run_belongs_to_the_tenant_of_its_parent() -> None:
    found = run(parent_block_hash=5, extra_keys=[["image"]])
    assert found.tenant_from_parent
    assert found.scope.tenant_id == "house"


# What the configuration decides


def test_a_clear_is_of_everything_or_of_the_device() -> None:
    assert operations(CLEARED) == [ClearBlocks("engine/0", None)]
    assert operations(CLEARED, clears=ClearScope.DEVICE) == [ClearBlocks("engine/0", CacheTier.HBM)]


def test_copies_and_sizes_are_those_of_the_source() -> None:
    (found,) = operations(stored(), count_copies=False, bytes_per_block=4096)
    assert (found.count_copies, found.bytes_per_block) == (False, 4096)


def test_media_may_be_added() -> None:
    (found,) = operations(stored(medium="CXL"), media={"cxl": CacheTier.CPU_DRAM})
    assert found.tier is CacheTier.CPU_DRAM


# Ranks and times


@pytest.mark.parametrize("rank", [None, 0, 7, 65535])
def test_the_rank_is_part_of_the_worker(rank: int | None) -> None:
    translation = VllmTranslator(TranslatorOptions("engine")).translate(MAPS.batch([stored(), CLEARED], rank=rank), 0)
    worker = "engine" if rank is None else f"engine/{rank}"
    assert translation.rank == rank
    assert {operation.worker_id for operation in translation.operations} == {worker}


def test_times_are_in_milliseconds_of_the_engine() -> None:
    payload = MAPS.batch([stored()], ts=1795434709.3910413)
    translation = VllmTranslator(TranslatorOptions("engine")).translate(payload, 0)
    (found,) = translation.operations
    assert isinstance(found, StoreRun)
    assert translation.engine_ms == found.at_ms == 1795434709391


# One stream with hashes of both kinds

DIGEST = bytes(range(32))
PATTERN = DIGEST[-8:]
INTEGER = int.from_bytes(PATTERN, "big")


def block_hashes(found: list[Any]) -> list[bytes]:
    return [operation.block_hashes[0] for operation in found]


@pytest.mark.parametrize("family", [ARRAYS, MAPS])
def test_digests_are_joined_with_integers_once_there_were_integers(family: Family) -> None:
    events = [stored([DIGEST]), stored([INTEGER]), stored([DIGEST], medium="CPU"), removed([DIGEST])]
    assert block_hashes(operations(*events, family=family)) == [DIGEST, PATTERN, PATTERN, PATTERN]


def test_the_translation_remembers_that_there_were_integers() -> None:
    translator = VllmTranslator(TranslatorOptions("engine"))
    assert translator.translate(MAPS.batch([stored([DIGEST])]), 0).facts == 0
    facts = translator.translate(MAPS.batch([removed([INTEGER])]), 0).facts
    assert facts == INTEGER_HASHES_SEEN
    assert block_hashes(list(translator.translate(MAPS.batch([stored([DIGEST])]), facts).operations)) == [PATTERN]


def test_a_parent_is_joined_as_its_blocks_are() -> None:
    (found,) = operations(stored([DIGEST], parent_block_hash=DIGEST), facts=INTEGER_HASHES_SEEN)
    assert (found.parent, found.block_hashes) == (PATTERN, (PATTERN,))


def test_joining_may_be_forbidden_or_forced() -> None:
    events = [stored([INTEGER]), stored([DIGEST])]
    assert block_hashes(operations(*events, hash_join=HashJoin.NEVER)) == [PATTERN, DIGEST]
    assert block_hashes(operations(stored([DIGEST]), hash_join=HashJoin.ALWAYS)) == [PATTERN]


def test_hashes_of_eight_bytes_and_less_are_never_cut() -> None:
    assert block_hashes(operations(stored([b"12345678"]), stored([b"1"]), facts=1)) == [b"12345678", b"1"]
