"""The judge: what the captured engines themselves had in their caches, and would have found."""

from collections import Counter

import msgspec
import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ClearBlocks
from kvcensus.translators.events import INTEGER_HASHES_SEEN
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..captures_reader import Stage, capture_names, load_capture
from .wire_families import FAMILIES, Family


def follow(stage: Stage, count_copies: bool = True) -> MemoryBackend:
    """An index that followed one life of an engine."""
    backend = MemoryBackend()
    translator = VllmTranslator(TranslatorOptions("engine", "model", count_copies=count_copies))
    facts = 0
    for message in stage.messages:
        translation = translator.translate(message.payload, facts)
        assert translation.rejections == []
        assert translation.rank == 0
        facts = translation.facts
        assert backend.apply(translation.operations).unknown_removals == 0
    shown = any(len(block_hash) == 8 for block_hash, _ in stage.copies)
    assert facts == (INTEGER_HASHES_SEEN if shown else 0)
    return backend


def copies_in(backend: MemoryBackend) -> Counter[tuple[bytes, int]]:
    copies: Counter[tuple[bytes, int]] = Counter()
    for residency in backend.snapshot():
        copies[residency.key.block_hash, residency.key.group] += residency.ref_count
    return copies


STAGES = [(name, at) for name in capture_names("vllm") for at in range(len(load_capture(name).stages))]


def test_every_capture_is_here() -> None:
    assert len(capture_names("vllm")) == 24
    assert sum(len(load_capture(name).stages) for name in capture_names("vllm")) == 27


@pytest.mark.parametrize(("name", "at"), STAGES)
def test_the_index_is_the_cache_of_the_engine(name: str, at: int) -> None:
    stage = load_capture(name).stages[at]
    full_report = name.endswith("fullreport")
    backend = follow(stage, count_copies=not full_report)
    expected = dict.fromkeys(stage.copies, 1) if full_report else stage.copies
    assert copies_in(backend) == expected
    for probe in stage.probes:
        matches = backend.match(None, probe.block_hashes)
        assert (matches[0].blocks if matches else 0) == probe.prefix_blocks


@pytest.mark.parametrize("name", [name for name in capture_names("vllm") if name.endswith("restart")])
def test_a_restart_is_a_clear_and_a_new_beginning(name: str) -> None:
    capture = load_capture(name)
    backend = MemoryBackend()
    translator = VllmTranslator(TranslatorOptions("engine"))
    facts, last = 0, -1
    for message in capture.messages:
        if message.seq <= last:
            backend.apply([ClearBlocks("engine/0")])
            facts = 0
        translation = translator.translate(message.payload, facts)
        backend.apply(translation.operations)
        facts, last = translation.facts, message.seq
    assert copies_in(backend) == capture.stages[-1].copies


def test_counting_copies_of_a_full_report_keeps_blocks_that_are_gone() -> None:
    stage = load_capture("vllm-0.32.0-fullreport").stages[0]
    assert len(copies_in(follow(stage, count_copies=True)).keys() - stage.copies.keys()) == 61


@pytest.mark.parametrize(("name", "lost"), [("vllm-0.32.0-swa", 13), ("vllm-0.12.0-dups", 1)])
def test_not_counting_copies_loses_blocks_that_are_there(name: str, lost: int) -> None:
    stage = load_capture(name).stages[0]
    backend = MemoryBackend()
    translator = VllmTranslator(TranslatorOptions("engine", count_copies=False))
    for message in stage.messages:
        backend.apply(translator.translate(message.payload, 0).operations)
    assert len(stage.copies.keys() - copies_in(backend).keys()) == lost


def test_blocks_of_an_adapter_are_in_its_scope() -> None:
    stage = load_capture("vllm-0.32.0-lora").stages[0]
    backend = follow(stage)
    adapters = {residency.key.adapter_id for residency in backend.snapshot()}
    assert adapters == {None, "adapter-a", "adapter-b"}
    for probe in stage.probes:
        for match in backend.match(None, probe.block_hashes):
            found = {
                residency.key.adapter_id
                for block_hash in probe.block_hashes[: match.blocks]
                for residency in backend.find(block_hash)
            }
            assert found == {probe.lora}


@pytest.mark.parametrize("name", capture_names("vllm"))
def test_a_block_index_counts_from_the_root(name: str) -> None:
    """Only blocks of a sliding-window group may have no place, those whose chain has lost every other record."""
    for stage in load_capture(name).stages:
        for probe in stage.probes:
            backend = follow(stage, count_copies=not name.endswith("fullreport"))
            for at, block_hash in enumerate(probe.block_hashes):
                for residency in backend.find(block_hash):
                    index = residency.key.block_index
                    assert index == at or (index is None and name.endswith("swa"))
            break


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.releases)
@pytest.mark.parametrize("name", ["vllm-0.32.0-evict", "vllm-0.32.0-cbor-bytes"])
def test_a_stream_as_an_older_release_would_have_written_it_gives_the_same_index(name: str, family: Family) -> None:
    (stage,) = load_capture(name).stages
    backend = MemoryBackend()
    translator = VllmTranslator(TranslatorOptions("engine", "model"))
    for message in stage.messages:
        seconds, events, rank = msgspec.msgpack.decode(message.payload)
        translation = translator.translate(family.batch(events, seconds, rank), 0)
        assert translation.rejections == []
        assert translation.rank == (0 if family.rank else None)
        assert backend.apply(translation.operations).unknown_removals == 0
    assert copies_in(backend) == stage.copies
    for probe in stage.probes:
        matches = backend.match(None, probe.block_hashes)
        assert (matches[0].blocks if matches else 0) == probe.prefix_blocks
