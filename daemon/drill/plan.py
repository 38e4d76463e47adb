"""A schedule made of a seed: who publishes how much, and what goes wrong in between. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from .faults import ABOUT, Fault

_BURST_MAX = 30
_PAUSE_MS_MAX = 40
_FAULT_SHARE = 0.4
"""Of the steps: about one fault for every 35 messages."""
_LASTS_STEPS = (2, 6)
_KILLS_MAX = 3
"""A start of the daemon takes most of a second, more than everything else of a schedule."""
_SLOW = {Fault.KILL, Fault.TERM}
_ONCE = {Fault.FREEZE, Fault.FULL_MAP, Fault.FULL_DISK, Fault.PARTITION}


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that is done. `fault` None: `count` messages of a stream, then `ms` of silence.

    A fault has as many messages, steps or ms as it needs, in the same fields; `wait`: go on only when it is over.
    """

    stream: int
    fault: Fault | None = None
    count: int = 0
    ms: int = 0
    steps: int = 0
    wait: bool = False


class Plan(msgspec.Struct, frozen=True):
    """All of a drill: the seed of the engines as well, and its steps in order."""

    seed: int
    streams: int
    steps: tuple[Step, ...]


def make_plan(seed: int, streams: int, messages: int, faults: Sequence[Fault]) -> Plan:
    """A schedule of about `messages` messages for each stream."""
    random = Random(f"plan {seed}")
    possible = list(faults)
    starts = 0
    steps: list[Step] = []
    left = [messages] * streams
    while any(left):
        stream = random.choice([number for number in range(streams) if left[number]])
        count = min(left[stream], random.randint(1, _BURST_MAX))
        left[stream] -= count
        steps.append(Step(stream, count=count, ms=random.choice((0, 0, random.randint(1, _PAUSE_MS_MAX)))))
        if not possible or random.random() >= _FAULT_SHARE:
            continue
        fault = random.choice(possible)
        steps.append(_fault_step(fault, random.randrange(streams), random))
        starts += fault in _SLOW
        if fault in _ONCE:
            possible.remove(fault)
        if starts == _KILLS_MAX:
            possible = [one for one in possible if one not in _SLOW]
    return Plan(seed, streams, tuple(steps))


def _fault_step(fault: Fault, stream: int, random: Random) -> Step:
    return Step(
        stream,
        fault,
        count=random.randint(1, 8),
        ms=random.randint(0, 150),
        steps=random.randint(*_LASTS_STEPS) if ABOUT[fault].lasts else 0,
        wait=random.random() < 0.6,
    )
