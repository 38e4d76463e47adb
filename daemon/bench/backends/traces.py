"""Traces: payloads of simulated engines or of a recording, translated once into operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ROOT, CacheResidency, CacheTier, ClearBlocks, Operation, RemoveBlocks, StoreRun
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Translation, Translator, TranslatorOptions, worker_id_of
from kvcensus.translators.vllm import VllmTranslator

from ...recording import Recording, RecordingError
from ...simulate.cache import CacheOptions
from ...simulate.rank import Rank, RankOptions
from ...simulate.workload import WorkloadOptions
from .trace_file import Chain, Questions, Trace, TraceWriter

BATCH_BLOCKS = 16_384
"""Blocks of a call of `apply`: where the daemon's writer closes a transaction, by default."""

CAPTURE = "capture:"
_WORKERS = 8
_FIRST_S = 1_700_000_000.0
_EVICTING_SHARE = 10
"""Engines of the trace `eviction` have room for one in so many of the blocks that they store."""
_ROOM_SHARES = 2
"""Those of the others have room for so many times their share of the trace: nothing has to go."""
_LEAST_ROOM = 4096
_LEAST_BLOCKS = 64
_QUESTIONS_MAX = 5_000
_CHAIN_BLOCKS_MAX = 64
_REMOVED_SHARE = 5
_REMOVAL_BLOCKS = 16
"""Block hashes of an event of removal."""


class _Kind(NamedTuple):
    workload: WorkloadOptions
    evicts: bool


SIMULATED = {
    "chat": _Kind(WorkloadOptions(system_prompts=4, open_chats=64, agents=2), evicts=False),
    "agentic": _Kind(
        WorkloadOptions(system_prompts=2, open_chats=4, agents=8, turn_blocks_max=24, chain_blocks_max=2_000),
        evicts=False,
    ),
    "eviction": _Kind(WorkloadOptions(system_prompts=4, open_chats=64, agents=2), evicts=True),
}
"""Chats under shared system prompts, agents whose chains grow to 2,000 blocks, and chats in caches that are full."""


class _Sizes:
    def __init__(self) -> None:
        self.stored = self.removed = self.messages = self.rejections = 0


def make_trace(name: str, size: int, path: Path, engine: str = "vllm") -> Trace:
    """Write a trace of about `size` stored blocks; a recording is as long as it is. The same for the same arguments.

    Raises RecordingError.
    """
    sizes = _Sizes()
    translations = _recorded(Path(name.removeprefix(CAPTURE)), engine) if is_recording(name) else _simulated(name, size)
    index = MemoryBackend()
    with path.open("wb") as file:
        writer = TraceWriter(file)
        for batch in _batches(translations, sizes, size if not is_recording(name) else 0):
            index.apply(batch)
            writer.batch(batch)
        writer.end()
        random = Random(1)  # noqa: S311
        held = sorted(_sample(index, random), key=lambda one: (one.worker_id, one.key.block_hash))
        if not held:
            raise RecordingError(Path(name.removeprefix(CAPTURE)), None, "leaves no block in the index to ask for")
        random.shuffle(held)
        writer.questions(_questions(index, held[:_QUESTIONS_MAX]))
        for batch in _removals(held):
            writer.batch(batch)
        writer.end()
    shown = Path(name.removeprefix(CAPTURE)).name if is_recording(name) else name
    return Trace(shown, str(path), sizes.stored, sizes.removed, len(index), sizes.messages, sizes.rejections)


def is_recording(name: str) -> bool:
    """Whether a trace is a file of the user's."""
    return name.startswith(CAPTURE) or name not in SIMULATED


def _simulated(name: str, size: int) -> Iterator[Translation]:
    kind = SIMULATED[name]
    if kind.evicts:
        blocks = max(_LEAST_BLOCKS, size // (_WORKERS * _EVICTING_SHARE))
    else:
        blocks = max(_LEAST_ROOM, _ROOM_SHARES * size // _WORKERS)
    options = RankOptions(cache=CacheOptions(blocks, cpu_blocks=blocks if kind.evicts else 0), workload=kind.workload)
    ticks = count()
    ranks = [Rank(options, 0, seed, lambda: _FIRST_S + next(ticks) / 100) for seed in range(_WORKERS)]
    translators = [VllmTranslator(TranslatorOptions(f"engine-{at}", "model", "tokenizer")) for at in range(_WORKERS)]
    facts = [0] * _WORKERS
    while True:
        for at, rank in enumerate(ranks):
            translation = translators[at].translate(rank.next_message().payload, facts[at])
            facts[at] = translation.facts
            yield translation


def _recorded(path: Path, engine: str) -> Iterator[Translation]:
    """A number that goes backwards is an engine that was restarted: what it held is gone."""
    options = TranslatorOptions("recorded", "model", "tokenizer")
    translator: Translator = SglangTranslator(options) if engine == "sglang" else VllmTranslator(options)
    facts, last, rank = 0, -1, None
    for message in Recording(path):
        if message.seq is None:
            continue
        translation = translator.translate(message.payload, facts)
        if message.seq <= last:
            translation.operations.insert(0, ClearBlocks(worker_id_of("recorded", rank)))
        facts, last, rank = translation.facts, message.seq, translation.rank
        yield translation


def _batches(translations: Iterable[Translation], sizes: _Sizes, size: int) -> Iterator[list[Operation]]:
    batch: list[Operation] = []
    blocks = 0
    for translation in translations:
        sizes.messages += 1
        sizes.rejections += len(translation.rejections)
        batch += translation.operations
        for one in translation.operations:
            if isinstance(one, StoreRun):
                sizes.stored += len(one.block_hashes)
            elif isinstance(one, RemoveBlocks):
                sizes.removed += len(one.block_hashes)
        blocks += translation.hashes
        if blocks >= BATCH_BLOCKS:
            yield batch
            batch, blocks = [], 0
        if size and sizes.stored >= size:
            break
    if batch:
        yield batch


def _sample(index: MemoryBackend, random: Random) -> Iterator[CacheResidency]:
    """One in five of the records, and at least some."""
    records = len(index)
    share = max(1 / _REMOVED_SHARE, min(1.0, _LEAST_BLOCKS / max(records, 1)))
    return (one for one in index.snapshot() if random.random() < share)


def _questions(index: MemoryBackend, held: list[CacheResidency]) -> Questions:
    chains = []
    for one in held:
        chain = _chain(index, one)
        if chain:
            chains.append(Chain(one.key.scope, chain[:_CHAIN_BLOCKS_MAX]))
    holdings: dict[str, int] = {}
    for holding in index.holdings():
        holdings[holding.worker_id] = holdings.get(holding.worker_id, 0) + holding.blocks
    return Questions(
        keys=[one.key for one in held],
        parents=[(one.key.scope, one.key.prefix_hash or ROOT) for one in held if one.key.prefix_hash]
        or [(held[0].key.scope, ROOT)],
        chains=chains,
        worker_id=max(holdings, key=lambda worker: holdings[worker]) if holdings else "",
    )


def _chain(index: MemoryBackend, record: CacheResidency) -> list[bytes]:
    """The blocks from the root to this one, as far as they are known."""
    scope, chain, at = record.key.scope, [record.key.block_hash], record.key.prefix_hash
    while at:
        chain.append(at)
        at = next((one.key.prefix_hash for one in index.find(at, scope) if one.key.prefix_hash is not None), None)
    return chain[::-1]


def _removals(held: list[CacheResidency]) -> Iterator[list[Operation]]:
    """Removals of these records, a few of one worker, tier and group an event."""
    waiting: dict[tuple[str, CacheTier, int], list[bytes]] = {}
    batch: list[Operation] = []
    for one in held:
        at = (one.worker_id, one.tier, one.key.group)
        hashes = waiting.setdefault(at, [])
        hashes.append(one.key.block_hash)
        if len(hashes) == _REMOVAL_BLOCKS:
            batch.append(RemoveBlocks(one.worker_id, tuple(hashes), one.tier, one.key.group))
            hashes.clear()
        if len(batch) * _REMOVAL_BLOCKS >= BATCH_BLOCKS:
            yield batch
            batch = []
    for (worker, tier, group), hashes in waiting.items():
        if hashes:
            batch.append(RemoveBlocks(worker, tuple(hashes), tier, group))
    if batch:
        yield batch
