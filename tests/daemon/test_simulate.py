"""The simulated rank: what it says it did is what it holds, in every wire format, and the same for the same seed."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheTier
from kvcensus.daemon.engines import ENGINE_TRANSLATORS
from kvcensus.daemon.simulate.cache import CacheOptions, Held
from kvcensus.daemon.simulate.rank import Rank, RankOptions
from kvcensus.daemon.simulate.wire import FORMATS
from kvcensus.translators.translation import ClearScope, TranslatorOptions

SMALL = CacheOptions(blocks=96, cpu_blocks=40, window_blocks=2)
VLLM = [name for name in FORMATS if name.startswith("vllm")]
SGLANG = [name for name in FORMATS if name.startswith("sglang")]


def a_rank(options: RankOptions, seed: int = 0) -> Rank:
    ticks = count(1_700_000_000)
    return Rank(options, 0, seed, clock=lambda: float(next(ticks)))


def index_of(backend: MemoryBackend) -> Held:
    held: Held = {}
    for one in backend.snapshot():
        held.setdefault(one.tier, {})[(one.key.block_hash, one.key.group)] = one.ref_count
    return held


def follow(rank: Rank, messages: int, clears: ClearScope = ClearScope.ALL, engine: str = "vllm") -> None:
    """Translate and apply every message, and compare with the truth now and then."""
    backend = MemoryBackend()
    translator = ENGINE_TRANSLATORS[engine](TranslatorOptions("w", "m", "m", clears=clears))
    facts = 0
    unknown = 0
    for number in range(messages):
        message = rank.next_message()
        assert message.seq == number
        translation = translator.translate(message.payload, facts)
        facts = translation.facts
        assert translation.operations
        assert not translation.rejections
        unknown += backend.apply(translation.operations).unknown_removals
        if number % 10 == 0 or number == messages - 1:
            assert index_of(backend) == rank.held(), f"after message {number}"
    assert unknown == 0


@pytest.mark.parametrize("hash_bytes", [0, 32])
@pytest.mark.parametrize("form", VLLM)
def test_what_it_reports_is_what_it_holds(form: str, hash_bytes: int) -> None:
    follow(a_rank(RankOptions(form=form, hash_bytes=hash_bytes, cache=SMALL, clear_every=60)), 120)


@pytest.mark.parametrize("form", SGLANG)
def test_a_radix_tree_reports_what_it_holds(form: str) -> None:
    follow(a_rank(RankOptions(form=form, cache=SMALL, clear_every=60)), 120, engine="sglang")


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1 << 32), blocks=st.integers(64, 300), cpu_blocks=st.integers(0, 50), window=st.integers(0, 4)
)
def test_whatever_the_seed_and_the_sizes(seed: int, blocks: int, cpu_blocks: int, window: int) -> None:
    cache = CacheOptions(blocks=blocks, cpu_blocks=cpu_blocks, window_blocks=window)
    follow(a_rank(RankOptions(cache=cache, clear_every=30), seed), 80)


def test_a_reset_that_leaves_the_cpu_tier_is_for_a_consumer_that_clears_the_device_only() -> None:
    cache = CacheOptions(blocks=96, cpu_blocks=40, clear_offloaded=False)
    follow(a_rank(RankOptions(cache=cache, clear_every=20)), 200, ClearScope.DEVICE)


def test_the_same_seed_says_the_same() -> None:
    options = RankOptions(cache=SMALL, clear_every=50)
    one, same, other = a_rank(options, 7), a_rank(options, 7), a_rank(options, 8)
    said = [rank.next_message().payload for _ in range(50) for rank in (one, same)]
    assert said[::2] == said[1::2]
    assert said[::2] != [other.next_message().payload for _ in range(50)]


def test_blocks_leave_for_others_and_copies_happen() -> None:
    rank = a_rank(RankOptions(cache=SMALL))
    most_copies = 0
    for _ in range(300):
        rank.next_message()
        device = rank.held()[CacheTier.HBM]
        assert sum(device.values()) <= SMALL.blocks
        most_copies = max(most_copies, *device.values())
        assert len(rank.held().get(CacheTier.CPU_DRAM, {})) <= SMALL.cpu_blocks
    assert most_copies >= 2
    assert len(rank.held()[CacheTier.CPU_DRAM]) == SMALL.cpu_blocks


def test_a_radix_tree_has_one_copy_and_begins_with_a_clear() -> None:
    rank = a_rank(RankOptions(form="sglang-0.5.20", cache=CacheOptions(blocks=96)))
    assert b"AllBlocksCleared" in rank.next_message().payload
    for _ in range(200):
        rank.next_message()
        assert set(rank.held()[CacheTier.HBM].values()) == {1}


def test_a_restart_forgets_everything_and_counts_from_0() -> None:
    rank = a_rank(RankOptions(cache=SMALL))
    for _ in range(20):
        rank.next_message()
    rank.restart()
    assert (rank.held(), rank.last_seq) == ({}, -1)
    assert rank.next_message().seq == 0


def test_a_message_that_could_not_be_encoded_uses_its_number_up() -> None:
    rank = a_rank(RankOptions(cache=SMALL))
    rank.next_message()
    before = rank.held()
    rank.lose_message()
    assert rank.held() != before
    assert rank.next_message().seq == 2
