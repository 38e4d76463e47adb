"""Short ways to say operations and records in the tests of the backends."""

from typing import Any

from kvcensus.backends.model import (
    ROOT,
    CacheResidency,
    CacheTier,
    ClearBlocks,
    GroupSpec,
    IdentityScope,
    KvBlockKey,
    RemoveBlocks,
    StoreRun,
)

SCOPE = IdentityScope("model", "tokenizer")
LORA = IdentityScope("model", "tokenizer", "lora")
HBM, DRAM, SSD = CacheTier.HBM, CacheTier.CPU_DRAM, CacheTier.LOCAL_SSD


def block(number: int) -> bytes:
    """An 8-byte hash."""
    return number.to_bytes(8, "big")


def blocks(*numbers: int) -> tuple[bytes, ...]:
    return tuple(map(block, numbers))


def store(
    *hashes: bytes,
    parent: bytes | None = ROOT,
    worker: str = "w",
    tier: CacheTier = HBM,
    scope: IdentityScope = SCOPE,
    group: int = 0,
    rank: int | None = None,
    tokens: int = 16,
    at_ms: int = 1000,
    size: int = 0,
    consecutive: bool = True,
    tenant_from_parent: bool = False,
    count_copies: bool = True,
    spec: GroupSpec | None = None,
    start_index: int | None = None,
) -> StoreRun:
    return StoreRun(
        worker,
        rank,
        scope,
        tier,
        hashes,
        parent,
        group,
        tokens,
        at_ms,
        size,
        consecutive,
        tenant_from_parent,
        count_copies,
        spec,
        start_index,
    )


def remove(*hashes: bytes, worker: str = "w", tier: CacheTier | None = None, group: int | None = None) -> RemoveBlocks:
    return RemoveBlocks(worker, hashes, tier, group)


def clear(worker: str = "w", tier: CacheTier | None = None) -> ClearBlocks:
    return ClearBlocks(worker, tier)


def key(
    block_hash: bytes,
    scope: IdentityScope = SCOPE,
    parent: bytes | None = ROOT,
    index: int | None = 0,
    tokens: int = 16,
    group: int = 0,
) -> KvBlockKey:
    return KvBlockKey.within(scope, block_hash, prefix_hash=parent, block_index=index, token_count=tokens, group=group)


def residency(block_key: KvBlockKey, worker: str = "w", tier: CacheTier = HBM, **rest: Any) -> CacheResidency:
    return CacheResidency(block_key, worker, tier, **rest)
