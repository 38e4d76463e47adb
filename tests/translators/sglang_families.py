"""Batches in every family of SGLang's wire, written as the releases write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

ALWAYS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
STORED = (*ALWAYS, "medium", "cache_salt", "session_id", "lora_name")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How some releases write: as maps or arrays, with so many fields, the salt in a map of its own or not."""

    releases: str
    stored: int
    maps: bool = False
    metadata: bool = False
    rank: bool = True

    def knows(self, event: Event) -> dict[str, Any]:
        """The event without the fields that these releases do not have."""
        return {"type": event["type"]} | {name: event.get(name) for name in self.fields(event["type"])}

    def fields(self, event_type: str) -> tuple[str, ...]:
        """The fields that an event of a type has, beside its type."""
        if event_type == "BlockStored":
            return (*STORED[: self.stored], *(["cache_salt"] if self.metadata else []))
        known = ("block_hashes", "medium") if "medium" in STORED[: self.stored] else ("block_hashes",)
        return known if event_type == "BlockRemoved" else ()

    def batch(self, events: Sequence[Event], ts: float = 1.5, rank: int | None = 0) -> bytes:
        """A payload."""
        items: list[Any] = [ts, [self.event(event) for event in events]]
        return msgspec.msgpack.encode([*items, rank] if self.rank else items)

    def event(self, event: Event) -> Any:
        """An event as msgpack would carry it."""
        known = self.knows(event)
        if self.maps:
            return {name: value for name, value in known.items() if value is not None or name in ALWAYS}
        salt = known.pop("cache_salt", None)
        return [*known.values(), *([] if salt is None else [{"cache_salt": salt}])]


FAMILIES = (
    Family("0.4.6.post5", 5, rank=False),
    Family("0.4.7 to 0.5.8.post1", 5),
    Family("0.5.9 to 0.5.17", 6),
    Family("0.5.18 and 0.5.19", 6, metadata=True),
    Family("0.5.20 and 0.5.21", 8, maps=True),
    Family("since 0.5.22", 9, maps=True),
)
WITHOUT_MEDIUM = FAMILIES[1]
ARRAYS = FAMILIES[3]
MAPS = FAMILIES[-1]


def stored(hashes: Sequence[Any] = (-1,), **fields: Any) -> dict[str, Any]:
    """A BlockStored of pages of 4 tokens at the root."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": list(range(4 * len(hashes))),
        "block_size": 4,
        "medium": "GPU",
    }
    return event | fields


def removed(hashes: Sequence[Any] = (-1,), **fields: Any) -> dict[str, Any]:
    """A BlockRemoved of the device."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"} | fields


CLEARED = {"type": "AllBlocksCleared"}
