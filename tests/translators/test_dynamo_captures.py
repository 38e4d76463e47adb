"""Every captured release of Dynamo comes to what was published."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheTier, ClearBlocks, Operation, StoreRun
from kvcensus.translators.dynamo import DynamoTranslator
from kvcensus.translators.dynamo_envelope import DynamoAddress, Opened, parse_subject
from kvcensus.translators.media import Media
from kvcensus.translators.translation import TranslatorOptions

from ..dynamo_captures import NAMES, messages_of, published

EVERY_CAPTURE = pytest.mark.parametrize("name", NAMES)
LIFE = ["life"]


def opened(name: str) -> Iterator[Opened]:
    for message in messages_of(name):
        result = message.open()
        assert isinstance(result, Opened)
        assert result.rejections == []
        yield result


def tier_of(spelling: str) -> CacheTier:
    tier = Media().tier_of(spelling)
    assert tier is not None
    return tier


def steps_of(operation: Operation) -> Iterator[list[Any]]:
    """An operation, block by block, in the words of the script that published it."""
    if isinstance(operation, StoreRun):
        parent = operation.parent
        for block_hash in operation.block_hashes:
            yield ["store", operation.tier, block_hash, parent]
            parent = block_hash
    elif isinstance(operation, ClearBlocks):
        yield ["clear"]
    else:
        for block_hash in operation.block_hashes:
            yield ["remove", operation.tier, block_hash]


def expected_step(step: list[Any]) -> list[Any]:
    kind, *rest = step
    if not rest:
        return [kind]
    tier, block_hash, *parents = rest
    packed = [b"" if parent is None else parent.to_bytes(8, "big") for parent in parents]
    return [kind, tier_of(tier), block_hash.to_bytes(8, "big"), *packed]


def lives_of(name: str) -> dict[int, list[list[Operation]]]:
    """For each rank, the operations of each of its lives: another begins with a new worker, publisher, or numbering."""
    lives: dict[int, list[list[Operation]]] = defaultdict(list)
    last: dict[int, tuple[DynamoAddress, str, int]] = {}
    for message in opened(name):
        (address,) = message.addresses
        ((low, high),) = message.event_ids
        before = last.get(address.rank)
        if before is None or before[:2] != (address, message.lineage) or low <= before[2]:
            lives[address.rank].append([])
        last[address.rank] = (address, message.lineage, high)
        translation = DynamoTranslator(TranslatorOptions("w", "m"), address).translate(message.inner, 0)
        assert translation.rejections == []
        lives[address.rank][-1].extend(translation.operations)
    return lives


@EVERY_CAPTURE
def test_the_operations_are_what_was_published(name: str) -> None:
    steps: dict[int, list[list[Any]]] = {}
    for rank, lives in lives_of(name).items():
        steps[rank] = [step for life in lives for step in (LIFE, *(s for one in life for s in steps_of(one)))][1:]

    expected = published(name).steps
    assert steps == {rank: list(map(expected_step, told)) for rank, told in expected.items()}


@EVERY_CAPTURE
def test_the_index_holds_what_each_life_held(name: str) -> None:
    for rank, lives in lives_of(name).items():
        for operations, held in zip(lives, published(name).held[rank], strict=True):
            backend = MemoryBackend()
            backend.apply(operations)
            found: dict[CacheTier, set[int]] = defaultdict(set)
            for residency in backend.snapshot():
                assert residency.worker_id == f"w/{rank}"
                found[residency.tier].add(int.from_bytes(residency.key.block_hash, "big"))
            assert found == {tier_of(spelling): hashes for spelling, hashes in held.items()}


@EVERY_CAPTURE
def test_every_lineage_numbers_its_messages_from_0_without_a_gap(name: str) -> None:
    numbers = defaultdict(list)
    for message in opened(name):
        if message.sequence is not None:
            numbers[message.lineage].append(message.sequence)
    for sequence in numbers.values():
        assert sequence == list(range(len(sequence)))


@EVERY_CAPTURE
def test_without_an_envelope_every_life_numbers_its_events_from_first_without_a_gap(name: str) -> None:
    last: dict[DynamoAddress, int] = {}
    for message in opened(name):
        if message.sequence is None:
            (address,) = message.addresses
            ((low, high),) = message.event_ids
            assert low == high
            assert low in (last.get(address, message.first - 1) + 1, message.first)
            last[address] = low


@EVERY_CAPTURE
def test_the_subjects_name_where_the_messages_come_from(name: str) -> None:
    for message in messages_of(name):
        if not message.frames:
            origin = parse_subject(message.subject)
            assert origin is not None
            assert origin.namespace == "my-ns"
            assert origin.component in ("back_end", "back-end")
            assert origin.endpoint in (None, "generate")
            assert (origin.endpoint is not None) == (published(name).release >= "1.4")
