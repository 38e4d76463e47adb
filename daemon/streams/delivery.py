"""One message of a bus, as far as it says of itself whose it is and where it stands."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Control(StrEnum):
    """What a message says when it has no payload."""

    NONE = ""
    """It has a payload."""
    LIFE = "life"
    """Another life of the worker began. Nothing of it was sent yet."""
    FENCE = "fence"
    """Numbers up to and including this one are lost for good."""
    ALIVE = "alive"
    """The worker's engine is there. `seq` is the last number that was published."""
    GONE = "gone"
    """As ALIVE, but whoever publishes has lost the engine, or cannot say how far it is."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A message for one worker. A message with events of several workers becomes one of these for each.

    `worker` is its NAME. `lineage` says who numbers, "" if nobody says; `epoch` counts the lives within it. `seq` is -1
    without a number. `first` is the number that a life begins with. `shared`: the lineage numbers the messages of all
    its workers in one sequence. `engine` says whose payload it is: a type of source.
    """

    worker: str
    rank: int | None
    lineage: str
    epoch: int
    seq: int
    payload: bytes = b""
    control: Control = Control.NONE
    first: int = 0
    shared: bool = False
    engine: str = ""
    model: str = ""
