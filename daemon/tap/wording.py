"""Which of what is seen is wanted, and how a line of it reads. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime

import msgspec

from .decoding import EVENTS, Kind, Seen

_HASHES_SHOWN = 3
_HASH_SHOWN = 16
_STYLES = {
    Kind.STORE: "green",
    Kind.REMOVE: "yellow",
    Kind.CLEAR: "magenta",
    Kind.REJECTED: "red",
    Kind.GAP: "red",
    Kind.BACKWARDS: "red",
    Kind.FENCE: "red",
}


class Wanted(msgspec.Struct, frozen=True):
    """`hashes` is the beginning of a hash in hex. An empty value wants everything.

    `events`, `hashes` and `tier` choose among stores, removals and clears; what was refused or is missing is always
    wanted, since nobody knows what was in it. `worker` is NAME or NAME/RANK.
    """

    events: Collection[str] = ()
    hashes: str = ""
    worker: str = ""
    rank: int | None = None
    tier: str = ""

    def wants(self, seen: Seen) -> bool:
        if self.worker and self.worker not in (seen.worker, seen.name):
            return False
        if self.rank is not None and seen.rank != self.rank:
            return False
        if seen.kind not in EVENTS:
            return True
        if self.events and seen.kind not in self.events:
            return False
        if self.tier and seen.tier not in (None, self.tier):
            return False
        if not self.hashes:
            return True
        return any(one.startswith(self.hashes) for one in [*seen.block_hashes, seen.parent or ""])


def style_of(seen: Seen) -> str:
    """The colour of a line, "" for none."""
    return _STYLES.get(seen.kind, "")


def line_of(seen: Seen) -> str:
    """One line for a terminal, with nothing of a peer's in it that the terminal would obey."""
    at = datetime.fromtimestamp(seen.received_ms / 1000).strftime("%H:%M:%S.%f")[:-3]
    number = f" #{seen.seq}" if seen.seq is not None else ""
    text = f"{at} {seen.worker or '?'}{number} {seen.kind.value} {_contents(seen)}"
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text.rstrip())


def json_of(seen: Seen) -> str:
    """The same as JSON, whole."""
    return msgspec.json.encode(seen).decode()


def _contents(seen: Seen) -> str:
    if seen.kind is Kind.MESSAGE:
        shown = seen.payload_hex or json.dumps(seen.payload)
        return f"{seen.place} {shown}" if seen.place else shown
    if seen.kind is Kind.REJECTED:
        at = f" at {seen.field}" if seen.field else ""
        return f"for its {seen.reason}{at}: {seen.detail}"
    if seen.kind not in EVENTS:
        return seen.detail
    where = seen.tier or "every tier"
    group = f" group {seen.group}" if seen.group else ""
    if seen.kind is Kind.CLEAR:
        return where
    count = len(seen.block_hashes)
    hashes = " ".join(one[:_HASH_SHOWN] for one in seen.block_hashes[:_HASHES_SHOWN])
    hashes += " …" if count > _HASHES_SHOWN else ""
    blocks = f"{where}{group} {count} block{'s' * (count != 1)} {hashes}"
    if seen.kind is Kind.REMOVE:
        return blocks
    after = f" after {seen.parent[:_HASH_SHOWN]}" if seen.parent else ""
    scope = [f"{name} {value}" for name, value in _scope(seen) if value]
    return ", ".join([blocks + after, *scope])


def _scope(seen: Seen) -> list[tuple[str, str | None]]:
    return [("model", seen.model), ("adapter", seen.adapter), ("tenant", seen.tenant)]
