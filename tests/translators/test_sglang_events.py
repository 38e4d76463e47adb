"""What one SGLang event means, and which releases are refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ROOT, CacheTier, ClearBlocks, RemoveBlocks, StoreRun
from kvcensus.translators.sglang import EMPTY_KEY_HASH, SglangTranslator
from kvcensus.translators.translation import ClearScope, HashJoin, Rejection, RejectReason, TranslatorOptions

from .sglang_families import ARRAYS, CLEARED, FAMILIES, MAPS, WITHOUT_MEDIUM, Event, Family, removed, stored

BOTH = pytest.mark.parametrize("family", [ARRAYS, MAPS], ids=["arrays", "maps"])


def operations(*events: Event, family: Family = MAPS, **options: Any) -> list[Any]:
    translator = SglangTranslator(TranslatorOptions("engine", "model", "tokenizer", **options))
    translation = translator.translate(family.batch(events), 0)
    assert translation.rejections == []
    return list(translation.operations)


def run(family: Family = MAPS, **fields: Any) -> StoreRun:
    (operation,) = operations(stored(**fields), family=family, tenant_id="house")
    assert isinstance(operation, StoreRun)
    return operation


# The place in the chain


def test_without_a_parent_pages_start_at_the_root() -> None:
    found = run(hashes=[-1, 2])
    assert (found.parent, found.consecutive, found.token_count) == (ROOT, True, 4)
    assert found.block_hashes == (b"\xff" * 8, bytes(7) + b"\x02")


def test_pages_of_one_token_are_a_chain_too() -> None:
    found = run(hashes=list(range(1, 151)), token_ids=list(range(150)), block_size=1, parent_block_hash=-9)
    assert (found.parent, found.consecutive, found.token_count) == (b"\xff" * 7 + b"\xf7", True, 1)
    assert len(found.block_hashes) == 150


def test_of_bigrams_only_the_number_counts() -> None:
    found = run(hashes=[5, 6], token_ids=[[1, 2], [2, 3], [3, 4], [4, 5]], block_size=2)
    assert (found.parent, found.consecutive, found.token_count) == (ROOT, True, 2)


# Scope


@BOTH
def test_a_salt_is_the_tenant_of_its_event_whatever_the_parent(family: Family) -> None:
    for parent in (None, 7):
        salted = run(family, cache_salt="red", parent_block_hash=parent)
        assert (salted.scope.tenant_id, salted.tenant_from_parent) == ("red", False)
        plain = run(family, parent_block_hash=parent)
        assert (plain.scope.tenant_id, plain.tenant_from_parent) == ("house", False)


def test_an_adapter_is_in_the_scope() -> None:
    assert run(lora_name="sql").scope.adapter_id == "sql"
    assert run().scope.adapter_id is None
    assert run(lora_name="").scope.adapter_id == ""


# Tiers


def test_a_page_is_stored_once_a_tier_and_leaves_each_on_its_own() -> None:
    backend = MemoryBackend()
    backend.apply(operations(stored(), stored(), stored(medium="CPU_PINNED"), stored(), count_copies=True))
    assert {one.tier: one.ref_count for one in backend.snapshot()} == {CacheTier.HBM: 1, CacheTier.CPU_DRAM: 1}
    backend.apply(operations(removed()))
    assert [one.tier for one in backend.snapshot()] == [CacheTier.CPU_DRAM]
    backend.apply(operations(stored(), removed(medium="CPU_PINNED")))
    assert [one.tier for one in backend.snapshot()] == [CacheTier.HBM]


def test_a_clear_is_of_every_tier_whatever_the_option_says() -> None:
    assert operations(CLEARED, clears=ClearScope.DEVICE) == [ClearBlocks("engine/0")]


def test_a_removal_names_several_pages() -> None:
    (found,) = operations(removed([-1, 1]))
    assert found == RemoveBlocks("engine/0", (b"\xff" * 8, bytes(7) + b"\x01"), CacheTier.HBM, 0)


def test_hashes_are_never_cut() -> None:
    found = operations(stored([1]), stored([b"d" * 32]), hash_join=HashJoin.ALWAYS)[1]
    assert found.block_hashes == (b"d" * 32,)


# Releases that cannot be indexed


def refusals(*events: Event, family: Family = WITHOUT_MEDIUM) -> tuple[list[Any], list[Rejection]]:
    translation = SglangTranslator(TranslatorOptions("engine")).translate(family.batch(events), 0)
    return translation.operations, translation.rejections


def node_of(tokens: list[Any], parent: list[Any] | None, size: int) -> list[Event]:
    """A node as 0.4.6.post5 to 0.5.5 reported it; `parent` None as since 0.5.1."""

    def content_hash(key: list[Any]) -> int:
        return hash(tuple(key))

    before = None if parent is None else content_hash(parent[-size:])
    events = []
    for at in range(0, len(tokens), size):
        page = tokens[at : at + size]
        events.append(stored([content_hash(page)], token_ids=page, block_size=len(page), parent_block_hash=before))
        before = content_hash(page)
    return events


def test_the_hash_of_no_tokens_is_what_it_was() -> None:
    """And so are those of tokens: the daemon's Python and the engine's agree."""
    assert hash(()) == EMPTY_KEY_HASH
    assert hash((1, 2, 3, 4)) == 590899387183067792
    assert hash(((1, 2), (2, 3))) == 8374439192799522889


tokens = st.lists(st.integers(0, 2**20), min_size=1, max_size=12)
bigrams = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=1, max_size=12)


@given(tokens | bigrams, st.none() | st.just([]) | tokens, st.integers(1, 4), st.sampled_from(FAMILIES[:2]))
def test_a_hash_of_the_page_alone_is_refused(
    key: list[Any], parent: list[int] | None, size: int, family: Family
) -> None:
    events = node_of(key, parent, size)
    found, rejections = refusals(*events, family=family)
    assert found == []
    assert [one.reason for one in rejections] == [RejectReason.RELEASE] * len(events)
    assert [one.event for one in rejections] == list(range(len(events)))


def test_the_root_of_old_releases_is_no_parent() -> None:
    found, (rejection,) = refusals(stored([-1], parent_block_hash=EMPTY_KEY_HASH))
    assert (found, rejection.reason) == ([], RejectReason.RELEASE)
    assert rejection.field == "events[0].parent_block_hash"
    assert "upgrade to 0.5.7" in rejection.detail


def test_an_old_release_costs_its_stores_only() -> None:
    found, rejections = refusals(CLEARED, *node_of([1, 2, 3, 4], None, 4), removed([3]), stored([-1]))
    assert [type(one) for one in found] == [ClearBlocks, RemoveBlocks, StoreRun]
    assert [(one.event, one.field) for one in rejections] == [(1, "events[1].block_hashes[0]")]


@given(tokens, st.integers(-(2**63), 2**63 - 1))
def test_no_other_hash_is_taken_for_one_of_an_old_release(key: list[int], block_hash: int) -> None:
    found, rejections = refusals(stored([block_hash], token_ids=key, block_size=len(key)))
    refused = block_hash == hash(tuple(key))
    assert (len(found), len(rejections)) == (not refused, refused)
