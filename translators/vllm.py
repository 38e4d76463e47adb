"""vLLM's event stream, every release since 0.9.0. What it understands and why: docs/reference/vllm.md."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import msgspec

from kvcensus.backends.model import CacheTier, GroupKind, GroupSpec, IdentityScope, RemoveBlocks, StoreRun

from .events import INTEGER_HASHES_SEEN, BadEvent, EventTranslator, adapter_of, hashes_of, parent_of, token_count
from .packed import array_length, first_item_is_nil
from .translation import ClearScope, HashJoin, RejectReason, Translation, TranslatorOptions
from .wire import (
    UNDECODABLE,
    AllBlocksCleared,
    PositionalAllBlocksCleared,
    RemovedEvent,
    Small,
    StoredEvent,
    WireDecoder,
)

KINDS = {
    "full_attention": GroupKind.FULL,
    "mla_attention": GroupKind.FULL,
    "sink_full_attention": GroupKind.FULL,
    "sliding_window": GroupKind.WINDOW,
    "sliding_window_mla": GroupKind.WINDOW,
    "mamba": GroupKind.STATE,
}
"""What `kv_cache_spec_kind` means for a prefix hit. Any other kind is OTHER: its rule is not on the wire."""

_SETTINGS_KEPT = 1024
_decode_keys = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_decode_first_keys = msgspec.msgpack.Decoder(list[object]).decode


class BlockStored(StoredEvent, tag="BlockStored", tag_field="type"):
    """Blocks were stored. `extra_keys` stays packed: it is nil for nearly every block."""

    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: Small | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: Small | None = None


class BlockRemoved(RemovedEvent, tag="BlockRemoved", tag_field="type"):
    """One copy of each of these blocks was dropped."""

    group_idx: Small | None = None


class PositionalBlockStored(BlockStored, array_like=True, tag="BlockStored"):
    """BlockStored as an array."""


class PositionalBlockRemoved(BlockRemoved, array_like=True, tag="BlockRemoved"):
    """BlockRemoved as an array."""


_Event = BlockStored | BlockRemoved | AllBlocksCleared
_PositionalEvent = PositionalBlockStored | PositionalBlockRemoved | PositionalAllBlocksCleared


class _Setting(NamedTuple):
    """What the runs of a stream have in common but for their blocks, parent and time."""

    scope: IdentityScope
    tier: CacheTier
    group: int
    spec: GroupSpec | None


class VllmTranslator(EventTranslator[BlockStored, BlockRemoved]):
    """Translates the payloads of one vLLM stream. See `translation.Translator`."""

    def __init__(self, options: TranslatorOptions) -> None:
        cleared_tier = CacheTier.HBM if options.clears is ClearScope.DEVICE else None
        super().__init__(options, WireDecoder(_Event, _PositionalEvent), cleared_tier)
        self._cut_always = options.hash_join is HashJoin.ALWAYS
        self._cut_facts = INTEGER_HASHES_SEEN if options.hash_join is HashJoin.AUTO else 0
        self._setting = lru_cache(_SETTINGS_KEPT)(self._new_setting)

    def _stored(self, event: BlockStored, worker_id: str, result: Translation) -> StoreRun:
        options = self._options
        block_size = event.block_size
        wire_parent = event.parent_block_hash
        tenant = options.tenant_id if wire_parent is not None else self._tenant(event)
        scope, tier, group, spec = self._setting(
            event.medium,
            event.lora_name,
            event.lora_id,
            tenant,
            event.group_idx,
            block_size,
            event.kv_cache_spec_kind,
            event.kv_cache_spec_sliding_window,
        )
        tokens = token_count(event)
        cut = self._cut_always or result.facts & self._cut_facts != 0
        hashes = hashes_of(event.block_hashes, cut, result)
        consecutive = tokens > 0 and len(hashes) * block_size == tokens
        return StoreRun(
            worker_id,
            result.rank,
            scope,
            tier,
            hashes,
            parent_of(wire_parent, cut) if consecutive else None,
            group,
            block_size,
            result.engine_ms,
            options.bytes_per_block,
            consecutive,
            wire_parent is not None,
            options.count_copies,
            spec,
        )

    def _removed(self, event: BlockRemoved, worker_id: str, result: Translation) -> RemoveBlocks:
        tier = self._tier(event.medium)
        cut = self._cut_always or result.facts & self._cut_facts != 0
        return RemoveBlocks(worker_id, hashes_of(event.block_hashes, cut, result), tier, event.group_idx or 0)

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
        scope = IdentityScope(options.model_id, options.tokenizer_id, adapter_of(lora_name, lora_id), tenant)
        return _Setting(scope, tier, group_idx or 0, _spec(tier, group_idx, block_size, kind, window))

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


def _first_keys(packed: msgspec.Raw) -> list[object]:
    """The extra keys of the first block of an event. [] for none; raises BadEvent for what is no list of lists."""
    try:
        if not array_length(packed) or first_item_is_nil(packed):
            return []
        return _decode_first_keys(_decode_keys(packed)[0])
    except (ValueError, *UNDECODABLE) as error:
        detail = f"the extra keys of the first block cannot be read: {error}"
        raise BadEvent(RejectReason.EVENT_SHAPE, "extra_keys", detail) from None


def _spec(
    tier: CacheTier, group_idx: int | None, block_size: int, kind: str | None, window: int | None
) -> GroupSpec | None:
    """What an event says of its group. Only the device's own events do: those of a connector describe its own chunks.

    vLLM 0.20 and 0.21 have groups without kinds; their block sizes still count.
    """
    if tier is not CacheTier.HBM or group_idx is None or not block_size:
        return None
    return GroupSpec(GroupKind.FULL if kind is None else KINDS.get(kind, GroupKind.OTHER), window or 0, block_size)
