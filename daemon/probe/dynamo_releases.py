"""Which releases of Dynamo may have written a message. Pure. As for the engines: suspects until a message says no.

What came when, as the captured releases show it: docs/reference/dynamo.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from kvcensus.translators.dynamo_envelope import envelope_of, is_json
from kvcensus.translators.wire import UNDECODABLE

from .releases import Releases, joined


class Form(NamedTuple):
    """How a message is written."""

    encoding: str
    """`json` or `msgpack`."""
    envelope: bool
    array: bool


class _Family(NamedTuple):
    """Releases by their minor numbers. A field that came within a minor release has it in both neighbours."""

    first: str
    last: str
    forms: frozenset[Form]
    rank: bool = True
    images: bool = True
    tier: bool = True
    position: bool = True
    domain: bool = False


_JSON = Form("json", False, False)
_ONE = Form("msgpack", True, False)
_MANY = Form("msgpack", True, True)
_BEFORE_0_9, _TO_1_3, _SINCE_1_4 = frozenset({_JSON}), frozenset({_JSON, _ONE}), frozenset({_MANY})

_FAMILIES = (
    _Family("0.1", "0.6", _BEFORE_0_9, rank=False, images=False, tier=False, position=False),
    _Family("0.6", "0.7", _BEFORE_0_9, images=False, tier=False, position=False),
    _Family("0.8", "0.8", _BEFORE_0_9, tier=False, position=False),
    _Family("0.9", "1.0", _TO_1_3, tier=False, position=False),
    _Family("1.1", "1.1", _TO_1_3, position=False),
    _Family("1.2", "1.3", _TO_1_3),
    _Family("1.4", "1.5", _SINCE_1_4),
    _Family("1.5", "", _SINCE_1_4, domain=True),
)


class DynamoCandidates:
    """The releases that may have written everything seen so far."""

    def __init__(self) -> None:
        self._left = list(_FAMILIES)
        self.forms: set[Form] = set()

    def see(self, payload: bytes) -> None:
        """One message without the frame of ZMQ. What is no message is passed over."""
        envelope = envelope_of(payload)
        inner = payload if envelope is None else envelope.payload
        in_json = is_json(inner)
        try:
            decoded = msgspec.json.decode(inner) if in_json else msgspec.msgpack.decode(inner)
        except (TypeError, *UNDECODABLE):
            return
        form = Form("json" if in_json else "msgpack", envelope is not None, isinstance(decoded, list))
        events = decoded if isinstance(decoded, list) else [decoded]
        events = [one for one in events if isinstance(one, dict) and isinstance(one.get("event"), dict)]
        if not events:
            return
        self.forms.add(form)
        self._left = [one for one in self._left if form in one.forms and all(_may_be(one, event) for event in events)]

    def ranges(self) -> list[Releases]:
        """What is left, by minor releases, in their order."""
        return joined((_FAMILIES.index(one), one.first, one.last) for one in self._left)


def _may_be(family: _Family, event: dict[str, Any]) -> bool:
    inner = event["event"]
    told = ("dp_rank" in inner, "storage_tier" in event, "residency_domain" in event)
    if told != (family.rank, family.tier, family.domain):
        return False
    data = inner.get("data")
    stored = data.get("stored") if isinstance(data, dict) else None
    if not isinstance(stored, dict):
        return True
    blocks = stored.get("blocks")
    block = blocks[0] if isinstance(blocks, list) and blocks and isinstance(blocks[0], dict) else None
    return ("start_position" in stored) is family.position and (
        block is None or ("mm_extra_info" in block) is family.images
    )
