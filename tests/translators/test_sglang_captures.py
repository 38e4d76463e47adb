"""The judge: the radix tree of the captured engines, and what they would have found in it."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ClearBlocks
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import TranslatorOptions

from ..captures_reader import Message, Stage, capture_names, load_capture
from .sglang_families import FAMILIES, Event, Family

NAMES = capture_names("sglang")
STAGES = [(name, at) for name in NAMES for at in range(len(load_capture(name).stages))]


def follow(messages: tuple[Message, ...], backend: MemoryBackend | None = None) -> MemoryBackend:
    """An index that followed these messages."""
    backend = backend or MemoryBackend()
    translator = SglangTranslator(TranslatorOptions("engine", "model"))
    facts = 0
    for message in messages:
        translation = translator.translate(message.payload, facts)
        assert translation.rejections == []
        assert translation.rank == 0
        facts = translation.facts
        result = backend.apply(translation.operations)
        assert (result.unknown_removals, result.copies_added) == (0, 0)
    return backend


def assert_is_the_tree(backend: MemoryBackend, stage: Stage) -> None:
    held = list(backend.snapshot())
    assert {(one.key.block_hash, one.key.group): one.ref_count for one in held} == stage.copies
    (tree,) = stage.truth["trees"]
    assert len(held) * tree["page_size"] == int(tree["total_size"].strip("()").split(",")[0])
    for probe in stage.probes:
        matches = backend.match(None, probe.block_hashes)
        assert (matches[0].blocks if matches else 0) == probe.prefix_blocks


def test_every_capture_is_here() -> None:
    assert (len(NAMES), len(STAGES)) == (6, 7)


@pytest.mark.parametrize("missed", [True, False], ids=["from 0", "late"])
@pytest.mark.parametrize(("name", "at"), STAGES)
def test_the_index_is_the_tree_of_the_engine(name: str, at: int, missed: bool) -> None:
    stage = load_capture(name).stages[at]
    assert_is_the_tree(follow((stage.missed if missed else ()) + stage.messages), stage)


def test_a_restart_is_a_clear_and_a_new_beginning() -> None:
    first, second = load_capture("sglang-0.5.23-restart").stages
    assert (first.messages[-1].seq, second.messages[0].seq) == (27, 1)
    backend = follow(first.messages)
    backend.apply([ClearBlocks("engine/0")])
    assert_is_the_tree(follow(second.messages, backend), second)


def test_the_clear_at_the_start_does_for_a_restart_as_well() -> None:
    first, second = load_capture("sglang-0.5.23-restart").stages
    assert [message.seq for message in second.missed] == [0]
    assert_is_the_tree(follow(second.missed + second.messages, follow(first.messages)), second)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_index_counts_from_the_root(name: str) -> None:
    for stage in load_capture(name).stages:
        backend = follow(stage.messages)
        for probe in stage.probes:
            for at, block_hash in enumerate(probe.block_hashes):
                assert {one.key.block_index for one in backend.find(block_hash)} <= {at}


def pages_of(event: Event) -> Iterator[Event]:
    """The event as releases before 0.5.18 have it: one a page, or before 0.5.15 one for each removed page."""
    hashes, parent = event.get("block_hashes", ()), event.get("parent_block_hash")
    size = event.get("block_size", 0)
    for at, block_hash in enumerate(hashes):
        page: dict[str, Any] = {**event, "block_hashes": [block_hash]}
        if event["type"] == "BlockStored":
            page |= {"parent_block_hash": parent, "token_ids": event["token_ids"][at * size : (at + 1) * size]}
        parent = block_hash
        yield page
    if not hashes:
        yield event


@pytest.mark.parametrize("paged", [True, False], ids=["a page an event", "coalesced"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.releases)
@pytest.mark.parametrize("name", ["sglang-0.5.23-evict", "sglang-0.5.23-page1", "sglang-0.5.23-clear"])
def test_a_stream_as_an_older_release_would_have_written_it_gives_the_same_index(
    name: str, family: Family, paged: bool
) -> None:
    (stage,) = load_capture(name).stages
    backend = MemoryBackend()
    translator = SglangTranslator(TranslatorOptions("engine", "model"))
    for message in stage.messages:
        seconds, events, rank = msgspec.msgpack.decode(message.payload)
        events = [page for event in events for page in pages_of(event)] if paged else events
        translation = translator.translate(family.batch(events, seconds, rank), 0)
        assert translation.rejections == []
        assert backend.apply(translation.operations).unknown_removals == 0
    assert_is_the_tree(backend, stage)
