"""The long look at an index of any backend, through nothing but its own answers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb.pages import Finding
from kvcensus.backends.model import CacheResidency, CacheTier, IdentityScope

_PARENTS_KEPT = 1024
"""Parents whose children are kept in memory: the root, and those whose children come one after the other."""

_Place = tuple[str, CacheTier, int]
_Child = tuple[bytes, str, CacheTier, int]


def findings(backend: IndexBackend, advance: Callable[[int], None] = lambda records: None) -> Iterator[Finding]:
    """What does not fit: every record against look-ups and children, the sum of them against the figures.

    Nobody writes meanwhile. `advance` is told of records.
    """
    records = size = 0
    counted: Counter[_Place] = Counter()
    sizes: Counter[_Place] = Counter()
    children = _Children(backend)
    for record in backend.snapshot():
        advance(1)
        key = record.key
        place = (record.worker_id, record.tier, key.group)
        held = record.bytes * record.ref_count
        records, size = records + 1, size + held
        counted[place] += 1
        sizes[place] += held
        where = f"block {key.block_hash.hex()}"
        if record.ref_count < 1:
            yield Finding(where, f"has {record.ref_count} copies")
        if backend.locate(key).count(record) != 1:
            yield Finding(where, f"is not found as it is on {record.worker_id} at {record.tier}")
        if key.prefix_hash is not None and not children.has(key.prefix_hash, record):
            yield Finding(where, f"is not among the children of {key.prefix_hash.hex() or 'the root'}")
    for holding in backend.holdings():
        place = (holding.worker_id, holding.tier, holding.group)
        found, said = (counted.pop(place, 0), sizes.pop(place, 0)), (holding.blocks, holding.bytes)
        if found != said:
            yield Finding(_named(place), f"records and bytes are {found}, said to be {said}")
    for place in counted:
        yield Finding(_named(place), "is not among the holdings")
    metrics = backend.metrics()
    if len(backend) != records or metrics.resident_blocks != records:
        yield Finding("the number of records", f"is {records}, said to be {len(backend)}, {metrics.resident_blocks}")
    if metrics.resident_bytes != size:
        yield Finding("the bytes of all blocks", f"are {size}, said to be {metrics.resident_bytes}")


def _named(place: _Place) -> str:
    return "place {} {} {}".format(*place)


class _Children:
    """The children of the parents that were asked for last."""

    def __init__(self, backend: IndexBackend) -> None:
        self._backend = backend
        self._known: OrderedDict[tuple[IdentityScope, bytes], set[_Child]] = OrderedDict()

    def has(self, parent: bytes, record: CacheResidency) -> bool:
        at = (record.key.scope, parent)
        children = self._known.get(at)
        if children is None:
            children = self._known[at] = {_child(one) for one in self._backend.prefix_scan(*at)}
            if len(self._known) > _PARENTS_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(at)
        return _child(record) in children


def _child(record: CacheResidency) -> _Child:
    return record.key.block_hash, record.worker_id, record.tier, record.key.group
