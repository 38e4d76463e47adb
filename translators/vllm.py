"""vLLM's event stream, every release since 0.9.0. What it understands and why: docs/reference/vllm.md."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import msgspec

from kvcensus.backends.model import (
    ROOT,
    CacheTier,
    ClearBlocks,
    GroupKind,
    GroupSpec,
    IdentityScope,
    RemoveBlocks,
    StoreRun,
)

from .hashes import HASHES_MAX, BadHash, hash_bytes, unpack_hashes
from .media import Media
from .packed import array_length, first_item_is_nil
from .translation import (
    ClearScope,
    HashJoin,
    Rejection,
    RejectReason,
    Translation,
    TranslatorOptions,
    worker_id_of,
)
from .wire import (
    UNDECODABLE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    PositionalAllBlocksCleared,
    PositionalBlockRemoved,
    PositionalBlockStored,
    WireDecoder,
    raw_events,
)

INTEGER_HASHES_SEEN = 1
"""Bit of `facts`: this stream has sent hashes as integers."""

KINDS = {
    "full_attention": GroupKind.FULL,
    "mla_attention": GroupKind.FULL,
    "sink_full_attention": GroupKind.FULL,
    "sliding_window": GroupKind.WINDOW,
    "sliding_window_mla": GroupKind.WINDOW,
    "mamba": GroupKind.STATE,
}
"""What `kv_cache_spec_kind` means for a prefix hit. Any other kind is OTHER: its rule is not on the wire."""

_CLOCK_END_S = 253_402_300_800.0
"""The year 10000."""

_SETTINGS_KEPT = 1024
_Event = BlockStored | BlockRemoved | AllBlocksCleared
_PositionalEvent = PositionalBlockStored | PositionalBlockRemoved | PositionalAllBlocksCleared
_decode_keys = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_decode_first_keys = msgspec.msgpack.Decoder(list[object]).decode


class _BadEvent(Exception):
    """An event that was decoded and makes no sense. `field` is the path inside it."""

    def __init__(self, reason: RejectReason, field: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.field = field


class _Setting(NamedTuple):
    """What the runs of a stream have in common but for their blocks, parent and time."""

    scope: IdentityScope
    tier: CacheTier
    group: int
    spec: GroupSpec | None


class VllmTranslator:
    """Translates the payloads of one vLLM stream. See `translation.Translator`."""

    def __init__(self, options: TranslatorOptions) -> None:
        self._options = options
        self._media = Media(options.media)
        self._decoder: WireDecoder[_Event] = WireDecoder(_Event, _PositionalEvent)
        self._cleared_tier = CacheTier.HBM if options.clears is ClearScope.DEVICE else None
        self._cut_always = options.hash_join is HashJoin.ALWAYS
        self._cut_facts = INTEGER_HASHES_SEEN if options.hash_join is HashJoin.AUTO else 0
        self._setting = lru_cache(_SETTINGS_KEPT)(self._new_setting)

    def translate(self, payload: bytes, facts: int) -> Translation:
        """Translate one payload. `facts` has INTEGER_HASHES_SEEN or 0; what is returned is for the next payload."""
        batch = self._decoder.decode(payload)
        if isinstance(batch, Rejection):
            return Translation([], [batch], facts=facts)
        seconds, rank = batch.ts, batch.rank
        known_time = 0 <= seconds < _CLOCK_END_S
        result = Translation([], [], int(seconds * 1000) if known_time else 0, rank, 0, 0, 0, facts)
        if not known_time:
            detail = f"the engine's clock says {seconds}, which is no time; the events were taken without one"
            result.rejections.append(Rejection(RejectReason.PAYLOAD, detail, "ts"))
        worker_id = worker_id_of(self._options.worker, rank)
        raws: list[msgspec.Raw] = []
        for position, event in enumerate(batch.events):
            try:
                if isinstance(event, BlockStored):
                    result.operations.append(self._stored(event, worker_id, result))
                    result.stored_events += 1
                elif isinstance(event, BlockRemoved):
                    result.operations.append(self._removed(event, worker_id, result))
                    result.removed_events += 1
                elif isinstance(event, AllBlocksCleared):
                    result.operations.append(ClearBlocks(worker_id, self._cleared_tier))
                    result.cleared_events += 1
                else:
                    result.rejections.append(event)
            except _BadEvent as bad:
                where = f"events[{position}].{bad.field}"
                raws = raws or raw_events(payload)
                result.rejections.append(Rejection(bad.reason, str(bad), where, position, bytes(raws[position])))
        return result

    def _stored(self, event: BlockStored, worker_id: str, result: Translation) -> StoreRun:
        options = self._options
        block_size = event.block_size
        wire_parent = event.parent_block_hash
        tenant = options.tenant_id if wire_parent is not None else self._tenant(event)
        setting = self._setting(
            event.medium,
            event.lora_name,
            event.lora_id,
            tenant,
            event.group_idx,
            block_size,
            event.kv_cache_spec_kind,
            event.kv_cache_spec_sliding_window,
        )
        try:
            tokens = array_length(event.token_ids)
        except ValueError:
            raise _BadEvent(RejectReason.EVENT_SHAPE, "token_ids", "the token ids are no array") from None
        cut = self._cut_always or result.facts & self._cut_facts != 0
        hashes = _hashes(event.block_hashes, cut, result)
        consecutive = tokens > 0 and len(hashes) * block_size == tokens
        return StoreRun(
            worker_id,
            result.rank,
            setting.scope,
            setting.tier,
            hashes,
            _parent(wire_parent, cut) if consecutive else None,
            setting.group,
            block_size,
            result.engine_ms,
            options.bytes_per_block,
            consecutive,
            wire_parent is not None,
            options.count_copies,
            setting.spec,
        )

    def _removed(self, event: BlockRemoved, worker_id: str, result: Translation) -> RemoveBlocks:
        tier = self._tier(event.medium)
        cut = self._cut_always or result.facts & self._cut_facts != 0
        return RemoveBlocks(worker_id, _hashes(event.block_hashes, cut, result), tier, event.group_idx or 0)

    def _new_setting(
        self,
        medium: str | None,
        lora_name: str | None,
        lora_id: int | None,
        tenant: str,
        group_idx: int | None,
        block_size: int,
        kind: str | None,
        window: int | None,
    ) -> _Setting:
        options = self._options
        tier = self._tier(medium)
        adapter = lora_name if lora_name is not None or lora_id is None else str(lora_id)
        scope = IdentityScope(options.model_id, options.tokenizer_id, adapter, tenant)
        return _Setting(scope, tier, group_idx or 0, _spec(tier, group_idx, block_size, kind, window))

    def _tier(self, medium: str | None) -> CacheTier:
        tier = self._media.tier_of(medium)
        if tier is None:
            raise _BadEvent(RejectReason.MEDIUM, "medium", f"the medium {medium!r} is no known spelling of a tier")
        return tier

    def _tenant(self, event: BlockStored) -> str:
        """The cache salt of a run that starts at the root, else the configured tenant.

        vLLM puts the salt among the keys of a request's first block, in this order: LoRA name, multimodal items, salt,
        digests of prompt embeddings. Multimodal items are `[identifier, offset]` since 0.19.0; in 0.17 and 0.18 they
        are plain strings, and the last of these without a salt after it is then taken for one: blocks that might belong
        to two tenants are kept apart.
        """
        keys = _first_keys(event.extra_keys)
        if not keys:
            return self._options.tenant_id
        if keys[0] == event.lora_name:
            del keys[0]
        return next((key for key in reversed(keys) if isinstance(key, str)), self._options.tenant_id)


def _hashes(packed: msgspec.Raw, cut: bool, result: Translation) -> tuple[bytes, ...]:
    try:
        hashes, integers = unpack_hashes(packed, cut)
    except BadHash as bad:
        raise _BadEvent(RejectReason.BLOCK_HASH, f"block_hashes[{bad.position}]", str(bad)) from None
    except (ValueError, *UNDECODABLE) as error:
        detail = f"the block hashes cannot be read: {error}"
        raise _BadEvent(RejectReason.EVENT_SHAPE, "block_hashes", detail) from None
    result.hashes += len(hashes)
    if result.hashes > HASHES_MAX:
        detail = f"more than {HASHES_MAX} block hashes in one payload"
        raise _BadEvent(RejectReason.BLOCK_HASH, "block_hashes", detail)
    if integers:
        result.facts |= INTEGER_HASHES_SEEN
    return hashes


def _parent(wire_parent: int | bytes | None, cut: bool) -> bytes:
    if wire_parent is None:
        return ROOT
    try:
        return hash_bytes(wire_parent, cut)
    except BadHash as bad:
        raise _BadEvent(RejectReason.BLOCK_HASH, "parent_block_hash", str(bad)) from None


def _first_keys(packed: msgspec.Raw) -> list[object]:
    """The extra keys of the first block of an event. [] for none; raises _BadEvent for what is no list of lists."""
    try:
        if not array_length(packed) or first_item_is_nil(packed):
            return []
        return _decode_first_keys(_decode_keys(packed)[0])
    except (ValueError, *UNDECODABLE) as error:
        detail = f"the extra keys of the first block cannot be read: {error}"
        raise _BadEvent(RejectReason.EVENT_SHAPE, "extra_keys", detail) from None


def _spec(
    tier: CacheTier, group_idx: int | None, block_size: int, kind: str | None, window: int | None
) -> GroupSpec | None:
    """What an event says of its group. Only the device's own events do: those of a connector describe its own chunks.

    vLLM 0.20 and 0.21 have groups without kinds; their block sizes still count.
    """
    if tier is not CacheTier.HBM or group_idx is None or not block_size:
        return None
    return GroupSpec(GroupKind.FULL if kind is None else KINDS.get(kind, GroupKind.OTHER), window or 0, block_size)
