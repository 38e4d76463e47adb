"""What the memory backend keeps of one worker at one tier in one group.

A block seen once shares the object of the run that stored it with the other blocks of that run, so a run of 64 new
blocks costs 64 dictionary entries and no object per block. A block touched again gets records of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import msgspec

from .model import CacheTier, GroupSpec, IdentityScope


class Record(NamedTuple):
    """One residency, less its block hash and its place."""

    scope: IdentityScope
    parent: bytes | None
    block_index: int | None
    token_count: int
    ref_count: int
    at_ms: int
    size: int
    pinned: bool


class Run(msgspec.Struct, frozen=True, gc=False):
    """What the blocks of one store have in common, as long as each was stored once."""

    scope: IdentityScope
    hashes: tuple[bytes, ...]
    parent: bytes | None
    base: int | None
    token_count: int
    at_ms: int
    size: int

    def record(self, block_hash: bytes) -> Record:
        """What the run says of one of its blocks."""
        place = self.hashes.index(block_hash)
        parent = self.hashes[place - 1] if place else self.parent
        index = None if self.base is None else self.base + place
        return Record(self.scope, parent, index, self.token_count, 1, self.at_ms, self.size, False)

    def index_after(self, block_hash: bytes) -> int | None:
        """The index of a child of one of the blocks."""
        if self.base is None:
            return None
        hashes = self.hashes
        return self.base + (len(hashes) if hashes[-1] == block_hash else hashes.index(block_hash) + 1)

    def next_of(self, block_hash: bytes) -> bytes | None:
        """The block that follows in the run."""
        place = self.hashes.index(block_hash) + 1
        return self.hashes[place] if place < len(self.hashes) else None


Known = Run | tuple[Record, ...]


class Place:
    """What one worker holds at one tier in one group."""

    __slots__ = ("blocks", "bytes", "children", "group", "rank", "records", "spec", "tier", "worker_id")

    def __init__(self, worker_id: str, rank: int | None, tier: CacheTier, group: int) -> None:
        self.worker_id = worker_id
        self.rank = rank
        self.tier = tier
        self.group = group
        self.spec = GroupSpec()
        self.blocks: dict[bytes, Known] = {}
        self.children: dict[bytes, bytes | set[bytes]] = {}
        self.records = 0
        self.bytes = 0

    def records_of(self, block_hash: bytes) -> tuple[Record, ...]:
        """The records of a block, one per scope."""
        known = self.blocks.get(block_hash)
        if known is None:
            return ()
        return (known.record(block_hash),) if isinstance(known, Run) else known

    def link(self, parent: bytes, child: bytes) -> None:
        """Make a child findable from its parent, which need not be here."""
        children = self.children.setdefault(parent, child)
        if children is child:
            return
        if isinstance(children, set):
            children.add(child)
        elif children != child:
            self.children[parent] = {children, child}

    def unlink(self, parent: bytes, child: bytes) -> None:
        """Undo `link`, if it was done."""
        children = self.children.get(parent)
        if children == child:
            del self.children[parent]
        elif isinstance(children, set):
            children.discard(child)
            if not children:
                del self.children[parent]

    def children_of(self, parent: bytes) -> list[bytes]:
        """Hashes among which the children of a block are. A block that shares its run has its next one as a child."""
        linked = self.children.get(parent)
        children: set[bytes | None] = set(linked) if isinstance(linked, set) else {linked}
        known = self.blocks.get(parent)
        if isinstance(known, Run):
            children.add(known.next_of(parent))
        return sorted(child for child in children if child is not None)

    def replace(self, block_hash: bytes, old: tuple[Record, ...], new: tuple[Record, ...]) -> None:
        """Write all records of a block; keeps the counts and the links to its parents and out of its run."""
        known = self.blocks.get(block_hash)
        if isinstance(known, Run):
            child = known.next_of(block_hash)
            if child is not None and child in self.blocks:
                self.link(block_hash, child)
        for record in old:
            if record.parent is not None and all(other.parent != record.parent for other in new):
                self.unlink(record.parent, block_hash)
        for record in new:
            if record.parent is not None:
                self.link(record.parent, block_hash)
        self.records += len(new) - len(old)
        self.bytes += sum(r.size * r.ref_count for r in new) - sum(r.size * r.ref_count for r in old)
        if new:
            self.blocks[block_hash] = new
        else:
            self.blocks.pop(block_hash, None)

    def store_run(self, run: Run) -> tuple[int, Sequence[int]]:
        """Store the new blocks of a run. Returns how many, and the positions of those that were here before."""
        hashes, blocks = run.hashes, self.blocks
        if len(hashes) == 1 and blocks.setdefault(hashes[0], run) is run:
            if run.parent is not None:
                self.link(run.parent, hashes[0])
            self.records += 1
            self.bytes += run.size
            return 1, ()
        known: list[int] = []
        before = len(blocks)
        found = list(map(blocks.setdefault, hashes, repeat(run)))
        new = len(blocks) - before
        if new < len(hashes):
            first: dict[bytes, int] = {}
            for at, block_hash in enumerate(hashes):
                if found[at] is not run or first.setdefault(block_hash, at) != at:
                    known.append(at)
                    if at + 1 < len(hashes):
                        self.link(block_hash, hashes[at + 1])
        if run.parent is not None and not (known and known[0] == 0):
            self.link(run.parent, hashes[0])
        self.records += new
        self.bytes += run.size * new
        return new, known
