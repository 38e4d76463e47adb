"""Short ways to say what Dynamo sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvcensus.backends.model import UNKNOWN_SCOPE, CacheTier, IdentityScope, StoreRun

pack = msgspec.msgpack.encode
SCOPE = IdentityScope("m", "t", UNKNOWN_SCOPE, UNKNOWN_SCOPE)
PUBLISHED_MS = 1_795_432_406_286


def block(number: int) -> bytes:
    return number.to_bytes(8, "big")


def stored(*hashes: Any, parent: Any = None, **more: Any) -> dict[str, Any]:
    blocks = [{"block_hash": one, "tokens_hash": 2**64 - 1, "mm_extra_info": None} for one in hashes]
    return {"stored": {"parent_hash": parent, "blocks": blocks, **more}}


def removed(*hashes: Any) -> dict[str, Any]:
    return {"removed": {"block_hashes": list(hashes)}}


def event(data: Any, number: int = 1, worker: int = 7, rank: int = 0, **more: Any) -> dict[str, Any]:
    """A RouterEvent. `more` are further fields of it, such as `storage_tier`."""
    return {"worker_id": worker, **more, "event": {"event_id": number, "data": data, "dp_rank": rank}}


def envelope(inner: Any, publisher: int = 5, sequence: int = 0, topic: str = "kv-events") -> bytes:
    payload = inner if isinstance(inner, bytes) else pack(inner)
    fields = {"publisher_id": publisher, "sequence": sequence, "published_at": PUBLISHED_MS, "topic": topic}
    return pack({**fields, "payload": payload})


def in_json(inner: Any) -> bytes:
    return json.dumps(inner, separators=(",", ":")).encode()


ENCODINGS: dict[str, Callable[[Sequence[Any]], bytes]] = {
    "json": in_json,
    "msgpack": pack,
    "envelope": envelope,
    "json in an envelope": lambda events: envelope(in_json(events)),
}
"""Every way in which some events may come."""


def run(
    *hashes: int,
    parent: bytes | None = b"",
    worker: str = "7/0",
    rank: int = 0,
    tier: CacheTier = CacheTier.HBM,
    counts: bool = False,
    index: int | None = None,
    at_ms: int = 0,
) -> StoreRun:
    """What a store comes to."""
    blocks = tuple(map(block, hashes))
    return StoreRun(worker, rank, SCOPE, tier, blocks, parent, at_ms=at_ms, count_copies=counts, start_index=index)
