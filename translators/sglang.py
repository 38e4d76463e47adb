"""SGLang's event stream, every release since 0.5.7. What it understands and why: docs/reference/sglang.md."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, NamedTuple

import msgspec

from kvcensus.backends.model import CacheTier, IdentityScope, RemoveBlocks, StoreRun

from .events import BadEvent, EventTranslator, adapter_of, hashes_of, parent_of, token_count
from .translation import RejectReason, Translation, TranslatorOptions
from .wire import (
    UNDECODABLE,
    AllBlocksCleared,
    PositionalAllBlocksCleared,
    RemovedEvent,
    StoredEvent,
    WireDecoder,
)

EMPTY_KEY_HASH = 5740354900026072187
"""CPython's `hash(())`: the parent of a page at the root, in releases before 0.5.1."""

_SETTINGS_KEPT = 1024
_OLD = "SGLang before 0.5.6 names a page by its tokens alone, wherever it is: nothing can be indexed; upgrade to 0.5.7"
_decode_key = msgspec.msgpack.Decoder(tuple[int | tuple[int, int], ...]).decode


class BlockStored(StoredEvent, tag="BlockStored", tag_field="type"):
    """Pages were stored."""

    cache_salt: str | None = None
    lora_name: str | None = None


class _Metadata(msgspec.Struct):
    cache_salt: str | None = None


class PositionalBlockStored(StoredEvent, array_like=True, tag="BlockStored"):
    """Pages were stored. `metadata` is there in 0.5.18 and 0.5.19, for requests with a salt."""

    metadata: _Metadata | None = None
    lora_name: ClassVar[None] = None

    @property
    def cache_salt(self) -> str | None:
        """As in the maps."""
        return None if self.metadata is None else self.metadata.cache_salt


class BlockRemoved(RemovedEvent, tag="BlockRemoved", tag_field="type"):
    """Pages were dropped."""


class PositionalBlockRemoved(RemovedEvent, array_like=True, tag="BlockRemoved"):
    """BlockRemoved as an array."""


_Event = BlockStored | BlockRemoved | AllBlocksCleared
_PositionalEvent = PositionalBlockStored | PositionalBlockRemoved | PositionalAllBlocksCleared


class _Setting(NamedTuple):
    """What the runs of a stream have in common but for their pages, parent and time."""

    scope: IdentityScope
    tier: CacheTier


class SglangTranslator(EventTranslator[BlockStored | PositionalBlockStored, RemovedEvent]):
    """Translates the payloads of one SGLang stream. See `translation.Translator`.

    Of the options, `count_copies`, `clears` and `hash_join` make no difference: the radix tree has each page once a
    tier, AllBlocksCleared is about the whole tree, and every hash is an integer.
    """

    def __init__(self, options: TranslatorOptions) -> None:
        super().__init__(options, WireDecoder(_Event, _PositionalEvent))
        self._setting = lru_cache(_SETTINGS_KEPT)(self._new_setting)

    def _stored(self, event: BlockStored | PositionalBlockStored, worker_id: str, result: Translation) -> StoreRun:
        if event.medium is None:
            _refuse_old_release(event)
        block_size = event.block_size
        wire_parent = event.parent_block_hash
        setting = self._setting(event.medium, event.lora_name, event.lora_id, event.cache_salt)
        tokens = token_count(event)
        hashes = hashes_of(event.block_hashes, False, result)
        consecutive = tokens > 0 and len(hashes) * block_size == tokens
        return StoreRun(
            worker_id,
            result.rank,
            setting.scope,
            setting.tier,
            hashes,
            parent_of(wire_parent, False) if consecutive else None,
            token_count=block_size,
            at_ms=result.engine_ms,
            bytes_per_block=self._options.bytes_per_block,
            consecutive=consecutive,
            count_copies=False,
        )

    def _removed(self, event: RemovedEvent, worker_id: str, result: Translation) -> RemoveBlocks:
        tier = self._tier(event.medium)
        return RemoveBlocks(worker_id, hashes_of(event.block_hashes, False, result), tier, 0)

    def _new_setting(
        self, medium: str | None, lora_name: str | None, lora_id: int | None, cache_salt: str | None
    ) -> _Setting:
        options = self._options
        tenant = options.tenant_id if cache_salt is None else cache_salt
        adapter = adapter_of(lora_name, lora_id)
        return _Setting(IdentityScope(options.model_id, options.tokenizer_id, adapter, tenant), self._tier(medium))


def _refuse_old_release(event: StoredEvent) -> None:
    """Raises BadEvent for an event of 0.4.6.post5 to 0.5.5: its hash is Python's hash of the tuple of its tokens.

    `medium` came with 0.5.9. From 0.5.6 on hashes are of the whole prefix, and equal this one by a chance of 2**-64.
    """
    if event.parent_block_hash == EMPTY_KEY_HASH:
        raise BadEvent(RejectReason.RELEASE, "parent_block_hash", _OLD)
    try:
        (block_hash,) = msgspec.msgpack.decode(event.block_hashes, type=tuple[int])
        key = _decode_key(event.token_ids)
    except UNDECODABLE:
        return
    if hash(key) == block_hash:
        raise BadEvent(RejectReason.RELEASE, "block_hashes[0]", _OLD)
