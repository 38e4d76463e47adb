"""The ZMQ payload of vLLM and SGLang, decoded: msgpack `[ts, events, data_parallel_rank]`.

    events as positional arrays   ["BlockStored", …]            vLLM 0.9.0 to 0.23.0     SGLang 0.4.6.post5 to 0.5.19
    events as maps                {"type": "BlockStored", …}    vLLM since 0.24.0        SGLang since 0.5.20

One typed pass decodes a payload of either family. One that it refuses is taken apart event by event: a bad event costs
only itself. Items past the end of a known array and unknown keys of a map are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw, Struct

from .packed import is_map
from .translation import Rejection, RejectReason

RANK_MAX = 65535
"""A rank is added to a port number."""

EVENTS_MAX = 1 << 17
"""A step of an engine has some thousands at most. An event may be a byte, and takes hundreds when it is refused."""

Small = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Rank = Annotated[int, Meta(ge=0, le=RANK_MAX)]
Hash = int | bytes

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError)
"""What decoding raises for bytes of a peer: malformed, of wrong types, not UTF-8, nested too deeply, or too large."""

_SHOWN_MAX = 64


class StoredEvent(Struct, gc=False):
    """Blocks were stored. The first fields of both engines, in the order of the positional form.

    `block_hashes` and `token_ids` stay packed: the first is cut up by `hashes`, of the second only the length matters.
    A field that is absent is None, or an empty Raw.
    """

    block_hashes: Raw
    parent_block_hash: Hash | None
    token_ids: Raw
    block_size: Small
    lora_id: int | None = None
    medium: str | None = None


class RemovedEvent(Struct, gc=False):
    """One copy of each of these blocks was dropped. The first fields of both engines."""

    block_hashes: Raw
    medium: str | None = None


class AllBlocksCleared(Struct, tag="AllBlocksCleared", tag_field="type"):
    """The cache was reset."""


class PositionalAllBlocksCleared(AllBlocksCleared, array_like=True, tag="AllBlocksCleared"):
    """AllBlocksCleared as an array."""


EventT = TypeVar("EventT")


class Batch(Struct, Generic[EventT], array_like=True, gc=False):
    """One payload. `ts` is the engine's clock in seconds since the epoch."""

    ts: float
    events: Annotated[Sequence[EventT], Meta(max_length=EVENTS_MAX)]
    rank: Rank | None = None


class _Envelope(Struct, array_like=True):
    ts: float
    events: Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]
    rank: Raw = Raw(b"\xc0")


class _Typed(Struct):
    type: str


class _PositionalTyped(Struct, array_like=True):
    type: str


_decode_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_decode_rank = msgspec.msgpack.Decoder(Rank | None).decode
_decode_map_type = msgspec.msgpack.Decoder(_Typed).decode
_decode_array_type = msgspec.msgpack.Decoder(_PositionalTyped).decode


class WireDecoder(Generic[EventT]):
    """Decodes the payloads of one stream. Remembers the family of the last one, only to try it first.

    `maps` and `arrays` are the unions of the tagged structs of an engine's events in either form.
    """

    def __init__(self, maps: Any, arrays: Any) -> None:
        self._batch_of_maps = msgspec.msgpack.Decoder(Batch[maps]).decode
        self._batch_of_arrays = msgspec.msgpack.Decoder(Batch[arrays]).decode
        self._map_event = msgspec.msgpack.Decoder(maps).decode
        self._array_event = msgspec.msgpack.Decoder(arrays).decode
        self._positions = {
            struct.__struct_config__.tag: ("type", *struct.__struct_fields__) for struct in get_args(arrays)
        }
        self._first, self._second = self._batch_of_maps, self._batch_of_arrays

    def decode(self, payload: bytes) -> Batch[EventT] | Batch[EventT | Rejection] | Rejection:
        """The batch of a payload, or why it is none. Never raises.

        An event that cannot be read is in the batch as its rejection.
        """
        try:
            return self._first(payload)
        except UNDECODABLE:
            pass
        try:
            batch: Batch[EventT] = self._second(payload)
        except UNDECODABLE:
            return self._take_apart(payload)
        self._first, self._second = self._second, self._first
        return batch

    def decode_all(self, payloads: Sequence[bytes]) -> list[Batch[EventT]] | None:
        """The batches of payloads, None unless every one can be read, and all in one family. Never raises."""
        for _ in range(2):
            try:
                return list(map(self._first, payloads))
            except UNDECODABLE:
                self._first, self._second = self._second, self._first
        return None

    def _take_apart(self, payload: bytes) -> Batch[EventT | Rejection] | Rejection:
        try:
            envelope = _decode_envelope(payload)
        except UNDECODABLE as error:
            detail, path = explained(error)
            field = _named(path, ("ts", "events", "data_parallel_rank"))
            return Rejection(RejectReason.PAYLOAD, f"the payload is no batch of events: {detail}", field, raw=payload)
        try:
            rank = _decode_rank(envelope.rank)
        except UNDECODABLE as error:
            detail, _ = explained(error)
            return Rejection(
                RejectReason.RANK, f"the payload has no valid rank: {detail}", "data_parallel_rank", raw=payload
            )
        return Batch(envelope.ts, [self._event(raw, at) for at, raw in enumerate(envelope.events)], rank)

    def _event(self, raw: Raw, position: int) -> EventT | Rejection:
        in_map = is_map(raw)
        try:
            event: EventT = self._map_event(raw) if in_map else self._array_event(raw)
            return event
        except UNDECODABLE as error:
            detail, path = explained(error)
        at = f"events[{position}]"
        event_type = _type_of(raw, in_map)
        if event_type is None:
            return Rejection(RejectReason.EVENT_SHAPE, f"an event without a type: {detail}", at, position, bytes(raw))
        names = self._positions.get(event_type)
        if names is None:
            unknown = f"an event of the unknown type {event_type[:_SHOWN_MAX]!r}"
            return Rejection(RejectReason.EVENT_TYPE, unknown, at, position, bytes(raw))
        field = _named(path, names)
        where = f"{at}.{field}" if field else at
        return Rejection(
            RejectReason.EVENT_SHAPE, f"a {event_type} that cannot be read: {detail}", where, position, bytes(raw)
        )


def raw_events(payload: bytes) -> list[Raw]:
    """The events of a payload that was decoded before, as they were sent."""
    return _decode_envelope(payload).events


def _type_of(raw: Raw, in_map: bool) -> str | None:
    try:
        return (_decode_map_type(raw) if in_map else _decode_array_type(raw)).type
    except UNDECODABLE:
        return None


_PATH = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")
_INDEX = re.compile(r"\[(\d+)\](.*)", re.DOTALL)


def explained(error: BaseException) -> tuple[str, str]:
    """What a decoding error says, and the path that it names, as in `.medium` or `[6]`; "" for none."""
    detail = str(error)
    missing = _MISSING.search(detail)
    if missing:
        return detail, f".{missing[1]}"
    found = _PATH.search(detail)
    return (detail[: found.start()], found[1]) if found else (detail, "")


def _named(path: str, names: tuple[str, ...]) -> str:
    """A path with the name of a field instead of its position in the array form."""
    index = _INDEX.fullmatch(path)
    if index is None:
        return path.removeprefix(".")
    at = int(index[1])
    return names[at] + index[2] if at < len(names) else path
