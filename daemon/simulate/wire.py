"""How each release of an engine writes its events down. Field tables: docs/reference/vllm.md, sglang.md.

    batch   [time, events, data-parallel rank]      event   ["BlockStored", …] or {"type": "BlockStored", …}

An array has all fields of its release; a map leaves out those that are None. Hashes are integers (signed in SGLang and
in vLLM before 0.10.2) or raw bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvcensus.backends.model import CacheTier

from ..engine_sockets import ReplayFraming
from .cache import Event, Offloaded, Removed, Stored

BLOCK_SIZE = 16
"""Tokens of a block."""

WINDOW_GROUP = 1
_VOCABULARY = 50_000
_INTEGER_BYTES = 8
_encode = msgspec.msgpack.Encoder().encode

_OLDEST = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
_VLLM = (
    *_OLDEST,
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
_SGLANG = (*_OLDEST, "medium", "cache_salt", "session_id", "lora_name")
_NULLABLE = {"parent_block_hash", "lora_id", "medium", "lora_name"}
"""Keys that vLLM's maps have even when they are null."""


class WireFormat(msgspec.Struct, frozen=True):
    """What a release sends. `stored` has the fields of BlockStored, those of BlockRemoved follow from it.

    `nullable` are the keys of a map that are there even when they are null.
    """

    name: str
    stored: tuple[str, ...]
    maps: bool = False
    has_rank: bool = True
    signed: bool = False
    framing: ReplayFraming = ReplayFraming.OLD
    sglang: bool = False
    long_offloaded: bool = False
    """Connectors send 32 raw bytes where the device's events have an integer."""

    @property
    def has_tiers(self) -> bool:
        """Whether an event says where its blocks are."""
        return "medium" in self.stored

    @property
    def has_groups(self) -> bool:
        """Whether an event says of which group its blocks are."""
        return "group_idx" in self.stored

    @property
    def has_salt(self) -> bool:
        """Whether a tenant shows."""
        return "extra_keys" in self.stored or "cache_salt" in self.stored

    @property
    def has_adapters(self) -> bool:
        """Whether an adapter shows. SGLang's `lora_id` is always null."""
        return not self.sglang or "lora_name" in self.stored


_NEW = ReplayFraming.NEW
FORMATS = {
    one.name: one
    for one in (
        WireFormat("vllm-0.9.0", _VLLM[:5], has_rank=False, signed=True),
        WireFormat("vllm-0.9", _VLLM[:5], signed=True),
        WireFormat("vllm-0.10", _VLLM[:6]),
        WireFormat("vllm-0.12", _VLLM[:6], long_offloaded=True),
        WireFormat("vllm-0.14", _VLLM[:7], long_offloaded=True),
        WireFormat("vllm-0.17", _VLLM[:8], long_offloaded=True),
        WireFormat("vllm-0.20", _VLLM[:9], long_offloaded=True),
        WireFormat("vllm-0.22", _VLLM, long_offloaded=True),
        WireFormat("vllm-0.24", _VLLM, maps=True),
        WireFormat("vllm-0.32", _VLLM, maps=True, framing=_NEW),
        WireFormat("sglang-0.5.9", _SGLANG[:6], signed=True, sglang=True),
        WireFormat("sglang-0.5.20", _SGLANG[:8], maps=True, signed=True, sglang=True),
        WireFormat("sglang-0.5.23", _SGLANG, maps=True, signed=True, framing=_NEW, sglang=True),
    )
}
"""By the first release that writes so. `vllm-0.9` is 0.9.1; `vllm-0.10` and `vllm-0.12` differ in their connectors."""


class Wire:
    """Encodes batches of one stream. `hash_bytes` 0: integers, else raw bytes of that length."""

    def __init__(self, form: WireFormat, rank: int, hash_bytes: int) -> None:
        self._form = form
        self._rank = rank
        self._hash_bytes = hash_bytes

    def batch(self, seconds: float, events: Iterable[Event]) -> bytes:
        """The payload of these events."""
        written = [self._event(event) for event in events]
        return _encode([seconds, written, self._rank] if self._form.has_rank else [seconds, written])

    def _event(self, event: Event) -> object:
        form = self._form
        if isinstance(event, Stored):
            return self._written("BlockStored", form.stored, self._stored(event))
        if isinstance(event, Offloaded):
            return self._written("BlockStored", form.stored, self._offloaded(event))
        if isinstance(event, Removed):
            fields = tuple(name for name in form.stored if name in ("block_hashes", "medium", "group_idx"))
            return self._written("BlockRemoved", fields, self._removed(event))
        return self._written("AllBlocksCleared", (), {})

    def _written(self, kind: str, fields: Sequence[str], values: dict[str, object]) -> object:
        if not self._form.maps:
            return [kind, *(values.get(name) for name in fields)]
        named = {name: values.get(name) for name in fields}
        kept = {name: value for name, value in named.items() if value is not None or self._is_nullable(name)}
        return {"type": kind, **kept}

    def _is_nullable(self, name: str) -> bool:
        return name in ("parent_block_hash", "lora_id") or (not self._form.sglang and name in _NULLABLE)

    def _stored(self, event: Stored) -> dict[str, object]:
        form, identity = self._form, event.identity
        adapter = identity.adapter or None
        name = f"adapter-{adapter}" if adapter else None
        window = event.group == WINDOW_GROUP
        return {
            "block_hashes": self._hashes(event.hashes),
            "parent_block_hash": None if event.parent is None else self._hash(event.parent),
            "token_ids": _tokens(event.contents),
            "block_size": BLOCK_SIZE,
            "lora_id": None if form.sglang else adapter,
            "medium": "GPU",
            "lora_name": name,
            "cache_salt": identity.salt or None,
            "extra_keys": _extra_keys(event, name),
            "group_idx": event.group,
            "kv_cache_spec_kind": "sliding_window" if window else "full_attention",
            "kv_cache_spec_sliding_window": BLOCK_SIZE * max(1, len(event.hashes)) if window else None,
        }

    def _offloaded(self, event: Offloaded) -> dict[str, object]:
        """A placeholder: no tokens, no parent."""
        return {
            "block_hashes": self._offloaded_hashes(event.hashes),
            "parent_block_hash": None,
            "token_ids": [],
            "block_size": 0 if self._form.has_groups else BLOCK_SIZE,
            "medium": self._cpu,
            "group_idx": 0 if self._form.maps else None,
        }

    def _removed(self, event: Removed) -> dict[str, object]:
        if event.tier is CacheTier.HBM:
            return {"block_hashes": self._hashes(event.hashes), "medium": "GPU", "group_idx": event.group}
        return {
            "block_hashes": self._offloaded_hashes(event.hashes),
            "medium": self._cpu,
            "group_idx": 0 if self._form.maps else None,
        }

    @property
    def _cpu(self) -> str:
        return "CPU_PINNED" if self._form.sglang else "CPU"

    def _hashes(self, hashes: Iterable[bytes]) -> list[int | bytes]:
        return [self._hash(one) for one in hashes]

    def _hash(self, block: bytes) -> int | bytes:
        return block if self._hash_bytes else int.from_bytes(block, "big", signed=self._form.signed)

    def _offloaded_hashes(self, hashes: Iterable[bytes]) -> list[int | bytes]:
        if self._hash_bytes or not self._form.long_offloaded:
            return self._hashes(hashes)
        return [one.rjust(32, b"\x5a") for one in hashes]


def index_bytes(hash_bytes: int) -> int:
    """The length of a hash in the index."""
    return hash_bytes or _INTEGER_BYTES


def _tokens(contents: Iterable[int]) -> list[int]:
    return [(content + at) % _VOCABULARY for content in contents for at in range(BLOCK_SIZE)]


def _extra_keys(event: Stored, adapter: str | None) -> list[list[str] | None] | None:
    """The adapter for each block, the salt for the first of a request."""
    if not event.hashes:
        return None
    salt = event.identity.salt if event.parent is None else ""
    first = [key for key in (adapter, salt) if key]
    others = [adapter] if adapter else None
    return [first or None, *[others] * (len(event.hashes) - 1)]
