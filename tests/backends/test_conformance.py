"""What every backend promises, sentence by sentence of `backends.interface`."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from threading import Thread

import pytest

from kvcensus.backends.errors import BackendUnsupported
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import (
    ROOT,
    ApplyResult,
    CacheResidency,
    Cursor,
    GroupKind,
    GroupSpec,
    Holding,
    IdentityScope,
    WorkerMatch,
)
from kvcensus.backends.registry import backend_names

from .building import DRAM, HBM, LORA, SCOPE, SSD, block, blocks, clear, key, remove, residency, store

A, B, C, D, E = blocks(1, 2, 3, 4, 5)


def only(found: Iterable[CacheResidency]) -> CacheResidency:
    (one,) = found
    return one


def places(found: Iterable[CacheResidency]) -> list[tuple[str, str]]:
    return sorted((one.worker_id, one.tier.value) for one in found)


def hashes(found: Iterable[CacheResidency]) -> list[bytes]:
    return sorted(one.key.block_hash for one in found)


# records and copies


def test_a_stored_run_becomes_one_record_per_block(backend: IndexBackend) -> None:
    result = backend.apply([store(A, B, parent=ROOT, rank=3, tokens=16, at_ms=7, size=100)])

    assert result == ApplyResult(stored=2)
    assert only(backend.find(A)) == CacheResidency(key(A), "w", HBM, 100, 7, 1, False, 3)
    assert only(backend.find(B)) == CacheResidency(key(B, parent=A, index=1), "w", HBM, 100, 7, 1, False, 3)


def test_a_store_of_a_known_record_adds_a_copy(backend: IndexBackend) -> None:
    backend.apply([store(A, size=100, at_ms=1)])

    assert backend.apply([store(A, size=100, at_ms=2)]) == ApplyResult(copies_added=1)
    assert only(backend.find(A)).ref_count == 2
    assert only(backend.find(A)).last_access_ms == 2
    assert len(backend) == 1
    assert backend.metrics().resident_bytes == 200


def test_a_store_that_does_not_count_copies_only_refreshes(backend: IndexBackend) -> None:
    backend.apply([store(A, at_ms=1)])

    assert backend.apply([store(A, at_ms=2, count_copies=False)]) == ApplyResult(refreshed=1)
    assert only(backend.find(A)).ref_count == 1
    assert only(backend.find(A)).last_access_ms == 2


def test_a_record_leaves_with_its_last_copy(backend: IndexBackend) -> None:
    backend.apply([store(A), store(A)])

    assert backend.apply([remove(A)]) == ApplyResult(copies_removed=1)
    assert only(backend.find(A)).ref_count == 1
    assert backend.apply([remove(A)]) == ApplyResult(removed=1, copies_removed=1)
    assert backend.find(A) == []
    assert backend.apply([remove(A)]) == ApplyResult(unknown_removals=1)


def test_one_hash_twice_in_a_run_is_two_copies(backend: IndexBackend) -> None:
    assert backend.apply([store(A, B, A, C)]) == ApplyResult(stored=3, copies_added=1)
    assert only(backend.find(A)).ref_count == 2
    assert hashes(backend.prefix_scan(SCOPE, A)) == [B, C]


def test_what_a_store_does_not_know_leaves_what_is_known(backend: IndexBackend) -> None:
    backend.apply([store(A, B, tokens=16, size=100, at_ms=5)])

    backend.apply([store(B, parent=None, tokens=0, size=0, at_ms=0)])

    assert only(backend.find(B)) == residency(key(B, parent=A, index=1), bytes=100, last_access_ms=5, ref_count=2)


def test_what_a_store_knows_replaces_what_was_known(backend: IndexBackend) -> None:
    backend.apply([store(B, parent=None, tokens=0, size=0)])

    backend.apply([store(A, B, tokens=16, size=100)])

    assert only(backend.find(B)).key == key(B, parent=A, index=1)
    assert only(backend.find(B)).bytes == 100
    assert backend.metrics().resident_bytes == 300


def test_put_replaces_the_record_of_the_same_identity(backend: IndexBackend) -> None:
    first = residency(key(B, parent=A, index=1, tokens=16), bytes=100, ref_count=3)
    second = residency(key(B, parent=C, index=None, tokens=32), bytes=50, ref_count=2, pinned=True, last_access_ms=9)
    backend.put(first)
    assert only(backend.find(B)) == first

    backend.put(second)

    assert only(backend.find(B)) == second
    assert len(backend) == 1
    assert backend.metrics().resident_bytes == 100
    assert backend.prefix_scan(SCOPE, A) == []
    assert hashes(backend.prefix_scan(SCOPE, C)) == [B]


def test_putting_many_is_putting_one_after_the_other(backend: IndexBackend) -> None:
    backend.apply([store(A, B, size=10)])
    first = residency(key(B, parent=A, index=1), bytes=100, ref_count=3)
    others = [
        residency(key(C, parent=B, index=None, tokens=0), pinned=True),
        residency(key(B, parent=None, scope=LORA, group=1), worker="v", tier=DRAM, rank=2, last_access_ms=9),
        residency(key(D, parent=C, index=3), worker="v", bytes=5),
    ]
    last = residency(key(B, parent=C, index=7), bytes=50, ref_count=2)

    backend.put_all([first, *others, last])
    backend.put_all([])

    put = {repr(one) for one in [*others, last]}
    assert {repr(one) for one in backend.snapshot()} == {repr(one) for one in backend.find(A)} | put
    assert hashes(backend.prefix_scan(SCOPE, A)) == []
    assert hashes(backend.prefix_scan(SCOPE, C)) == [B, D]
    assert backend.metrics().resident_bytes == 10 + 100 + 5


def test_a_run_of_no_blocks_tells_of_its_place_and_of_nothing_else(backend: IndexBackend) -> None:
    window = GroupSpec(GroupKind.WINDOW, 64, 16)

    assert backend.apply([store(parent=None, worker="w", rank=3, group=2, tier=DRAM, spec=window)]) == ApplyResult()

    assert backend.holdings() == [Holding("w", 3, DRAM, 2, window, 0, 0)]
    assert list(backend.snapshot()) == []


def test_what_is_compacted_stays_as_it_is(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(C, worker="v")], [Cursor("s", 1, 5)])
    backend.clear_worker("v")
    before = (sorted(map(repr, backend.snapshot())), backend.cursors(), backend.holdings())
    with suppress(BackendUnsupported):
        backend.compact()

    assert (sorted(map(repr, backend.snapshot())), backend.cursors(), backend.holdings()) == before
    assert backend.apply([store(C, parent=B)]) == ApplyResult(stored=1)
    assert only(backend.find(C)).key.block_index == 2


def test_scope_group_worker_and_tier_each_make_another_record(backend: IndexBackend) -> None:
    records = {
        residency(key(A)),
        residency(key(A, scope=LORA)),
        residency(key(A, group=1)),
        residency(key(A), worker="other"),
        residency(key(A), tier=DRAM),
    }
    for record in records:
        backend.put(record)

    assert set(backend.find(A)) == records
    assert len(backend) == 5


def test_a_pinned_record_stays_pinned_when_stored_again(backend: IndexBackend) -> None:
    backend.put(residency(key(A), pinned=True))
    backend.apply([store(A)])
    assert only(backend.find(A)).pinned


# removal


def test_removal_needs_no_scope(backend: IndexBackend) -> None:
    backend.apply([store(A, scope=LORA)])
    assert backend.apply([remove(A)]) == ApplyResult(removed=1, copies_removed=1)
    assert backend.is_empty()


def test_removal_concerns_only_the_worker(backend: IndexBackend) -> None:
    backend.apply([store(A, worker="w"), store(A, worker="other")])
    backend.apply([remove(A, worker="w")])
    assert places(backend.find(A)) == [("other", "hbm")]


def test_removal_of_a_tier_leaves_the_other_tiers(backend: IndexBackend) -> None:
    backend.apply([store(A, tier=HBM), store(A, tier=DRAM), store(A, tier=SSD)])
    backend.apply([remove(A, tier=HBM)])
    assert places(backend.find(A)) == [("w", "cpu_dram"), ("w", "local_ssd")]


def test_removal_of_a_group_leaves_the_other_groups(backend: IndexBackend) -> None:
    backend.apply([store(A, group=0), store(A, group=1)])
    backend.apply([remove(A, group=1)])
    assert only(backend.find(A)).key.group == 0


def test_removal_without_tier_and_group_takes_a_copy_of_each_record(backend: IndexBackend) -> None:
    backend.apply([store(A), store(A), store(A, tier=DRAM), store(A, group=1), store(A, scope=LORA)])

    assert backend.apply([remove(A)]) == ApplyResult(removed=3, copies_removed=4)
    assert only(backend.find(A)) == residency(key(A), last_access_ms=1000)


def test_an_unknown_removal_is_counted_once_per_hash(backend: IndexBackend) -> None:
    backend.apply([store(A, tier=DRAM)])
    assert backend.apply([remove(A, B, C, tier=HBM)]) == ApplyResult(unknown_removals=3)
    assert len(backend) == 1


def test_remove_block_takes_every_copy_tier_and_group_in_one_scope(backend: IndexBackend) -> None:
    backend.apply([store(A), store(A), store(A, tier=DRAM), store(A, group=1), store(A, scope=LORA)])
    backend.apply([store(A, worker="other")])

    assert backend.remove_block(SCOPE, "w", A) == 3
    assert backend.remove_block(SCOPE, "w", A) == 0
    assert {one.key.scope for one in backend.find(A) if one.worker_id == "w"} == {LORA}
    assert len(backend) == 2


def test_operations_take_effect_in_order(backend: IndexBackend) -> None:
    backend.apply([store(A), remove(A), store(A, size=1), clear(), store(A, size=2), store(B, parent=A), remove(A)])
    assert only(backend.snapshot()).key == key(B, parent=A, index=1)


# scopes and hashes


def test_no_adapter_is_not_the_empty_adapter(backend: IndexBackend) -> None:
    empty = IdentityScope("model", "tokenizer", "")
    backend.apply([store(A, scope=SCOPE), store(A, scope=empty)])

    assert [one.key.adapter_id for one in backend.find(A, SCOPE)] == [None]
    assert [one.key.adapter_id for one in backend.locate(key(A, scope=empty))] == [""]
    assert [one.key.adapter_id for one in backend.prefix_scan(empty, ROOT)] == [""]
    assert backend.remove_block(empty, "w", A) == 1
    assert backend.match(empty, [A]) == []
    assert len(backend.match(SCOPE, [A])) == 1


def test_names_that_contain_nul_are_kept_apart(backend: IndexBackend) -> None:
    one, other = IdentityScope("a\0b", "c"), IdentityScope("a", "b\0c")
    backend.apply([store(A, scope=one, worker="w\0"), store(A, scope=other, worker="w")])

    assert only(backend.find(A, one)).worker_id == "w\0"
    assert only(backend.find(A, other)).worker_id == "w"
    assert backend.clear_worker("w\0") == 1


MIXED = (
    b"\x00" * 8,
    b"\x00" * 16,
    b"\x00" * 32,
    b"prefix-8",
    b"prefix-8\x00sixteen",
    b"prefix-8\x01sixteen",
    b"nul\x00nul\x00",
    b"\x08" * 8,
    b"\xff" * 32,
    b"x",
    b"y" * 240,
)


def test_hashes_of_any_length_and_content_are_kept_apart(backend: IndexBackend) -> None:
    backend.apply([store(*MIXED)])

    assert hashes(backend.snapshot()) == sorted(MIXED)
    for index, block_hash in enumerate(MIXED):
        assert only(backend.find(block_hash)).key.block_index == index
        following = [MIXED[index + 1]] if index + 1 < len(MIXED) else []
        assert hashes(backend.prefix_scan(SCOPE, block_hash)) == following
    assert backend.match(None, MIXED)[0].blocks == len(MIXED)
    for left in range(len(MIXED) - 1, -1, -1):
        backend.apply([remove(MIXED[left])])
        assert len(backend) == left


def test_links_of_hashes_that_begin_alike_are_kept_apart(backend: IndexBackend) -> None:
    short, long = b"prefix-8", b"prefix-8\x01sixteen"
    backend.apply([store(short), store(long), store(A, parent=short), store(B, parent=long)])
    backend.apply([store(C, parent=short), store(D, parent=long)])

    assert hashes(backend.prefix_scan(SCOPE, short)) == [A, C]
    assert hashes(backend.prefix_scan(SCOPE, long)) == [B, D]


# places in a chain


def test_the_index_goes_on_from_the_parent_s(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(C, D, parent=B)])
    backend.apply([store(E, parent=D)])
    assert [only(backend.find(one)).key.block_index for one in (A, B, C, D, E)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("parent", [None, E])
def test_without_a_known_parent_the_index_is_unknown(backend: IndexBackend, parent: bytes | None) -> None:
    backend.apply([store(A, B, parent=parent)])
    backend.apply([store(C, parent=B)])

    assert [only(backend.find(one)).key.block_index for one in (A, B, C)] == [None, None, None]
    assert only(backend.find(A)).key.prefix_hash == parent


@pytest.mark.parametrize("elsewhere", [{"worker": "other"}, {"group": 1}])
def test_the_parent_s_place_counts_only_for_the_same_worker_and_group(
    backend: IndexBackend, elsewhere: dict[str, object]
) -> None:
    backend.apply([store(A, **elsewhere), store(B, parent=A)])  # type: ignore[arg-type]
    assert only(backend.find(B)).key.block_index is None


def test_the_parent_is_looked_up_in_the_own_tier_first_then_the_fastest(backend: IndexBackend) -> None:
    for tier, index in ((HBM, 10), (DRAM, 20), (SSD, 30)):
        backend.put(residency(key(A, index=index), tier=tier))

    backend.apply([store(B, parent=A, tier=DRAM)])
    backend.apply([remove(A, tier=DRAM), store(C, parent=A, tier=DRAM)])

    assert only(backend.find(B)).key.block_index == 21
    assert only(backend.find(C)).key.block_index == 11


def test_a_parent_that_has_gone_leaves_the_index_unknown(backend: IndexBackend) -> None:
    backend.apply([store(A), remove(A), store(B, parent=A)])
    assert only(backend.find(B)).key.block_index is None


def test_a_cleared_parent_leaves_the_index_unknown(backend: IndexBackend) -> None:
    backend.apply([store(A)])
    backend.apply([clear(), store(B, parent=A)])
    assert only(backend.find(B)).key.block_index is None


@pytest.mark.parametrize("parent", [None, E])
def test_where_no_parent_tells_the_index_the_run_s_own_word_counts(backend: IndexBackend, parent: bytes | None) -> None:
    backend.apply([store(A, B, parent=parent, start_index=7), store(C, parent=B)])

    assert [only(backend.find(one)).key.block_index for one in (A, B, C)] == [7, 8, 9]
    assert only(backend.find(A)).key.prefix_hash == parent


@pytest.mark.parametrize("elsewhere", [{"worker": "other"}, {"group": 1}, {"parent": E}, {"parent": E, "tier": DRAM}])
def test_a_parent_that_cannot_tell_leaves_it_to_the_run_s_own_word(
    backend: IndexBackend, elsewhere: dict[str, object]
) -> None:
    backend.apply([store(A, **elsewhere), store(B, parent=A, start_index=7)])  # type: ignore[arg-type]
    assert only(backend.find(B)).key.block_index == 7


def test_the_root_and_a_known_parent_know_better_than_the_run(backend: IndexBackend) -> None:
    backend.apply([store(A, B, start_index=7), store(C, parent=B, start_index=7)])
    backend.apply([store(D, parent=C, tier=DRAM, start_index=7)])

    assert [only(backend.find(one)).key.block_index for one in (A, B, C, D)] == [0, 1, 2, 3]


def test_bare_hashes_have_no_index_of_their_own(backend: IndexBackend) -> None:
    backend.apply([store(A, parent=None, consecutive=False, start_index=7)])
    assert only(backend.find(A)).key.block_index is None


def test_bare_hashes_take_their_place_from_a_sibling_record(backend: IndexBackend) -> None:
    backend.apply([store(A, B, scope=LORA, tokens=16)])

    backend.apply([store(B, C, tier=DRAM, parent=None, tokens=0, consecutive=False, size=10)])

    assert only(one for one in backend.find(B) if one.tier is DRAM) == residency(
        key(B, scope=LORA, parent=A, index=1), tier=DRAM, bytes=10, last_access_ms=1000
    )
    assert only(backend.find(C)).key == key(C, parent=None, index=None, tokens=0)


def test_a_run_with_gaps_does_not_link_its_blocks(backend: IndexBackend) -> None:
    backend.apply([store(A, B, C), store(A, C, group=1, parent=ROOT, consecutive=False)])

    assert only(one for one in backend.find(C) if one.key.group == 1).key == key(C, parent=B, index=2, group=1)
    assert hashes(backend.prefix_scan(SCOPE, A)) == [B]


def test_a_sibling_of_another_block_size_gives_no_place(backend: IndexBackend) -> None:
    backend.apply([store(A, tokens=16), store(A, group=1, tokens=32, consecutive=False)])
    assert only(one for one in backend.find(A) if one.key.group == 1).key == key(
        A, parent=None, index=None, tokens=32, group=1
    )


def test_a_sibling_of_another_worker_gives_no_place(backend: IndexBackend) -> None:
    backend.apply([store(A, worker="other"), store(A, consecutive=False, scope=LORA)])
    assert only(one for one in backend.find(A) if one.worker_id == "w").key == key(
        A, scope=LORA, parent=None, index=None
    )


def test_a_run_without_tenant_belongs_to_its_parent_s(backend: IndexBackend) -> None:
    tenant = IdentityScope("model", "tokenizer", None, "tenant")
    backend.apply([store(A, scope=tenant)])

    backend.apply([store(B, parent=A, tenant_from_parent=True), store(C, parent=A, tenant_from_parent=False)])
    backend.apply([store(D, parent=E, tenant_from_parent=True)])

    assert only(backend.find(B)).key == key(B, scope=tenant, parent=A, index=1)
    assert only(backend.find(C)).key.scope == SCOPE
    assert only(backend.find(D)).key.scope == SCOPE


# questions


def test_find_answers_for_one_scope_or_all(backend: IndexBackend) -> None:
    backend.apply([store(A), store(A, scope=LORA, worker="other", tier=DRAM)])

    assert places(backend.find(A)) == [("other", "cpu_dram"), ("w", "hbm")]
    assert places(backend.find(A, LORA)) == [("other", "cpu_dram")]
    assert backend.find(A, IdentityScope("none", "none")) == []
    assert backend.find(B) == []


def test_locate_is_exact_in_scope_hash_and_group(backend: IndexBackend) -> None:
    backend.apply([store(A), store(A, tier=DRAM), store(A, worker="other"), store(A, group=1), store(A, scope=LORA)])

    asked = key(A, parent=None, index=None, tokens=0)
    assert places(backend.locate(asked)) == [("other", "hbm"), ("w", "cpu_dram"), ("w", "hbm")]
    assert len(backend.locate(key(A, group=1))) == 1
    assert len(backend.locate(key(A, scope=LORA))) == 1
    assert backend.locate(key(B)) == []


def test_prefix_scan_gives_all_children_of_a_block(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(C, parent=A), store(D, parent=A, worker="other"), store(E, parent=A, scope=LORA)])

    assert hashes(backend.prefix_scan(SCOPE, A)) == [B, C, D]
    assert hashes(backend.prefix_scan(LORA, A)) == [E]
    assert backend.prefix_scan(SCOPE, B) == []


def test_prefix_scan_of_root_gives_the_starts_of_chains(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(C, D), store(E, parent=None)])
    assert hashes(backend.prefix_scan(SCOPE, ROOT)) == [A, C]


def test_the_first_children_by_hash_and_whether_there_are_more(backend: IndexBackend) -> None:
    backend.apply([store(one, parent=A) for one in (D, C, B)])
    backend.apply([store(B, parent=A, worker="other"), store(A, parent=A, scope=LORA)])

    for limit, first in ((1, [B, B]), (2, [B, B, C]), (3, [B, B, C, D]), (9, [B, B, C, D])):
        found, more = backend.first_children(SCOPE, A, limit)
        assert (hashes(found), more) == (first, limit < 3)
    assert backend.first_children(SCOPE, ROOT, 1) == ([], False)


def test_children_are_found_after_their_parent_has_gone(backend: IndexBackend) -> None:
    backend.apply([store(A, B, C)])
    backend.apply([store(D, parent=B)])

    backend.apply([remove(B)])
    assert hashes(backend.prefix_scan(SCOPE, A)) == []
    assert hashes(backend.prefix_scan(SCOPE, B)) == [C, D]

    backend.apply([remove(C, D)])
    assert backend.prefix_scan(SCOPE, B) == []


def test_children_of_a_block_that_came_back_are_found(backend: IndexBackend) -> None:
    backend.apply([store(A, B), remove(A), store(A, C)])
    assert hashes(backend.prefix_scan(SCOPE, A)) == [B, C]


def test_a_new_block_after_a_known_one_is_its_child(backend: IndexBackend) -> None:
    backend.apply([store(A, B)])
    backend.apply([store(A, C)])
    assert hashes(backend.prefix_scan(SCOPE, A)) == [B, C]


def test_children_on_one_worker_stay_when_another_is_cleared_and_reclaimed(backend: IndexBackend) -> None:
    backend.apply([store(A, B, worker="gone"), store(A, B, worker="w")])

    backend.clear_worker("gone")
    while backend.reclaim(1):
        pass

    assert places(backend.prefix_scan(SCOPE, A)) == [("w", "hbm")]
    assert places(backend.prefix_scan(SCOPE, ROOT)) == [("w", "hbm")]


def test_a_record_put_where_a_cleared_one_was_is_found_from_its_parent(backend: IndexBackend) -> None:
    backend.apply([store(A, worker="other"), store(A, B)])
    backend.clear_worker("w")
    backend.apply([remove(A, worker="other")])

    backend.put(residency(key(B, parent=A, index=1)))

    assert hashes(backend.prefix_scan(SCOPE, A)) == [B]


def test_holdings_say_what_each_worker_has_by_tier_and_group(backend: IndexBackend) -> None:
    spec = GroupSpec(GroupKind.WINDOW, 128, 16)
    backend.apply([store(A, B, size=10), store(A, size=10), store(A, tier=DRAM, size=7)])
    backend.apply([store(A, worker="other", rank=2, group=1, spec=spec), store(worker="idle")])

    assert Counter(backend.holdings()) == Counter(
        [
            Holding("w", None, HBM, 0, GroupSpec(), 2, 30),
            Holding("w", None, DRAM, 0, GroupSpec(), 1, 7),
            Holding("other", 2, HBM, 1, spec, 1, 0),
            Holding("idle", None, HBM, 0, GroupSpec(), 0, 0),
        ]
    )


def test_metrics_count_what_is_resident_and_what_was_done(backend: IndexBackend) -> None:
    backend.apply([store(A, B, size=10), store(A, size=10), store(A, size=10, count_copies=False), remove(B, C)])
    backend.put(residency(key(D), bytes=5, ref_count=2))
    backend.remove_block(SCOPE, "w", D)
    backend.prefix_scan(SCOPE, ROOT)

    metrics = backend.metrics()
    assert (metrics.resident_blocks, metrics.resident_bytes) == (1, 20)
    assert (metrics.puts, metrics.removes, metrics.prefix_scans) == (5, 2, 1)
    assert (metrics.bytes_written > 0) == backend.persistent()
    assert len(backend) == 1
    assert not backend.is_empty()


def test_names_and_files(backend: IndexBackend) -> None:
    assert backend.name() in backend_names()
    assert backend.persistent() == (backend.name() != "memory")
    assert (backend.stored_bytes() > 0) == backend.persistent()


# clearing


def test_clear_worker_drops_all_that_one_worker_holds(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(A, tier=DRAM), store(A, group=1), store(A, scope=LORA), store(A, worker="other")])

    assert backend.clear_worker("w") == 5
    assert places(backend.find(A)) == [("other", "hbm")]
    assert backend.find(B) == []
    assert len(backend) == 1
    assert backend.clear_worker("w") == 0
    assert backend.clear_worker("nobody") == 0


def test_a_clear_of_one_tier_leaves_the_others(backend: IndexBackend) -> None:
    backend.apply([store(A, B, size=10), store(A, tier=DRAM, size=3)])

    assert backend.apply([clear(tier=HBM)]) == ApplyResult(cleared=2)
    assert places(backend.snapshot()) == [("w", "cpu_dram")]
    assert backend.metrics().resident_bytes == 3


def test_a_cleared_worker_can_store_again_at_once(backend: IndexBackend) -> None:
    backend.apply([store(A, B, size=10), store(A)])

    result = backend.apply([clear(), store(A, size=1)])

    assert result == ApplyResult(stored=1, cleared=2)
    assert only(backend.snapshot()) == residency(key(A), bytes=1, last_access_ms=1000)
    while backend.reclaim(1):
        pass
    assert only(backend.snapshot()) == residency(key(A), bytes=1, last_access_ms=1000)


def test_reclaim_ends_and_changes_no_answer(backend: IndexBackend) -> None:
    chain = [block(number) for number in range(50)]
    backend.apply([store(*chain, worker="gone"), store(*chain[:25])])
    backend.clear_worker("gone")

    for _ in range(1000):
        if not backend.reclaim(7):
            break
    else:
        raise AssertionError("reclaim never ends")

    assert hashes(backend.snapshot()) == chain[:25]
    assert not backend.reclaim(7)


def test_clear_drops_every_record_and_keeps_cursors(backend: IndexBackend) -> None:
    cursor = Cursor("stream", 1, 5)
    backend.apply([store(A, B), store(A, worker="other")], [cursor])

    backend.clear()

    assert backend.is_empty()
    assert list(backend.snapshot()) == []
    assert backend.holdings() == []
    assert backend.prefix_scan(SCOPE, ROOT) == []
    assert backend.cursors() == {"stream": cursor}
    assert backend.apply([store(A)]) == ApplyResult(stored=1)


# cursors


def test_cursors_are_stored_with_operations(backend: IndexBackend) -> None:
    first = Cursor("a", 1, 5, b"fingerprint", "source", "w/0", 0, 1, 2, 3, 4, 5, "stale", "gap", 6, 7)
    second = Cursor("b", 1, -1)
    backend.apply([store(A)], [first, second])
    assert backend.cursors() == {"a": first, "b": second}

    moved = Cursor("a", 2, 0)
    backend.apply([], [moved])
    assert backend.cursors() == {"a": moved, "b": second}


def test_a_forgotten_stream_has_no_cursor(backend: IndexBackend) -> None:
    backend.apply([store(A)], [Cursor("a", 1, 5), Cursor("b", 1, 6)])
    backend.forget_stream("a")
    backend.forget_stream("unknown")
    assert backend.cursors() == {"b": Cursor("b", 1, 6)}
    assert len(backend) == 1


# match


def test_match_gives_the_prefix_of_each_worker_and_tier_longest_first(backend: IndexBackend) -> None:
    backend.apply([store(A, B, C, worker="long", rank=1), store(A, worker="short"), store(B, C, worker="no start")])
    backend.apply([store(D, parent=C, worker="long", rank=1, tier=DRAM)])
    backend.apply([store(A, B, worker="long", rank=1, tier=DRAM)])

    assert backend.match(SCOPE, [A, B, C, D]) == [
        WorkerMatch("long", 1, {HBM: 3, DRAM: 2}, 3, 4),
        WorkerMatch("short", None, {HBM: 1}, 1, 1),
    ]


def test_match_of_nothing_is_nothing(backend: IndexBackend) -> None:
    backend.apply([store(A)])
    assert backend.match(SCOPE, []) == []
    assert backend.match(SCOPE, [B, A]) == []
    assert backend.match(IdentityScope("none", "none"), [A]) == []


def test_match_in_one_scope_or_in_any(backend: IndexBackend) -> None:
    backend.apply([store(A, B), store(C, parent=B, scope=LORA)])

    assert backend.match(SCOPE, [A, B, C])[0].blocks == 2
    assert backend.match(LORA, [A, B, C]) == []
    assert backend.match(None, [A, B, C])[0].blocks == 3


def test_match_sees_removals_and_clears(backend: IndexBackend) -> None:
    backend.apply([store(A, B, C), store(A, B, worker="other")])
    backend.apply([remove(B)])
    assert [(one.worker_id, one.blocks) for one in backend.match(None, [A, B, C])] == [("other", 2), ("w", 1)]
    backend.clear_worker("other")
    assert [(one.worker_id, one.blocks) for one in backend.match(None, [A, B, C])] == [("w", 1)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 300])
def test_match_of_long_chains(backend: IndexBackend, length: int) -> None:
    chain = [block(number) for number in range(length)]
    backend.apply([store(*chain), store(*chain[: length // 2 + 1], worker="half")])

    assert backend.match(SCOPE, [*chain, block(9999)]) == [
        *([WorkerMatch("half", None, {HBM: 1}, 1, 1)] if length == 1 else []),
        WorkerMatch("w", None, {HBM: length}, length, length),
        *([WorkerMatch("half", None, {HBM: length // 2 + 1}, length // 2 + 1, length // 2 + 1)] if length > 1 else []),
    ]


FULL = GroupSpec(GroupKind.FULL, 0, 16)
WINDOW = GroupSpec(GroupKind.WINDOW, 33, 16)
STATE = GroupSpec(GroupKind.STATE, 0, 16)


def test_match_of_a_hybrid_model_needs_the_chain_and_the_window(backend: IndexBackend) -> None:
    chain = blocks(*range(10))
    backend.apply([store(*chain, group=0, spec=FULL)])
    assert backend.match(None, chain)[0].blocks == 10

    backend.apply([store(group=1, spec=WINDOW)])
    assert backend.match(None, chain) == []

    backend.apply([store(*chain[3:6], chain[8], group=1, consecutive=False, spec=WINDOW)])
    assert backend.match(None, chain)[0].blocks == 6
    assert backend.match(None, chain[:5])[0].blocks == 5
    assert backend.match(None, chain[:4]) == []


def test_match_of_a_state_group_needs_the_last_block(backend: IndexBackend) -> None:
    chain = blocks(*range(10))
    backend.apply([store(*chain, group=0, spec=FULL), store(chain[6], group=1, spec=STATE)])
    assert backend.match(None, chain)[0].blocks == 7


def test_match_of_window_blocks_alone_may_begin_anywhere(backend: IndexBackend) -> None:
    chain = blocks(*range(200))
    backend.apply([store(*chain[150:160], parent=None, spec=WINDOW), store(*chain[:3], worker="full", spec=FULL)])
    assert [(one.worker_id, one.blocks) for one in backend.match(None, chain)] == [("w", 160), ("full", 3)]


def test_match_of_groups_with_blocks_of_two_sizes(backend: IndexBackend) -> None:
    chain = blocks(*range(8))
    backend.apply([store(*chain[:7], group=0, spec=FULL)])
    backend.apply([store(chain[1], chain[3], chain[5], group=1, spec=GroupSpec(GroupKind.FULL, 0, 32))])
    assert backend.match(None, chain)[0].blocks == 6


# one moment


def test_a_snapshot_is_of_one_moment(backend: IndexBackend) -> None:
    chain = [block(number) for number in range(1000)]
    backend.apply([store(*chain)])

    snapshot = backend.snapshot()
    first = next(snapshot)
    backend.apply([clear(), store(*(block(number) for number in range(5000, 7000)))])
    backend.apply([store(*chain[:10])])

    assert hashes([first, *snapshot]) == chain


def test_a_snapshot_may_be_given_up(backend: IndexBackend) -> None:
    backend.apply([store(A, B)])
    snapshot = backend.snapshot()
    next(snapshot)
    snapshot.close()  # type: ignore[attr-defined]
    assert len(list(backend.snapshot())) == 2


def test_other_threads_see_whole_calls_only(backend: IndexBackend) -> None:
    """Each call replaces one chain by another; a reader must never see both, or none."""
    chains = [[block(1000 * which + number) for number in range(40)] for which in (1, 2)]
    backend.apply([store(*chains[0])], [Cursor("s", 0, 0)])
    wrong: list[int] = []
    done = False

    def read() -> None:
        for turn in count():
            seen = [len(backend), backend.metrics().resident_blocks, sum(one.blocks for one in backend.holdings())]
            seen.append(len(backend.prefix_scan(SCOPE, ROOT)) * 40)
            if turn % 20 == 0:
                seen.append(len(list(backend.snapshot())))
            wrong.extend(one for one in seen if one != 40)
            if done:
                return

    readers = [Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(1, 300):
        new, old = chains[turn % 2], chains[1 - turn % 2]
        backend.apply([remove(*old[:20]), store(*new), remove(*old[20:])], [Cursor("s", 0, turn)])
    done = True
    for reader in readers:
        reader.join()

    assert wrong == []


def test_a_part_of_a_block_does_not_make_the_blocks_of_its_group_smaller(backend: IndexBackend) -> None:
    backend.apply([store(A, group=1, spec=GroupSpec(GroupKind.FULL, 0, 32))])
    backend.apply([store(B, group=1, consecutive=False, spec=GroupSpec(GroupKind.FULL, 0, 16))])
    (holding,) = backend.holdings()
    assert holding.spec.block_size == 32
    backend.apply([clear(), store(A, group=1, spec=GroupSpec(GroupKind.FULL, 0, 16))])
    (holding,) = backend.holdings()
    assert holding.spec.block_size == 16


def test_a_run_of_any_length_is_one_chain(backend: IndexBackend) -> None:
    chain = [number.to_bytes(8, "big") for number in range(1, 1001)]
    backend.apply([store(*chain)])
    backend.apply([remove(chain[600])])
    assert backend.match(None, chain)[0].blocks == 600
    for at in (0, 255, 256, 599, 999):
        assert backend.find(chain[at])[0].key.block_index == at
    for at in (254, 255, 256, 600):
        children = backend.prefix_scan(SCOPE, chain[at])
        assert [one.key.block_hash for one in children] == [chain[at + 1]]
