"""What every source says of its events: what is not on the wire, and what a loss costs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from kvcensus.backends.model import CacheTier
from kvcensus.translators.translation import ClearScope, HashJoin, TranslatorOptions

from .section import Section


class OnFence(StrEnum):
    """What happens to the blocks of a worker that cannot be believed any more."""

    DROP = "drop"
    KEEP = "keep"


class Translated(Section, frozen=True, kw_only=True):
    """The settings that decide what the events of a source mean."""

    on_fence: OnFence = OnFence.DROP
    """What happens to a worker's blocks when messages are lost for good. `keep`: they stay, marked untrusted."""
    model: str = ""
    """Model name of the scope: the stream does not say it. Give it when one index serves several models."""
    tokenizer: str = ""
    """Tokenizer name of the scope. Default: that of the model."""
    tenant: str = ""
    """Tenant of blocks whose event names none (a cache salt does)."""
    count_copies: bool = True
    """Count the copies of a block, as vLLM holds and removes them. False with `kv_cache_report_mode="full"`."""
    clears: ClearScope = ClearScope.ALL
    """What AllBlocksCleared empties. `device` when an offloading tier outlives a reset of the prefix cache."""
    hash_join: HashJoin = HashJoin.AUTO
    """Whether byte hashes are cut to the 64 bits of integer ones: `auto` does once a stream has sent both."""
    media: dict[str, CacheTier] = msgspec.field(default_factory=dict)
    """Further spellings of tiers: an unknown one is refused, never guessed."""
    bytes_per_block: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 0
    """Size of one block, 0 when unknown: the stream does not say it."""

    def settle_tokenizer(self) -> None:
        """The tokenizer is that of the model, unless it is named."""
        if not self.tokenizer:
            msgspec.structs.force_setattr(self, "tokenizer", self.model)

    def options_of(self, worker: str, model: str = "") -> TranslatorOptions:
        """What the translator of a stream of `worker` is told. `model` is what the stream says, "" for nothing."""
        return TranslatorOptions(
            worker=worker,
            model_id=model or self.model,
            tokenizer_id=(model if model and self.tokenizer == self.model else "") or self.tokenizer,
            tenant_id=self.tenant,
            count_copies=self.count_copies,
            clears=self.clears,
            hash_join=self.hash_join,
            media=self.media,
            bytes_per_block=self.bytes_per_block,
        )
