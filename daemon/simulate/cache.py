"""The block manager of a simulated engine: which blocks it holds, and the events by which it says so.

As vLLM does it: a pool of physical blocks; a block that no request uses stays cached until its place is needed, the
one left first goes first, and each physical copy is reported as it goes. Two requests that compute the same block at
once leave two copies under one hash. A window group keeps only the last blocks of each run. With a CPU tier, blocks
stored on the device are copied there now and then, least recently stored out first, one copy a hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from kvcensus.backends.model import CacheTier

from .chains import Identity

Key = tuple[bytes, int]
"""A block hash and its KV-cache group."""
Held = dict[CacheTier, dict[Key, int]]
"""How many copies of each block there are, by tier."""


class CacheOptions(msgspec.Struct, frozen=True):
    """Sizes in blocks. `cpu_blocks` 0: no CPU tier. `window_blocks`: a second group keeps so many of each run, 0: none.

    `copies` False: a block that is there already is not stored again, as in a radix tree. `clear_offloaded`: a reset
    empties the CPU tier as well.
    """

    blocks: int = 256
    cpu_blocks: int = 0
    window_blocks: int = 0
    copies: bool = True
    clear_offloaded: bool = True


class Stored(msgspec.Struct, frozen=True):
    """A run of blocks was stored. `contents` has those of the whole run, of which a window group keeps the last."""

    identity: Identity
    hashes: tuple[bytes, ...]
    parent: bytes | None
    contents: tuple[int, ...]
    group: int = 0


class Offloaded(msgspec.Struct, frozen=True):
    """Blocks were copied to the CPU. The connector says no more than their hashes."""

    hashes: tuple[bytes, ...]


class Removed(msgspec.Struct, frozen=True):
    """One copy of each of these blocks is gone."""

    hashes: tuple[bytes, ...]
    tier: CacheTier
    group: int = 0


class Cleared(msgspec.Struct, frozen=True):
    """The prefix cache was reset."""


Event = Stored | Offloaded | Removed | Cleared


class Allocation(msgspec.Struct):
    """The physical blocks that a request uses, in any group."""

    blocks: list[int] = []


class BlockCache:
    """Physical blocks, their hashes, and who uses them. `events` collects what there is to report."""

    def __init__(self, options: CacheOptions) -> None:
        self._options = options
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(options.blocks))
        self._uses: dict[int, int] = {}
        self._key_of: dict[int, Key] = {}
        self._copies: dict[Key, list[int]] = {}
        self._cpu: OrderedDict[bytes, None] = OrderedDict()
        self.events: list[Event] = []

    def held(self) -> Held:
        """The true state."""
        held: Held = {}
        if self._copies:
            held[CacheTier.HBM] = {key: len(blocks) for key, blocks in self._copies.items()}
        if self._cpu:
            held[CacheTier.CPU_DRAM] = {(one, 0): 1 for one in self._cpu}
        return held

    def use_prefix(self, allocation: Allocation, hashes: Sequence[bytes]) -> int:
        """Let a request use the longest cached prefix of `hashes`. Returns its length in blocks."""
        for length, one in enumerate(hashes):
            copies = self._copies.get((one, 0))
            if copies is None:
                return length
            self._use(allocation, copies[0])
        return len(hashes)

    def store(
        self, allocation: Allocation, identity: Identity, hashes: Sequence[bytes], contents: Sequence[int], done: int
    ) -> bool:
        """Compute the blocks of a request from `done` on. False when there is no room; then nothing is stored."""
        window = self._options.window_blocks
        if not self._options.copies:
            done += self.use_prefix(allocation, hashes[done:])
        run = hashes[done:]
        kept = run[-window:] if window else ()
        new = [(one, 0) for one in run] + [(one, 1) for one in kept]
        if len(new) > len(self._free):
            return False
        for key in new:
            self._place(allocation, key)
        parent = hashes[done - 1] if done else None
        for group in (0, 1) if window else (0,):
            stored = tuple(one for one, of_group in new if of_group == group)
            if stored or group:
                self.events.append(Stored(identity, stored, parent, tuple(contents[done:]), group))
        return True

    def release(self, allocation: Allocation) -> None:
        """A request is over. Its last blocks are the first to go."""
        for block in reversed(allocation.blocks):
            self._uses[block] -= 1
            if not self._uses[block]:
                del self._uses[block]
                self._free[block] = None
        allocation.blocks.clear()

    def offload(self, hashes: Iterable[bytes]) -> None:
        """Copy blocks to the CPU tier, making room there first."""
        new = [one for one in dict.fromkeys(hashes) if one not in self._cpu][: self._options.cpu_blocks]
        over = len(self._cpu) + len(new) - self._options.cpu_blocks
        gone = tuple(self._cpu.popitem(last=False)[0] for _ in range(max(0, over)))
        if gone:
            self.events.append(Removed(gone, CacheTier.CPU_DRAM))
        if new:
            self._cpu.update(dict.fromkeys(new))
            self.events.append(Offloaded(tuple(new)))

    def clear(self) -> None:
        """Reset the prefix cache. No request may be running."""
        assert not self._uses
        self._key_of.clear()
        self._copies.clear()
        if self._options.clear_offloaded:
            self._cpu.clear()
        self.events.append(Cleared())

    def _use(self, allocation: Allocation, block: int) -> None:
        self._free.pop(block, None)
        self._uses[block] = self._uses.get(block, 0) + 1
        allocation.blocks.append(block)

    def _place(self, allocation: Allocation, key: Key) -> None:
        block = next(iter(self._free))
        self._evict(block)
        self._use(allocation, block)
        self._key_of[block] = key
        self._copies.setdefault(key, []).append(block)

    def _evict(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is None:
            return
        copies = self._copies[key]
        copies.remove(block)
        if not copies:
            del self._copies[key]
        self.events.append(Removed((key[0],), CacheTier.HBM, key[1]))
