"""From "who holds which of these blocks" to "how long a prefix each worker can serve".

A hit in a worker needs, at a length of k blocks:
* in each full-attention group every block up to k;
* in each sliding-window group the last ceil((window - 1) / block_size) blocks before k, or all k of them when fewer;
* in each state group (Mamba) the last block before k.
This is vLLM's own `find_longest_cache_hit`, checked against the probes of the captured engines. Groups whose rule is
not on the wire (chunked local attention, cross attention) are left out.

Held blocks are bit masks: bit i says that the i-th hash asked for is held.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .model import CacheTier, GroupKind, GroupSpec, WorkerMatch


class Held(NamedTuple):
    """Which of the asked blocks one worker holds at one tier in one group."""

    worker_id: str
    rank: int | None
    tier: CacheTier
    group: int
    mask: int


def leading_ones(mask: int) -> int:
    """The number of consecutive set bits from bit 0."""
    return (~mask & (mask + 1)).bit_length() - 1


def patience(specs: Mapping[tuple[str, int], GroupSpec]) -> int:
    """After how many hashes in a row that nobody holds no prefix can grow any more. `specs` as in `worker_matches`.

    A full-attention chain ends within the largest block over the smallest. Without one, a prefix may begin anywhere.
    """
    full = {worker_id for (worker_id, _), spec in specs.items() if spec.kind is GroupKind.FULL}
    if any(worker_id not in full for worker_id, _ in specs):
        return sys.maxsize
    sizes = [spec.block_size for spec in specs.values() if spec.block_size]
    return max(sizes) // min(sizes) if sizes else 1


def worker_matches(held: Iterable[Held], specs: Mapping[tuple[str, int], GroupSpec]) -> list[WorkerMatch]:
    """The prefix of each worker that can serve any, sorted by the longest first, then by worker id.

    `specs` has what is known of each (worker, group), including groups that hold none of the asked blocks: their
    absence can rule a hit out.
    """
    workers: dict[str, dict[CacheTier, dict[int, int]]] = {}
    ranks: dict[str, int | None] = {}
    for worker_id, rank, tier, group, mask in held:
        ranks[worker_id] = rank
        workers.setdefault(worker_id, {}).setdefault(tier, {})[group] = mask
    group_specs: dict[str, dict[int, GroupSpec]] = {worker_id: {} for worker_id in workers}
    for (worker_id, group), spec in specs.items():
        if worker_id in workers:
            group_specs[worker_id][group] = spec
    matches = []
    for worker_id, tiers in workers.items():
        known = group_specs[worker_id]
        lengths = {tier: blocks for tier, masks in tiers.items() if (blocks := prefix_length(masks, known))}
        union: dict[int, int] = {}
        for masks in tiers.values():
            for group, mask in masks.items():
                union[group] = union.get(group, 0) | mask
        longest = max(lengths.values(), default=0)
        any_tier = longest if len(tiers) == 1 else prefix_length(union, known)
        if any_tier:
            matches.append(WorkerMatch(worker_id, ranks[worker_id], lengths, longest, any_tier))
    matches.sort(key=lambda match: (-match.blocks, -match.blocks_any_tier, match.worker_id))
    return matches


def prefix_length(masks: Mapping[int, int], specs: Mapping[int, GroupSpec]) -> int:
    """The longest prefix that all groups of a worker allow, in blocks. `masks` and `specs` are by group number."""
    if len(masks) == 1 and all(spec.kind is GroupKind.FULL for spec in specs.values()) and masks.keys() >= specs.keys():
        return leading_ones(next(iter(masks.values())))
    sizes = [spec.block_size for spec in specs.values() if spec.block_size]
    unit = min(sizes, default=0)
    length = -1
    align = 1
    windows: list[tuple[int, int, int]] = []
    for group in sorted(specs.keys() | masks.keys()):
        spec = specs.get(group, GroupSpec())
        step = spec.block_size // unit if unit and spec.block_size else 1
        align = math.lcm(align, step)
        mask = _every(masks.get(group, 0), step)
        if spec.kind is GroupKind.FULL:
            blocks = leading_ones(mask) * step
            length = blocks if length < 0 else min(length, blocks)
        elif spec.kind is GroupKind.WINDOW:
            size = spec.block_size or unit or 1
            windows.append((mask, step, -(-(spec.window - 1) // size) if spec.window else 1))
        elif spec.kind is GroupKind.STATE:
            windows.append((mask, step, 1))
    if length < 0:
        length = max((mask.bit_length() * step for mask, step, _ in windows), default=0)
    length -= length % align
    while length and not all(_window_holds(mask, length // step, need) for mask, step, need in windows):
        length -= align
    return length


def _every(mask: int, step: int) -> int:
    """The bits of `mask` at positions step-1, 2*step-1, …: a larger block carries the hash of its last small one."""
    if step == 1:
        return mask
    bits, place = 0, 0
    mask >>= step - 1
    while mask:
        bits |= (mask & 1) << place
        mask >>= step
        place += 1
    return bits


def _window_holds(mask: int, blocks: int, need: int) -> bool:
    window = min(need, blocks)
    wanted = (1 << window) - 1
    return (mask >> (blocks - window)) & wanted == wanted
