"""Dynamo's event stream, every release since 0.1. What it understands and why: docs/reference/dynamo.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, UnsetType

from kvcensus.backends.model import (
    ROOT,
    UNKNOWN_SCOPE,
    CacheTier,
    ClearBlocks,
    IdentityScope,
    Operation,
    RemoveBlocks,
    StoreRun,
)

from .dynamo_envelope import (
    CACHE_OWNER,
    WORKER,
    Addressed,
    DynamoAddress,
    EventDecoder,
    addressed_event,
    envelope_of,
    is_json,
    packed_events,
)
from .events import BadEvent
from .hashes import HASHES_MAX, PATTERN_BYTES, BadHash, hash_bytes, hashes_bytes
from .media import Media
from .translation import ClearScope, Rejection, RejectReason, Together, Translation, TranslatorOptions, worker_id_of
from .wire import UNDECODABLE, Rank, explained

POSITION_MAX = 1 << 30
"""The largest `start_position` taken, in blocks: 2**34 tokens in blocks of 16."""

_CLEARED = "cleared"
_KINDS = 4
_SHOWN_MAX = 64
_TIME_END_MS = 253_402_300_800_000
_DATA_PATH = ".event.data"


class Block(Struct, gc=False):
    """A stored block. The hash of its tokens, `tokens_hash`, has no use here: nobody asks by it."""

    block_hash: int


class Stored(Struct):
    """A chain of blocks was stored, each the parent of the next. `start_position` is that of the first, in blocks."""

    blocks: list[Block]
    parent_hash: int | None = None
    start_position: Annotated[int, Meta(ge=0, le=POSITION_MAX)] | None = None


class Removed(Struct):
    """The last copies of these blocks at the event's tier were dropped."""

    block_hashes: list[int]


class Data(Struct, forbid_unknown_fields=True):
    """What happened: exactly one of these. `cleared` comes as a bare string instead, in every release so far."""

    stored: Stored | UnsetType = msgspec.UNSET
    removed: Removed | UnsetType = msgspec.UNSET
    tier_cleared: str | UnsetType = msgspec.UNSET
    cleared: Any = msgspec.UNSET


class CacheEvent(Struct):
    """An event of a worker's rank, less its number."""

    data: Data | str
    dp_rank: Rank = 0


class RouterEvent(Struct):
    """An event, whose it is, and of which tier. `storage_tier` is None where it is not sent, before 1.1."""

    worker_id: int
    event: CacheEvent
    storage_tier: str | UnsetType = msgspec.UNSET
    residency_domain: Literal["worker", "cache_owner"] = "worker"


_router_events = EventDecoder(RouterEvent)


class DynamoTranslator:
    """Translates what concerns one address in the messages of Dynamo. See `translation.Translator`.

    Of the options, `hash_join` makes no difference: every hash is an integer. `clears` is about engines, and makes none
    for a cache owner.
    """

    def __init__(self, options: TranslatorOptions, address: DynamoAddress) -> None:
        self._options = options
        self._address = address
        self._media = Media(options.media)
        self._worker_id = worker_id_of(options.worker, address.rank)
        tenant = options.tenant_id or UNKNOWN_SCOPE
        device_only = options.clears is ClearScope.DEVICE and address.domain == WORKER
        self._cleared_tier = CacheTier.HBM if device_only else None
        self._scope = IdentityScope(options.model_id, options.tokenizer_id, UNKNOWN_SCOPE, tenant)

    def translate(self, payload: bytes, facts: int) -> Translation:
        """Translate a message, with or without its envelope, which tells the time. `facts` is handed back.

        Events of other addresses are left to their translators, and those that do not say whose they are to whoever
        opened the message.
        """
        envelope = envelope_of(payload)
        inner = payload if envelope is None else envelope.payload
        result = Translation([], [], rank=self._address.rank, facts=facts)
        if envelope is not None and envelope.published_at < _TIME_END_MS:
            result.engine_ms = envelope.published_at
        try:
            events = _router_events.all(inner)
        except (IndexError, *UNDECODABLE):
            self._take_apart(inner, result)
            return result
        for position, event in enumerate(events):
            if self._is_own(event):
                try:
                    self._apply(event, result)
                except BadEvent as bad:
                    self._refuse(bad, position, packed_events(inner), result)
        return result

    def translate_all(self, payloads: Sequence[bytes], facts: int) -> Together | None:
        """One by one: a message may be about other workers, too. See `translation.Translator`."""
        return None

    def _is_own(self, event: RouterEvent) -> bool:
        worker, rank, domain = self._address
        return event.worker_id == worker and event.event.dp_rank == rank and event.residency_domain == domain

    def _take_apart(self, inner: bytes, result: Translation) -> None:
        """Translate event by event a message of which not all can be read."""
        items = packed_events(inner)
        if isinstance(items, Rejection):
            result.rejections.append(items)
            return
        in_json = is_json(inner)
        for position, item in enumerate(items):
            addressed = addressed_event(item, in_json)
            if not isinstance(addressed, Addressed) or addressed.address != self._address:
                continue
            try:
                self._apply(_read(item, in_json), result)
            except BadEvent as bad:
                self._refuse(bad, position, items, result)

    def _refuse(self, bad: BadEvent, position: int, items: list[Raw] | Rejection, result: Translation) -> None:
        raw = b"" if isinstance(items, Rejection) else bytes(items[position])
        field = f"events[{position}].{bad.field}"
        result.rejections.append(Rejection(bad.reason, str(bad), field, position, raw))

    def _apply(self, event: RouterEvent, result: Translation) -> None:
        """Add the operation of one event. Raises BadEvent."""
        data = event.event.data
        operation: Operation
        if isinstance(data, str):
            if data != _CLEARED:
                raise _unknown_kind(f"an event of the unknown kind {data[:_SHOWN_MAX]!r}")
            operation = ClearBlocks(self._worker_id, self._cleared_tier)
            result.cleared_events += 1
        elif (data.stored, data.removed, data.tier_cleared, data.cleared).count(msgspec.UNSET) != _KINDS - 1:
            raise BadEvent(RejectReason.EVENT_SHAPE, "event.data", "an event must be of one kind")
        elif data.stored is not msgspec.UNSET:
            operation = self._stored(data.stored, event, result)
            result.stored_events += 1
        elif data.removed is not msgspec.UNSET:
            hashes = _hashes(data.removed.block_hashes, "removed.block_hashes[{}]", result)
            operation = RemoveBlocks(self._worker_id, hashes, self._tier_of(event), 0)
            result.removed_events += 1
        elif data.tier_cleared is not msgspec.UNSET:
            operation = ClearBlocks(self._worker_id, self._tier(data.tier_cleared, "event.data.tier_cleared"))
            result.cleared_events += 1
        else:
            operation = ClearBlocks(self._worker_id, self._cleared_tier)
            result.cleared_events += 1
        result.operations.append(operation)

    def _stored(self, stored: Stored, event: RouterEvent, result: Translation) -> StoreRun:
        options = self._options
        parent, position = _place_of(stored)
        return StoreRun(
            self._worker_id,
            self._address.rank,
            self._scope,
            self._tier_of(event),
            _hashes([block.block_hash for block in stored.blocks], "stored.blocks[{}].block_hash", result),
            parent,
            at_ms=result.engine_ms,
            bytes_per_block=options.bytes_per_block,
            count_copies=options.count_copies and event.storage_tier is msgspec.UNSET,
            start_index=position,
        )

    def _tier_of(self, event: RouterEvent) -> CacheTier:
        """The tier of a store or removal. Raises BadEvent."""
        spelling = event.storage_tier
        tier = CacheTier.HBM if spelling is msgspec.UNSET else self._tier(spelling, "storage_tier")
        if tier is CacheTier.HBM and event.residency_domain == CACHE_OWNER:
            raise BadEvent(RejectReason.MEDIUM, "storage_tier", "a cache owner has no blocks on a device")
        return tier

    def _tier(self, spelling: str, field: str) -> CacheTier:
        tier = self._media.tier_of(spelling)
        if tier is None:
            raise BadEvent(RejectReason.MEDIUM, field, f"the tier {spelling!r} is no known spelling of one")
        return tier


def _read(item: Raw, in_json: bool) -> RouterEvent:
    """One packed event. Raises BadEvent that names the field."""
    try:
        return _router_events.one(item, in_json)
    except UNDECODABLE as error:
        detail, path = explained(error)
    if path == _DATA_PATH and "unknown field" in detail:
        raise _unknown_kind(f"an event of an unknown kind: {detail}")
    reason = RejectReason.BLOCK_HASH if "block_hash" in path and "[" in path else RejectReason.EVENT_SHAPE
    raise BadEvent(reason, path.removeprefix("."), f"an event that cannot be read: {detail}")


def _unknown_kind(detail: str) -> BadEvent:
    return BadEvent(RejectReason.EVENT_TYPE, "event.data", detail)


def _hashes(values: list[int], path: str, result: Translation) -> tuple[bytes, ...]:
    """Hashes as the index has them, counted in `result`. `path` has a gap for a position. Raises BadEvent."""
    result.hashes += len(values)
    if result.hashes > HASHES_MAX:
        detail = f"more than {HASHES_MAX} block hashes in one payload"
        raise BadEvent(RejectReason.BLOCK_HASH, f"event.data.{path.format(len(values))}", detail)
    try:
        return tuple([value.to_bytes(PATTERN_BYTES, "big") for value in values])
    except OverflowError:
        pass
    try:
        return hashes_bytes(values)
    except BadHash as bad:
        raise BadEvent(RejectReason.BLOCK_HASH, f"event.data.{path.format(bad.position)}", str(bad)) from None


def _place_of(stored: Stored) -> tuple[bytes | None, int | None]:
    """The parent of a run, None if it is unknown, and the index that its event says of its first block.

    A run without a parent starts at the root, unless its position is another. Position 0 below a parent says nothing.
    Raises BadEvent.
    """
    position = stored.start_position or None
    if stored.parent_hash is None:
        return ROOT if position is None else None, position
    try:
        return hash_bytes(stored.parent_hash), position
    except BadHash as bad:
        raise BadEvent(RejectReason.BLOCK_HASH, "event.data.stored.parent_hash", str(bad)) from None
