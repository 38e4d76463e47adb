"""What a broken replay socket answers: a lie takes a number asked for and the ring, and gives the frames of a reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from struct import Struct

from ..engine_sockets import Answer, end_marker, honest_answer
from ..recording import RecordedMessage
from .faults import Fault

Answering = Callable[[int, Sequence[RecordedMessage]], Answer]

_FAR_AHEAD = 1_000_000
_HOLE_MAX = 5
_LATE_MAX = 3
_TIME = Struct(">d")


def _early(start: int, ring: Sequence[RecordedMessage]) -> Answer:
    return honest_answer(0, ring)


def _future(start: int, ring: Sequence[RecordedMessage]) -> Answer:
    frames = [message.frames for message in ring if (message.seq or 0) >= start]
    if frames:
        topic, seq, payload = frames[-1]
        frames.append((topic, (int.from_bytes(seq, "big") + _FAR_AHEAD).to_bytes(8, "big"), payload))
    return [*frames, end_marker()]


def _forge(start: int, ring: Sequence[RecordedMessage]) -> Answer:
    """The batch's time is a float64 behind the array header and its own: the events stay what they were."""
    first, *others = honest_answer(start, ring)
    if others:
        topic, seq, payload = first
        seconds: float = _TIME.unpack(payload[2:10])[0]
        first = (topic, seq, payload[:2] + _TIME.pack(seconds + 1.0) + payload[10:])
    return [first, *others]


def _no_end(start: int, ring: Sequence[RecordedMessage]) -> Answer:
    return list(honest_answer(start, ring))[:-1]


def lie(fault: Fault, random: Random) -> Answering:
    """The answer of a replay socket that has this fault. Mute is no answer at all, and not made here."""
    if fault is Fault.LATE:
        late = random.randint(1, _LATE_MAX)
        return lambda start, ring: honest_answer(start + late, ring)
    if fault is Fault.HOLES:
        return _with_holes(random)
    return {Fault.EARLY: _early, Fault.FUTURE: _future, Fault.FORGE: _forge, Fault.NO_END: _no_end}[fault]


def _with_holes(random: Random) -> Answering:
    replies = 0

    def answer(start: int, ring: Sequence[RecordedMessage]) -> Answer:
        nonlocal replies
        replies += 1
        *frames, end = honest_answer(start, ring)
        if replies % 2 and frames:
            at = random.randrange(len(frames))
            del frames[at : at + random.randint(1, _HOLE_MAX)]
        return [*frames, end]

    return answer
