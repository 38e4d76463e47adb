"""Batches in every family of vLLM's wire, written as the releases write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
REMOVED = ("block_hashes", "medium", "group_idx")
ALWAYS_IN_MAPS = frozenset(STORED[:7]) | frozenset(REMOVED[:2])

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How some releases write: as maps or arrays, with so many fields."""

    releases: str
    maps: bool
    stored: int
    removed: int
    rank: bool = True

    def knows(self, event: Event) -> Event:
        """The event without the fields that these releases do not have."""
        return {"type": event["type"]} | {name: event.get(name) for name in self.fields(event["type"])}

    def fields(self, event_type: str) -> tuple[str, ...]:
        """The fields that an event of a type has, beside its type."""
        if event_type == "BlockStored":
            return STORED[: self.stored]
        return REMOVED[: self.removed] if event_type == "BlockRemoved" else ()

    def batch(self, events: Sequence[Event], ts: float = 1.5, rank: int | None = 0) -> bytes:
        """A payload."""
        items: list[Any] = [ts, [self.event(event) for event in events]]
        return msgspec.msgpack.encode([*items, rank] if self.rank else items)

    def event(self, event: Event) -> Any:
        """An event as msgpack would carry it."""
        known = self.knows(event)
        if not self.maps:
            return list(known.values())
        return {name: value for name, value in known.items() if value is not None or name in ALWAYS_IN_MAPS}


FAMILIES = (
    Family("0.9.0", False, 5, 1, rank=False),
    Family("0.9.1 to 0.10.1.1", False, 5, 1),
    Family("0.10.2 to 0.13.0", False, 6, 2),
    Family("0.14.0 to 0.16.0", False, 7, 2),
    Family("0.17.0 to 0.19.1", False, 8, 2),
    Family("0.20.0 and 0.21.0", False, 9, 3),
    Family("0.22.0 and 0.23.0", False, 11, 3),
    Family("since 0.24.0", True, 11, 3),
)
ARRAYS = FAMILIES[-2]
MAPS = FAMILIES[-1]


def stored(hashes: Sequence[Any] = (1,), **fields: Any) -> dict[str, Any]:
    """A BlockStored of full blocks of 4 tokens at the root."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": list(range(4 * len(hashes))),
        "block_size": 4,
        "medium": "GPU",
    }
    return event | fields


def removed(hashes: Sequence[Any] = (1,), **fields: Any) -> dict[str, Any]:
    """A BlockRemoved of the device."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"} | fields


CLEARED = {"type": "AllBlocksCleared"}
