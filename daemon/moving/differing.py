"""What two indexes do not have in common, record by record, in the order of the block hashes.

The rank of a place and what is known of its group are compared once for the place, not with each of its records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kvcensus.backends.model import CacheResidency, CacheTier, Cursor, Holding

from ..http.bodies import ROOT_WORD
from .location import Content
from .ordering import PART_ROWS, Row, in_order

FIELDS = ("prefix_hash", "block_index", "token_count", "bytes", "last_access_ms", "ref_count", "pinned")
"""What is compared of a record; the rest is its identity."""

_WHEN = {"committed_ms", "since_ms"}
"""Of a cursor: when the daemon did something, which no two do at the same time."""

_Identity = tuple[bytes, int, str, CacheTier, str, str, str | None, str]
_encode = msgspec.msgpack.Encoder().encode
_decode_identity = msgspec.msgpack.Decoder(_Identity).decode
_decode_value = msgspec.msgpack.Decoder(tuple[bytes | None, int | None, int, int, int, int, bool]).decode


class Kind(StrEnum):
    """How something differs."""

    ONLY_A = "only_a"
    ONLY_B = "only_b"
    DIFFERS = "differs"


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One record, place or cursor that differs. `a` and `b` have what each says, as far as it differs."""

    difference: Kind
    what: str
    """`record`, `place` or `cursor`."""
    identity: dict[str, Any]
    a: dict[str, Any] = {}
    b: dict[str, Any] = {}


def differences(
    a: Content,
    b: Content,
    directory: Path,
    *,
    cursors: bool = False,
    ignored: Collection[str] = (),
    advance: Callable[[int], None] = lambda records: None,
    part_rows: int = PART_ROWS,
) -> Iterator[Difference]:
    """Every difference but in the fields `ignored`. `directory` is empty, and takes what does not fit into memory.

    `advance` is told of the records read of both.
    """
    yield from _places(a.holdings, b.holdings)
    sides = []
    for name, content in (("a", a), ("b", b)):
        (directory / name).mkdir()
        sides.append(in_order(_rows(content, advance), directory / name, part_rows))
    for key, left, right in _beside(*sides):
        if left is None or right is None:
            yield _one_sided("record", _identity(key), _fields(left), _fields(right))
        elif left != right:
            found = _differing("record", _identity(key), _fields(left), _fields(right), ignored)
            if found is not None:
                yield found
    if cursors:
        yield from _cursors(a.cursors, b.cursors)


def _rows(content: Content, advance: Callable[[int], None]) -> Iterator[Row]:
    for record in content.records():
        advance(1)
        yield _row(record)


def _row(record: CacheResidency) -> Row:
    """Key and value of a record. A key sorts by its hash: what is before that in it is the same for all of a length."""
    key = record.key
    identity = (
        key.block_hash,
        key.group,
        record.worker_id,
        record.tier,
        key.model_id,
        key.tokenizer_id,
        key.adapter_id,
        key.tenant_id,
    )
    value = (
        key.prefix_hash,
        key.block_index,
        key.token_count,
        record.bytes,
        record.last_access_ms,
        record.ref_count,
        record.pinned,
    )
    return _encode(identity), _encode(value)


def _identity(key: bytes) -> dict[str, Any]:
    block_hash, group, worker_id, tier, model_id, tokenizer_id, adapter_id, tenant_id = _decode_identity(key)
    return {
        "block_hash": block_hash.hex(),
        "group": group,
        "worker_id": worker_id,
        "tier": tier,
        "model_id": model_id,
        "tokenizer_id": tokenizer_id,
        "adapter_id": adapter_id,
        "tenant_id": tenant_id,
    }


def _fields(value: bytes | None) -> dict[str, Any]:
    if value is None:
        return {}
    parent, *rest = _decode_value(value)
    return dict(zip(FIELDS, (None if parent is None else parent.hex() or ROOT_WORD, *rest)))


def _beside(a: Iterator[Row], b: Iterator[Row]) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Each key with its value on either side, None for a side that does not have it."""
    left, right = next(a, None), next(b, None)
    while left or right:
        if right is None or (left is not None and left[0] < right[0]):
            assert left is not None
            yield left[0], left[1], None
            left = next(a, None)
        elif left is None or right[0] < left[0]:
            yield right[0], None, right[1]
            right = next(b, None)
        else:
            yield left[0], left[1], right[1]
            left, right = next(a, None), next(b, None)


def _one_sided(what: str, identity: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> Difference:
    return Difference(Kind.ONLY_A if a else Kind.ONLY_B, what, identity, a, b)


def _differing(
    what: str, identity: dict[str, Any], a: dict[str, Any], b: dict[str, Any], ignored: Collection[str]
) -> Difference | None:
    names = [name for name in a if a[name] != b[name] and name not in ignored]
    if not names:
        return None
    return Difference(
        Kind.DIFFERS, what, identity, {name: a[name] for name in names}, {name: b[name] for name in names}
    )


def _places(a: Iterable[Holding], b: Iterable[Holding]) -> Iterator[Difference]:
    """Places that differ, and empty ones that only one side has: of others the records tell."""
    left, right = ({(one.worker_id, one.tier, one.group): one for one in side} for side in (a, b))
    for at in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(at), right.get(at)
        identity = dict(zip(("worker_id", "tier", "group"), at))
        if ours is not None and theirs is not None:
            found = _differing("place", identity, _said(ours), _said(theirs), ())
            if found is not None:
                yield found
        elif not (ours or theirs).blocks:  # type: ignore[union-attr]  # one of them has the key
            yield _one_sided("place", identity, _said(ours), _said(theirs))


def _said(place: Holding | None) -> dict[str, Any]:
    return {} if place is None else {"rank": place.rank, "spec": msgspec.to_builtins(place.spec)}


def _cursors(a: dict[str, Cursor], b: dict[str, Cursor]) -> Iterator[Difference]:
    for stream in sorted(a.keys() | b.keys()):
        ours, theirs = (_told(side.get(stream)) for side in (a, b))
        identity = {"stream": stream}
        if ours and theirs:
            found = _differing("cursor", identity, ours, theirs, _WHEN)
            if found is not None:
                yield found
        else:
            yield _one_sided("cursor", identity, ours, theirs)


def _told(cursor: Cursor | None) -> dict[str, Any]:
    if cursor is None:
        return {}
    return {**msgspec.structs.asdict(cursor), "fingerprint": cursor.fingerprint.hex()}
