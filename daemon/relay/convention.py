"""What a relayed message looks like on the bus: its subject, its headers, and what they say. Pure.

The specification is docs/reference/relay.md. Subjects are PREFIX.MODEL.WORKER.RANK. Whoever else relays may leave
headers out: what they do not say, the subject does. The body is the engine's payload, untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from kvcensus.translators.translation import worker_id_of

from ..streams.delivery import Control, Delivery

EVENTS_PREFIX = "kvevents"
ALIVE_PREFIX = "kvalive"

SOURCE = "Kv-Source"
WORKER = "Kv-Worker"
RANK = "Kv-Rank"
EPOCH = "Kv-Epoch"
SEQ = "Kv-Seq"
CONTROL = "Kv-Control"
TOPIC = "Kv-Topic"
ENGINE = "Kv-Engine"
MODEL = "Kv-Model"
MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_STREAM = "Nats-Expected-Stream"

ENGINES = frozenset({"vllm", "sglang"})
"""Whose payloads a relay may carry."""

MAX_NAME = 200
"""Characters of a worker's or a model's name: as many as a configured worker has."""

_NO_RANK = "-"
_NO_MODEL = "_"
_HIGHEST = (1 << 63) - 1
_NUMBER = re.compile(r"-1|0|[1-9][0-9]{0,18}")
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")
_STRAY = re.compile(rb"%(?![0-9A-F]{2})")
_NOT_IN_TOKEN = re.compile(rb"[^A-Za-z0-9_-]")
_NOT_IN_VALUE = re.compile(rb"[^!-$&-~]")
"""Anything but printable ASCII; a space at an end would not arrive, and a line's end would be another header."""
_LINEAGE = re.compile(r"[!-~]{1,128}")


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Whose message it is. `worker` is its NAME, not empty; `model` is "" when nobody configured one."""

    worker: str
    rank: int | None
    model: str = ""
    engine: str = ""
    topic: str = ""


def subject_of(prefix: str, address: Address) -> str:
    """PREFIX.MODEL.WORKER.RANK of a worker's messages or signs of life."""
    model = _NO_MODEL if not address.model else "%5F" if address.model == _NO_MODEL else _token(address.model)
    rank = _NO_RANK if address.rank is None else str(address.rank)
    return f"{prefix}.{model}.{_token(address.worker)}.{rank}"


def every_subject(prefix: str) -> str:
    """The subject that takes all of a prefix, for a subscription or a stream."""
    return f"{prefix}.*.*.*"


def address_headers(lineage: str, address: Address) -> dict[str, str]:
    """The headers that are the same in every message of an address."""
    headers = {SOURCE: lineage, WORKER: _value(address.worker)}
    if address.rank is not None:
        headers[RANK] = str(address.rank)
    for name, text in ((ENGINE, address.engine), (MODEL, address.model), (TOPIC, address.topic)):
        if text:
            headers[name] = _value(text)
    return headers


def numbered(headers: Mapping[str, str], epoch: int, seq: int, control: Control) -> dict[str, str]:
    """The headers of one message, from those of its address."""
    message = {**headers, EPOCH: str(epoch), SEQ: str(seq)}
    if control:
        message[CONTROL] = control
    return message


def message_id(lineage: str, address: Address, epoch: int, seq: int, control: Control) -> str:
    """What the server knows a message by when it comes again."""
    suffix = f".{control}" if control else ""
    return f"{lineage}.{_value(worker_id_of(address.worker, address.rank))}.{epoch}.{seq}{suffix}"


def delivery_of(subject: str, headers: Mapping[str, str] | None, payload: bytes) -> Delivery | str:
    """One message of a relay, ours or another's; or why it is refused, which names the header or the subject.

    Without `Kv-Source` nobody says who numbers, and `lineage` is ""; without `Kv-Seq` there is no number either.
    `engine` and `model` are "" when the message does not name them.
    """
    try:
        return _read(subject, headers or {}, payload)
    except ValueError as error:
        return str(error)


def _read(subject: str, headers: Mapping[str, str], payload: bytes) -> Delivery:
    control = _control(headers.get(CONTROL, ""))
    seq = _number(headers, SEQ, -1)
    if SEQ in headers and seq < 0 and not control:
        raise ValueError(f"{SEQ} is -1 in a message with a payload")
    if control and payload:
        raise ValueError(f"{CONTROL} is {control} in a message with a body of {len(payload)} bytes")
    if control and SOURCE not in headers:
        raise ValueError(f"{CONTROL} is {control} without {SOURCE}")
    if control is Control.FENCE and SEQ not in headers:
        raise ValueError(f"{CONTROL} is {control} without {SEQ}")
    epoch = _number(headers, EPOCH, 0)
    if epoch < 0:
        raise ValueError(f"{EPOCH} is negative")
    model, worker, rank = _address(subject, headers)
    engine = headers.get(ENGINE, "")
    if engine and engine not in ENGINES:
        raise ValueError(f"{ENGINE} is {engine!r}, which is none of {', '.join(sorted(ENGINES))}")
    return Delivery(
        worker=worker,
        rank=rank,
        lineage=_lineage(headers) if seq >= 0 or control else "",
        epoch=epoch,
        seq=seq,
        payload=payload,
        control=control,
        engine=engine,
        model=model,
    )


def _address(subject: str, headers: Mapping[str, str]) -> tuple[str, str, int | None]:
    """Model, worker and rank. With a worker in the headers the subject does not count: a server may have mapped it."""
    model, worker, rank = ("", "", None) if WORKER in headers else _address_of(subject)
    if WORKER in headers:
        worker = _text(WORKER, headers[WORKER])
    if MODEL in headers:
        model = _text(MODEL, headers[MODEL])
    if RANK in headers:
        rank = _number(headers, RANK, -1)
        if rank < 0:
            raise ValueError(f"{RANK} is negative")
    if not 0 < len(worker) <= MAX_NAME or len(model) > MAX_NAME:
        raise ValueError(f"subject {subject!r}: the names of worker and model have 1 to {MAX_NAME} characters")
    return model, worker, rank


def _address_of(subject: str) -> tuple[str, str, int | None]:
    """Model, worker and rank of the last three tokens."""
    tokens = subject.split(".")
    if len(tokens) < 4:
        raise ValueError(f"subject {subject!r} is not PREFIX.MODEL.WORKER.RANK, and there is no header {WORKER}")
    model, worker, rank = tokens[-3:]
    if rank != _NO_RANK and not (_NUMBER.fullmatch(rank) and 0 <= int(rank) <= _HIGHEST):
        raise ValueError(f"subject {subject!r}: rank {rank!r} is neither a number nor {_NO_RANK}")
    place = f"subject {subject!r}"
    return (
        "" if model == _NO_MODEL else _text(place, model),
        _text(place, worker),
        None if rank == _NO_RANK else int(rank),
    )


def _control(text: str) -> Control:
    try:
        return Control(text)
    except ValueError:
        raise ValueError(f"{CONTROL} is {text!r}, which this version does not know") from None


def _lineage(headers: Mapping[str, str]) -> str:
    lineage = headers.get(SOURCE, "")
    if SOURCE in headers and not _LINEAGE.fullmatch(lineage):
        raise ValueError(f"{SOURCE} is not 1 to 128 characters of printable ASCII")
    return lineage


def _number(headers: Mapping[str, str], name: str, default: int) -> int:
    text = headers.get(name)
    if text is None:
        return default
    number = int(text) if _NUMBER.fullmatch(text) else None
    if number is None or number > _HIGHEST:
        raise ValueError(f"{name} is {text[:40]!r}, which is no number from -1 to {_HIGHEST}")
    return number


def _token(text: str) -> str:
    return _NOT_IN_TOKEN.sub(_escaped, text.encode()).decode()


def _value(text: str) -> str:
    return _NOT_IN_VALUE.sub(_escaped, text.encode()).decode()


def _escaped(found: re.Match[bytes]) -> bytes:
    return b"%%%02X" % found[0][0]


def _text(place: str, escaped: str) -> str:
    """The text of a token or of a header's value."""
    if escaped.isascii() and "%" not in escaped:
        return escaped
    try:
        raw = escaped.encode()
        if _STRAY.search(raw):
            raise ValueError(f"{place}: {escaped!r} has a % that no two upper-case hexadecimal digits follow")
        return _ESCAPE.sub(lambda found: bytes((int(found[1], 16),)), raw).decode()
    except UnicodeError:
        raise ValueError(f"{place}: {escaped!r} is not UTF-8 once its escapes are resolved") from None
