"""What a backend that keeps records as bytes makes of them: numbered places and scopes, and one entry for each record.

A place is a (worker, tier, group). Its number is never used twice, so a place that was cleared is dead at once and what
stands under its number can be swept whenever there is time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from .matching import patience
from .model import TIER_NUMBER, CacheResidency, CacheTier, GroupSpec, IdentityScope, KvBlockKey, StoreRun


class PlaceRow(msgspec.Struct, frozen=True, array_like=True):
    """A (worker, tier, group) that holds blocks."""

    worker_id: str
    rank: int | None
    tier: CacheTier
    group: int
    spec: GroupSpec


class Entry(NamedTuple):
    """One residency of a block. `place` and `scope` are numbers; `block_index` is -1 when it is unknown."""

    place: int
    scope: int
    copies: int
    block_index: int
    tokens: int
    at_ms: int
    size: int
    pinned: bool
    parent: bytes | None


def residency(place: PlaceRow, scope: IdentityScope, block_hash: bytes, entry: Entry) -> CacheResidency:
    """An entry of a block as the model has it, with its place and scope instead of their numbers."""
    key = KvBlockKey.within(
        scope,
        block_hash,
        prefix_hash=entry.parent,
        block_index=None if entry.block_index < 0 else entry.block_index,
        token_count=entry.tokens,
        group=place.group,
    )
    return CacheResidency(
        key, place.worker_id, place.tier, entry.size, entry.at_ms, entry.copies, entry.pinned, place.rank
    )


def merged(same: Entry, entry: Entry, count_copies: bool) -> Entry:
    """The record `same` once it was stored again as `entry`."""
    return Entry(
        same.place,
        same.scope,
        same.copies + count_copies,
        same.block_index if entry.block_index < 0 else entry.block_index,
        entry.tokens or same.tokens,
        entry.at_ms or same.at_ms,
        entry.size or same.size,
        same.pinned,
        same.parent if entry.parent is None else entry.parent,
    )


def beside_sibling(run: StoreRun, place: int, scope: int, own: Entry | None) -> Entry:
    """A block of a run that is not consecutive, by the worker's `own` entry of it; without one it is of `scope`."""
    if own is None:
        return Entry(place, scope, 1, -1, run.token_count, run.at_ms, run.bytes_per_block, False, None)
    same_size = run.token_count in (0, own.tokens)
    return Entry(
        place,
        own.scope,
        1,
        own.block_index if same_size else -1,
        own.tokens if same_size else run.token_count,
        run.at_ms,
        run.bytes_per_block,
        False,
        own.parent if same_size else None,
    )


def told_index(run: StoreRun) -> int:
    """Where the publisher says that a run begins, -1 where it does not say."""
    return -1 if run.start_index is None else run.start_index


def place_order(run: StoreRun, place: PlaceRow) -> tuple[object, ...]:
    """Sorts the places of a worker by how much a record there says of a run: the first says most."""
    return place.group != run.group, place.tier is not run.tier, TIER_NUMBER[place.tier], place.group


def scope_order(scope: IdentityScope) -> tuple[object, ...]:
    """Sorts scopes; no adapter comes before the empty one."""
    return scope.model_id, scope.tokenizer_id, scope.adapter_id is not None, scope.adapter_id or "", scope.tenant_id


class LivePlaces(NamedTuple):
    """The live places by number, and what `matching` needs to know of them."""

    version: int
    rows: dict[int, PlaceRow]
    specs: dict[tuple[str, int], GroupSpec]
    patience: int


def live_places(version: int, rows: dict[int, PlaceRow]) -> LivePlaces:
    """The live places of one version of them."""
    specs = _specs(rows)
    return LivePlaces(version, rows, specs, patience(specs))


def _specs(rows: Mapping[int, PlaceRow]) -> dict[tuple[str, int], GroupSpec]:
    specs: dict[tuple[str, int], GroupSpec] = {}
    unknown = GroupSpec()
    for place in rows.values():
        at = (place.worker_id, place.group)
        if place.spec != unknown or at not in specs:
            specs[at] = place.spec
    return specs
