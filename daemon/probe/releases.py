"""Which releases of vLLM and SGLang may have written an event. Pure.

Nothing on the wire names them. Every family of releases is a suspect until an event comes that it could not have
written; what is left is never a guess, and often "either". What each family writes: docs/reference/vllm.md, sglang.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from kvcensus.translators.sglang import EMPTY_KEY_HASH

from ..config import SourceType

Releases = tuple[str, str]
"""The first and the last of a range; "" for the last: or later."""

_FIELDS = {
    "BlockStored": (
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
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
_METADATA = 7
"""Where SGLang 0.5.18 and 0.5.19 have a map with the salt, and vLLM has `lora_name`."""
_OLDEST = frozenset(("type", *_FIELDS["BlockStored"][:5]))
_VLLM_MAP = _OLDEST | {"medium", "lora_name"}
_VLLM_OPTIONAL = frozenset(_FIELDS["BlockStored"][7:])
_LATER_VLLM = (("locality",), ("ownership",), ("session_id",), ("lookahead_token_ids",))
_VLLM_KEYS = _VLLM_MAP | _VLLM_OPTIONAL | {key for keys in _LATER_VLLM for key in keys}
_SGLANG_KEYS = _OLDEST | {"medium", "cache_salt", "session_id", "lora_name"}

_DEVICE = "gpu"
_SIGNED = (-(2**63), 2**63 - 1)
_UNSIGNED = (0, 2**64 - 1)
_EITHER = (-(2**63), 2**64 - 1)
_DIGEST, _HALF_DIGEST = 32, 16


class Event(NamedTuple):
    """One event as far as it tells of its release. `length` is that of an array, type included; 0 for a map."""

    kind: str
    length: int
    fields: dict[str, Any]
    metadata: dict[str, Any] | None = None

    @property
    def hashes(self) -> list[Any]:
        """The block hashes; [] where there is no list of them."""
        found = self.fields.get("block_hashes")
        return found if isinstance(found, list) else []

    @property
    def is_on_device(self) -> bool:
        """Whether it is about the device's own cache, so that no connector wrote it."""
        medium = self.fields.get("medium")
        return "medium" not in self.fields or (isinstance(medium, str) and medium.casefold() == _DEVICE)


def event_of(packed: msgspec.Raw | bytes) -> Event | None:
    """One event of a batch, None for what is none. Never raises."""
    try:
        decoded = msgspec.msgpack.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError, TypeError):
        return None
    if isinstance(decoded, dict):
        kind = decoded.get("type")
        fields = {key: value for key, value in decoded.items() if isinstance(key, str)}
        return Event(kind, 0, fields) if isinstance(kind, str) and kind in _FIELDS else None
    if not isinstance(decoded, list) or not decoded or not isinstance(decoded[0], str) or decoded[0] not in _FIELDS:
        return None
    kind = decoded[0]
    fields = dict(zip(_FIELDS[kind], decoded[1:]))
    metadata = fields.pop("lora_name") if isinstance(fields.get("lora_name"), dict) else None
    return Event(kind, len(decoded), fields, metadata)


@dataclass(frozen=True)
class Family:
    """Releases that write alike. `stored` and `removed` are lengths of arrays, 0 for maps, which may have `keys`.

    `integers` is the range of integer hashes, `halves` whether 16 bytes are a hash. `content_hash`: the hash of a page
    is that of its tokens alone. `rootless`: a parent is never nil. `topic`: replies of the replay socket have it.
    """

    engine: SourceType
    first: str
    last: str
    stored: int
    removed: int
    integers: tuple[int, int]
    keys: frozenset[str] = frozenset()
    has_rank: bool = True
    topic: bool = False
    halves: bool = False
    one_stored: bool = False
    one_removed: bool = True
    content_hash: bool = False
    rootless: bool = False
    metadata: bool = False

    @property
    def is_vllm(self) -> bool:
        return self.engine is SourceType.VLLM

    def may_write(self, event: Event) -> bool:
        """Whether these releases could have written it."""
        if (event.length == 0) is not (self.stored == 0):
            return False
        if event.kind == "AllBlocksCleared":
            return True
        return self._has_form_of(event) and self._has_hashes_of(event) and self._has_page_of(event)

    def _has_form_of(self, event: Event) -> bool:
        is_stored = event.kind == "BlockStored"
        if event.length:
            wanted = self.stored if is_stored else self.removed
            if event.metadata is not None:
                return self.metadata and event.length == wanted + 1
            return event.length == wanted
        keys = event.fields.keys()
        unknown = keys - self.keys
        if unknown and (self.last or unknown & (_VLLM_KEYS | _SGLANG_KEYS)):
            return False
        if not is_stored:
            return {"type", "block_hashes"} | ({"medium"} if self.is_vllm else set()) <= keys
        return (_VLLM_MAP if self.is_vllm else _OLDEST) <= keys

    def _has_hashes_of(self, event: Event) -> bool:
        hashes = event.hashes
        if not self.is_vllm:
            most = 1 if (self.one_stored if event.kind == "BlockStored" else self.one_removed) else len(hashes)
            return len(hashes) <= most and all(isinstance(one, int) and _within(one, _SIGNED) for one in hashes)
        if not event.is_on_device:
            return True
        if event.kind == "BlockRemoved" and self.one_removed and len(hashes) > 1:
            return False
        return all(_within(one, self.integers) if isinstance(one, int) else self._is_digest(one) for one in hashes)

    def _is_digest(self, hashed: Any) -> bool:
        if not isinstance(hashed, bytes) or self.integers is not _UNSIGNED:
            return False
        return (len(hashed) % _DIGEST == 0 and bool(hashed)) or (self.halves and len(hashed) == _HALF_DIGEST)

    def _has_page_of(self, event: Event) -> bool:
        """What SGLang's pages tell: how they are hashed, their parents, and what only they or never they have."""
        if event.kind != "BlockStored":
            return True
        fields = event.fields
        parent, tokens = fields.get("parent_block_hash"), fields.get("token_ids")
        has_pairs = isinstance(tokens, list) and any(isinstance(token, list) for token in tokens)
        if self.is_vllm:
            return not has_pairs and parent != EMPTY_KEY_HASH
        if fields.get("lora_id") is not None or (self.rootless and parent is None):
            return False
        medium = fields.get("medium")
        if isinstance(medium, str) and medium not in ("GPU", "CPU_PINNED", "DISK", "EXTERNAL"):
            return False
        if parent == EMPTY_KEY_HASH and not self.rootless:
            return False
        return event.length == 0 or _is_hash_of_content(event) == self.content_hash


def _within(number: int, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= number <= bounds[1]


def _is_hash_of_content(event: Event) -> bool:
    """Whether the only hash is CPython's of the tuple of the tokens, as SGLang's was before 0.5.6."""
    tokens = event.fields.get("token_ids")
    if len(event.hashes) != 1 or not isinstance(tokens, list):
        return False
    try:
        return bool(hash(tuple(tuple(one) if isinstance(one, list) else one for one in tokens)) == event.hashes[0])
    except TypeError:
        return False


def _vllm(
    first: str, last: str, stored: int, removed: int, integers: tuple[int, int] = _UNSIGNED, **more: Any
) -> Family:
    return Family(SourceType.VLLM, first, last, stored, removed, integers, **more)


def _vllm_maps(first: str, last: str, later_keys: int, **more: Any) -> Family:
    keys = _VLLM_MAP | _VLLM_OPTIONAL | {key for keys in _LATER_VLLM[:later_keys] for key in keys}
    return _vllm(first, last, 0, 0, keys=keys, halves=True, **more)


def _sglang(first: str, last: str, stored: int, removed: int, **more: Any) -> Family:
    return Family(SourceType.SGLANG, first, last, stored, removed, _SIGNED, **more)


FAMILIES = (
    _vllm("0.9.0", "0.9.0.1", 6, 2, _SIGNED, has_rank=False),
    _vllm("0.9.1", "0.9.2", 6, 2, _SIGNED),
    _vllm("0.10.0", "0.10.1.1", 6, 2, _EITHER),
    _vllm("0.10.2", "0.12.0", 7, 3),
    _vllm("0.13.0", "0.13.0", 7, 3, halves=True),
    _vllm("0.14.0", "0.16.0", 8, 3, halves=True),
    _vllm("0.17.0", "0.19.1", 9, 3, halves=True),
    _vllm("0.20.0", "0.21.0", 10, 4, halves=True),
    _vllm("0.22.0", "0.23.0", 12, 4, halves=True),
    _vllm_maps("0.24.0", "0.25.1", 0),
    _vllm_maps("0.26.0", "0.28.0", 1, topic=True),
    _vllm_maps("0.29.0", "0.29.0", 2, topic=True),
    _vllm_maps("0.30.0", "0.32.0", 3, topic=True),
    _vllm_maps("0.33.0", "", 4, topic=True, one_removed=False),
    _sglang("0.4.6.post5", "0.4.6.post5", 6, 2, has_rank=False, one_stored=True, content_hash=True, rootless=True),
    _sglang("0.4.7", "0.4.10.post2", 6, 2, one_stored=True, content_hash=True, rootless=True),
    _sglang("0.5.1", "0.5.5.post3", 6, 2, one_stored=True, content_hash=True),
    _sglang("0.5.6", "0.5.8.post1", 6, 2, one_stored=True),
    _sglang("0.5.9", "0.5.14", 7, 3, one_stored=True),
    _sglang("0.5.15", "0.5.17", 7, 3, one_stored=True, one_removed=False),
    _sglang("0.5.18", "0.5.19", 7, 3, one_removed=False, metadata=True),
    _sglang("0.5.20", "0.5.21", 0, 0, one_removed=False, keys=_SGLANG_KEYS - {"lora_name"}),
    _sglang("0.5.22", "", 0, 0, one_removed=False, keys=_SGLANG_KEYS, topic=True),
)
"""In the order of the releases of each engine. Later releases than the last may write as it does."""


class Candidates:
    """The families that may have written everything seen so far."""

    def __init__(self) -> None:
        self.left: list[Family] = list(FAMILIES)
        self.seen = 0

    def see(self, event: Event, has_rank: bool) -> None:
        """One event, of a batch with or without a rank."""
        self.seen += 1
        self.left = [one for one in self.left if one.has_rank is has_rank and one.may_write(event)]


def of_framing(families: Iterable[Family], with_topic: bool) -> list[Family]:
    """Those whose replay socket answers so."""
    return [one for one in families if one.topic is with_topic]


def ranges(families: Iterable[Family]) -> dict[str, list[Releases]]:
    """By engine the releases, in their order."""
    kept = sorted((FAMILIES.index(one), one.first, one.last) for one in families)
    by_engine = {engine: [one for one in kept if FAMILIES[one[0]].engine is engine] for engine in SourceType}
    return {engine.value: joined(mine) for engine, mine in by_engine.items() if mine}


def joined(kept: Iterable[tuple[int, str, str]]) -> list[Releases]:
    """(place, first, last) in order as ranges, those of neighbouring places as one."""
    found: list[Releases] = []
    before = -2
    for place, first, last in kept:
        if place == before + 1:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
        before = place
    return found
