"""Dynamo's messages as far as they say whose they are: subject, envelope, and the address of each event.

    JSON        {"worker_id": …, "event": {…}}                    JetStream; NATS core before 0.9
    envelope    msgpack {publisher_id, sequence, published_at, topic, payload}
                its payload: msgpack, one event as a map          0.9 to 1.3
                             msgpack, an array of events          since 1.4

An array in JSON and msgpack events without an envelope are taken as well. Source: docs/reference/dynamo.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Meta, Raw, Struct

from .packed import is_array, is_map
from .translation import Rejection, RejectReason
from .wire import EVENTS_MAX, UNDECODABLE, Rank, explained

WORKER = "worker"
CACHE_OWNER = "cache_owner"

DEFAULT_SUBJECTS = tuple(
    f"namespace.*.component.*.{topic}"
    for topic in (
        "kv_events",
        "kv-events",
        "kv-state-events-v2",
        "endpoint.*.kv-events",
        "endpoint.*.kv-state-events-v2",
    )
)
"""The NATS core subjects of every release. A JetStream message is on `{stream}.queue` or `{stream}.kv-events`."""

_WORD_MIN = -(2**63)
_WORD_MAX = 2**64 - 1
_FRAMES = 4
_WORD_BYTES = 8
_FRAME_VERSION = 1
FRAME_HEADER_BYTES = 5

Word = Annotated[int, Meta(ge=0)]
"""An unsigned integer; of msgpack, of 64 bits."""


class DynamoAddress(NamedTuple):
    """Whose an event is: a worker's, or that of a cache owner that the worker speaks for."""

    worker: int
    rank: int
    domain: str = WORKER

    @property
    def name(self) -> str:
        """The worker's NAME: its id in decimal, and the domain unless it is the worker's own."""
        return str(self.worker) if self.domain == WORKER else f"{self.worker}@{self.domain}"


class Origin(NamedTuple):
    """Where in Dynamo's deployment a message comes from. `endpoint` is None where the subject has none."""

    namespace: str
    component: str
    endpoint: str | None = None


class Opened(Struct):
    """A message, opened. `publisher_id` and `sequence` are its envelope's, None for a message without one.

    `inner` is what the envelope wraps, untouched, or the message itself. `published_ms` is in ms since the Unix epoch,
    0 when unknown. `event_ids` has the lowest and the highest number for each of `addresses`: without an envelope there
    is no other numbering. `first` is the number that a life begins with: 0, and without an envelope 1 since 1.1.
    `rejections` are of the events that do not say whose they are; those of the others are up to their translators.
    """

    publisher_id: int | None
    sequence: int | None
    published_ms: int
    topic: str
    inner: bytes
    addresses: list[DynamoAddress]
    event_ids: list[tuple[int, int]]
    first: int = 0
    rejections: list[Rejection] = []

    @property
    def lineage(self) -> str:
        """Who numbers, "" for a message without an envelope.

        Up to 1.2 the publishers of a process share the worker's id and each numbers on its own; each has one rank.
        """
        if self.publisher_id is None:
            return ""
        if len(self.addresses) == 1 and self.addresses[0].worker == self.publisher_id:
            return f"{self.publisher_id}/{self.addresses[0].rank}"
        return str(self.publisher_id)


class Envelope(Struct):
    """What the event plane wraps around a payload."""

    publisher_id: Word
    sequence: Word
    published_at: Word
    topic: str
    payload: bytes


class _Numbered(Struct):
    event_id: Word
    dp_rank: Rank = 0


class Addressed(Struct):
    """An event as far as it says whose it is.

    `residency_domain` is looked at only for "cache_owner": a bad one is its worker's to refuse.
    """

    worker_id: int
    event: _Numbered
    residency_domain: Any = WORKER
    storage_tier: Any = msgspec.UNSET

    @property
    def address(self) -> DynamoAddress:
        """Whose it is."""
        domain = CACHE_OWNER if self.residency_domain == CACHE_OWNER else WORKER
        return DynamoAddress(self.worker_id, self.event.dp_rank, domain)


EventT = TypeVar("EventT")


class EventDecoder(Generic[EventT]):
    """Reads the events of a message without its envelope, in either encoding, as one type."""

    def __init__(self, event_type: type[EventT]) -> None:
        array = Annotated[list[event_type], Meta(max_length=EVENTS_MAX)]  # type: ignore[valid-type]
        self._json_array = msgspec.json.Decoder(array).decode
        self._json_event = msgspec.json.Decoder(event_type).decode
        self._array = msgspec.msgpack.Decoder(array).decode
        self._event = msgspec.msgpack.Decoder(event_type).decode

    def all(self, inner: bytes) -> list[EventT]:
        """Every event. Raises one of UNDECODABLE if one cannot be read, or what there is are no events."""
        if is_json(inner):
            return self._json_array(inner) if inner[0] == _BRACKET else [self._json_event(inner)]
        return self._array(inner) if is_array(inner) else [self._event(inner)]

    def one(self, packed: bytes | Raw, in_json: bool) -> EventT:
        """One event that `packed_events` gave. Raises one of UNDECODABLE."""
        return self._json_event(packed) if in_json else self._event(packed)


_BRACKET = ord("[")
_BRACE = ord("{")
_addressed = EventDecoder(Addressed)
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_items = msgspec.msgpack.Decoder(Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]).decode
_decode_json_items = msgspec.json.Decoder(Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]).decode


def open_dynamo(payload: bytes) -> Opened | Rejection:
    """Open a message of Dynamo's event plane. Never raises.

    An envelope is opened even if nothing in it can be read. One of another topic than KV events, as a broker of the
    event plane forwards them too, is nobody's.
    """
    envelope = envelope_of(payload)
    inner = payload if envelope is None else envelope.payload
    is_other = envelope is not None and _KV_TOPIC.match(envelope.topic) is None
    events, rejections = ([], []) if is_other else addressed_events(inner)
    if envelope is None:
        if not events and len(rejections) == 1:
            return rejections[0]
        opened = Opened(None, None, 0, "", inner, [], [], 1)
    else:
        publisher, sequence = envelope.publisher_id, envelope.sequence
        opened = Opened(publisher, sequence, envelope.published_at, envelope.topic, inner, [], [])
    opened.rejections = rejections
    places: dict[DynamoAddress, int] = {}
    for event in events:
        number = event.event.event_id
        address = event.address
        place = places.setdefault(address, len(places))
        if place == len(opened.addresses):
            opened.addresses.append(address)
            opened.event_ids.append((number, number))
        else:
            low, high = opened.event_ids[place]
            opened.event_ids[place] = (min(low, number), max(high, number))
        if event.storage_tier is msgspec.UNSET:
            opened.first = 0
    return opened


def open_dynamo_frames(frames: list[bytes]) -> Opened | Rejection:
    """Open a message of Dynamo's ZMQ event plane: `[topic, publisher, sequence, 1 + length + envelope]`.

    Publisher and sequence are unsigned integers of 64 bits, the length of 32, all big-endian. Never raises.
    """
    if len(frames) != _FRAMES:
        return _refused(f"a message of {len(frames)} frames; Dynamo's have {_FRAMES}", "frames", b"".join(frames))
    _, publisher, sequence, framed = frames
    if len(publisher) != _WORD_BYTES or len(sequence) != _WORD_BYTES:
        return _refused("a publisher or sequence number that is not of 8 bytes", "frames[1]", b"".join(frames))
    if not framed or framed[0] != _FRAME_VERSION:
        return _refused(f"a frame that does not begin with its version, {_FRAME_VERSION}", "frames[3]", framed)
    if int.from_bytes(framed[1:FRAME_HEADER_BYTES], "big") != len(framed) - FRAME_HEADER_BYTES:
        return _refused(f"a frame of {len(framed)} bytes that says another length of itself", "frames[3]", framed)
    opened = open_dynamo(framed[FRAME_HEADER_BYTES:])
    if isinstance(opened, Rejection):
        return opened
    numbers = (int.from_bytes(publisher, "big"), int.from_bytes(sequence, "big"))
    if (opened.publisher_id, opened.sequence) != numbers:
        return _refused("the frames and the envelope name different publishers or numbers", "frames[1]", framed)
    return opened


def parse_subject(subject: str) -> Origin | None:
    """The origin that a NATS subject of any release names, None for another subject.

    Of a JetStream subject it is the slugs that Dynamo made of the names: lower case, and hyphens for most else.
    """
    found = _SUBJECT.fullmatch(subject) or _STREAM_SUBJECT.fullmatch(subject)
    if found is None:
        return None
    parts = found.groupdict()
    endpoint = parts.get("endpoint")
    return Origin(unquote(parts["namespace"]), unquote(parts["component"]), unquote(endpoint) if endpoint else None)


_KV_TOPIC = re.compile("kv.*event")
_SUBJECT = re.compile(
    r"namespace\.(?P<namespace>.+?)\.component\.(?P<component>.+?)(?:\.endpoint\.(?P<endpoint>.+))?"
    r"\.(?:kv_events|kv-events|kv-state-events-v2)"
)
_STREAM_SUBJECT = re.compile(
    r"namespace-(?P<namespace>[^.]+?)-component-(?P<component>[^.]+)-kv-events\.(?:queue|kv-events)"
)


def is_json(inner: bytes) -> bool:
    """Whether events are in JSON: neither a msgpack map nor an array begins with a brace or a bracket."""
    return inner[:1] in (b"{", b"[")


def envelope_of(payload: bytes) -> Envelope | None:
    """The envelope of a message, None for one without."""
    if not payload or not is_map(payload):
        return None
    try:
        envelope: Envelope = _decode_envelope(payload)
    except UNDECODABLE:
        return None
    return envelope


def addressed_events(inner: bytes) -> tuple[list[Addressed], list[Rejection]]:
    """The events of a message without its envelope, and what is refused of them. Never raises."""
    try:
        events = _addressed.all(inner)
    except (IndexError, *UNDECODABLE):
        pass
    else:
        if all(_is_word(event.worker_id) for event in events):
            return events, []
    items = packed_events(inner)
    if isinstance(items, Rejection):
        return [], [items]
    in_json = is_json(inner)
    events = []
    rejections = []
    for position, item in enumerate(items):
        event = addressed_event(item, in_json)
        if isinstance(event, Addressed):
            events.append(event)
            continue
        detail, path = event
        refusal = f"an event that does not say whose it is: {detail}"
        rejections.append(
            Rejection(RejectReason.EVENT_SHAPE, refusal, f"events[{position}]{path}", position, bytes(item))
        )
    return events, rejections


def packed_events(inner: bytes) -> list[Raw] | Rejection:
    """The events of a message without its envelope, each still packed, or why there are none. Never raises."""
    in_json = is_json(inner)
    try:
        if in_json:
            items = _decode_json_items(inner) if inner[0] == _BRACKET else [Raw(inner)]
        else:
            items = _decode_items(inner) if is_array(inner) else [Raw(inner)]
        maps = [bytes(item)[0] == _BRACE if in_json else is_map(item) for item in items]
    except IndexError:
        return _refused("it is empty", "", inner)
    except UNDECODABLE as error:
        detail, path = explained(error)
        return _refused(detail, path, inner)
    return items if any(maps) or not maps else _refused("nothing in it is a map", "", inner)


def addressed_event(item: Raw, in_json: bool) -> Addressed | tuple[str, str]:
    """One packed event as far as it says whose it is, or what is wrong with it and the path of that. Never raises."""
    try:
        event = _addressed.one(item, in_json)
    except UNDECODABLE as error:
        return explained(error)
    return event if _is_word(event.worker_id) else ("the worker's id does not fit in 64 bits", ".worker_id")


def _is_word(number: int) -> bool:
    """Whether it fits in 64 bits, with or without a sign: the first releases had signed ids."""
    return _WORD_MIN <= number <= _WORD_MAX


def _refused(detail: str, field: str, raw: bytes) -> Rejection:
    return Rejection(RejectReason.PAYLOAD, f"the payload is no message of Dynamo's: {detail}", field, raw=raw)
