"""What the translators of vLLM and SGLang do alike: take the events of a payload in order, and refuse what is bad."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from kvcensus.backends.model import ROOT, CacheTier, ClearBlocks, RemoveBlocks, StoreRun

from .hashes import HASHES_MAX, BadHash, hash_bytes, unpack_hashes
from .media import Media
from .packed import array_length
from .translation import Rejection, RejectReason, Together, Translation, TranslatorOptions, worker_id_of
from .wire import UNDECODABLE, AllBlocksCleared, Batch, RemovedEvent, StoredEvent, WireDecoder, raw_events

INTEGER_HASHES_SEEN = 1
"""Bit of `facts`: this stream has sent hashes as integers."""

_CLOCK_END_S = 253_402_300_800.0
"""The year 10000."""


class BadEvent(Exception):
    """An event that was decoded and makes no sense. `field` is the path inside it."""

    def __init__(self, reason: RejectReason, field: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.field = field


StoredT = TypeVar("StoredT", bound=StoredEvent)
RemovedT = TypeVar("RemovedT", bound=RemovedEvent)


class EventTranslator(ABC, Generic[StoredT, RemovedT]):
    """Translates the payloads of one stream. See `translation.Translator`. What an event means is up to the engine."""

    def __init__(
        self,
        options: TranslatorOptions,
        decoder: WireDecoder[StoredT | RemovedT | AllBlocksCleared],
        cleared_tier: CacheTier | None = None,
    ) -> None:
        """`cleared_tier` is what AllBlocksCleared clears, None for every tier."""
        self._options = options
        self._media = Media(options.media)
        self._decoder = decoder
        self._cleared_tier = cleared_tier
        self._rank: int | None = None
        self._worker_id = worker_id_of(options.worker, None)

    @abstractmethod
    def _stored(self, event: StoredT, worker_id: str, result: Translation) -> StoreRun:
        """The run that an event stored. Raises BadEvent."""

    @abstractmethod
    def _removed(self, event: RemovedT, worker_id: str, result: Translation) -> RemoveBlocks:
        """The blocks that an event removed. Raises BadEvent."""

    def translate(self, payload: bytes, facts: int) -> Translation:
        """Translate one payload. `facts` has INTEGER_HASHES_SEEN or 0; what is returned is for the next payload."""
        batch = self._decoder.decode(payload)
        if not isinstance(batch, Batch):
            return Translation([], [batch], facts=facts)
        result = Translation([], [], rank=batch.rank, facts=facts)
        self._take(batch, payload, result)
        return result

    def translate_all(self, payloads: Sequence[bytes], facts: int) -> Together | None:
        """Translate payloads as `translate` does each in turn. See `translation.Translator`."""
        batches = self._decoder.decode_all(payloads)
        if batches is None:
            return None
        rank = batches[0].rank
        result = Translation([], [], rank=rank, facts=facts)
        times_ms = []
        for batch, payload in zip(batches, payloads):
            self._take(batch, payload, result)
            if result.rejections or batch.rank != rank:
                return None
            if result.engine_ms:
                times_ms.append(result.engine_ms)
        return Together(result, times_ms)

    def _take(
        self,
        batch: Batch[StoredT | RemovedT | AllBlocksCleared] | Batch[StoredT | RemovedT | AllBlocksCleared | Rejection],
        payload: bytes,
        result: Translation,
    ) -> None:
        """Add what a payload comes to."""
        seconds, rank = batch.ts, batch.rank
        result.hashes = 0
        if 0 <= seconds < _CLOCK_END_S:
            result.engine_ms = int(seconds * 1000)
        else:
            detail = f"the engine's clock says {seconds}, which is no time; the events were taken without one"
            result.rejections.append(Rejection(RejectReason.PAYLOAD, detail, "ts"))
        if rank != self._rank:
            self._rank, self._worker_id = rank, worker_id_of(self._options.worker, rank)
        worker_id = self._worker_id
        raws: list[msgspec.Raw] = []
        for position, event in enumerate(batch.events):
            try:
                if isinstance(event, StoredEvent):
                    result.operations.append(self._stored(event, worker_id, result))
                    result.stored_events += 1
                elif isinstance(event, RemovedEvent):
                    result.operations.append(self._removed(event, worker_id, result))
                    result.removed_events += 1
                elif isinstance(event, AllBlocksCleared):
                    result.operations.append(ClearBlocks(worker_id, self._cleared_tier))
                    result.cleared_events += 1
                else:
                    result.rejections.append(event)
            except BadEvent as bad:
                where = f"events[{position}].{bad.field}"
                raws = raws or raw_events(payload)
                result.rejections.append(Rejection(bad.reason, str(bad), where, position, bytes(raws[position])))

    def _tier(self, medium: str | None) -> CacheTier:
        tier = self._media.tier_of(medium)
        if tier is None:
            raise BadEvent(RejectReason.MEDIUM, "medium", f"the medium {medium!r} is no known spelling of a tier")
        return tier


def hashes_of(packed: msgspec.Raw, cut: bool, result: Translation) -> tuple[bytes, ...]:
    """The block hashes of an event, counted in `result`. Raises BadEvent."""
    try:
        hashes, integers = unpack_hashes(packed, cut)
    except BadHash as bad:
        raise BadEvent(RejectReason.BLOCK_HASH, f"block_hashes[{bad.position}]", str(bad)) from None
    except (ValueError, *UNDECODABLE) as error:
        detail = f"the block hashes cannot be read: {error}"
        raise BadEvent(RejectReason.EVENT_SHAPE, "block_hashes", detail) from None
    result.hashes += len(hashes)
    if result.hashes > HASHES_MAX:
        detail = f"more than {HASHES_MAX} block hashes in one payload"
        raise BadEvent(RejectReason.BLOCK_HASH, "block_hashes", detail)
    if integers:
        result.facts |= INTEGER_HASHES_SEEN
    return hashes


def parent_of(wire_parent: int | bytes | None, cut: bool) -> bytes:
    """The parent of a run whose place is known: without one it starts at the root. Raises BadEvent."""
    if wire_parent is None:
        return ROOT
    try:
        return hash_bytes(wire_parent, cut)
    except BadHash as bad:
        raise BadEvent(RejectReason.BLOCK_HASH, "parent_block_hash", str(bad)) from None


def token_count(event: StoredEvent) -> int:
    """The number of tokens of an event. Raises BadEvent."""
    try:
        return array_length(event.token_ids)
    except ValueError:
        raise BadEvent(RejectReason.EVENT_SHAPE, "token_ids", "the token ids are no array") from None


def adapter_of(lora_name: str | None, lora_id: int | None) -> str | None:
    """The name of a LoRA adapter; its number where no name is sent."""
    return lora_name if lora_name is not None or lora_id is None else str(lora_id)
