"""Spellings of a medium, by any engine, and the tier each means. All comparisons ignore case."""

from __future__ import annotations

from collections.abc import Mapping

from kvcensus.backends.model import CacheTier

SPELLINGS: Mapping[CacheTier, str] = {
    CacheTier.HBM: "hbm gpu gpu_memory vram device",
    CacheTier.REMOTE_HBM: "remote_hbm remote_gpu remote_gpu_memory",
    CacheTier.CPU_DRAM: "cpu dram cpu_dram cpu_pinned host host_memory host_pinned cpu_tier1",
    CacheTier.LOCAL_SSD: "ssd local_ssd nvme disk cpu_tier2 fs",
    CacheTier.OBJECT_STORE: "object object_store s3 blob storage external remote network shared obj",
}
"""The accepted spellings of each tier, in lower case. vLLM 0.26 says FS and OBJ, later STORAGE for both."""


class Media:
    """The tiers of one source: the accepted spellings, and those that its configuration adds or overrides."""

    def __init__(self, extra: Mapping[str, CacheTier] | None = None) -> None:
        self._tiers = {word: tier for tier, words in SPELLINGS.items() for word in words.split()}
        self._tiers.update({spelling.casefold(): tier for spelling, tier in (extra or {}).items()})

    def tier_of(self, medium: str | None) -> CacheTier | None:
        """The tier that a medium means; None when the spelling is unknown. No medium at all means the device."""
        if medium is None:
            return CacheTier.HBM
        return self._tiers.get(medium.casefold())
