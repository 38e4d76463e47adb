"""What the state of a stream tells its surroundings to do, in order."""

from __future__ import annotations

from hashlib import blake2b

import msgspec


class Apply(msgspec.Struct, frozen=True, gc=False):
    """Translate and apply these messages. They are the next ones of their epoch, numbered from `seq` on."""

    seq: int
    payloads: list[bytes]

    @property
    def after(self) -> int:
        """The number of the message that follows."""
        return self.seq + len(self.payloads)


class NewEpoch(msgspec.Struct, frozen=True):
    """The publisher began another life: drop all that its worker holds, then go on from before its first message.

    `life` names it, where messages say which one they are of.
    """

    epoch: int
    reason: str
    life: str = ""


class Fence(msgspec.Struct, frozen=True):
    """Messages are lost for good: stop believing the worker. What follows begins after `seq`."""

    seq: int
    reason: str


class AskReplay(msgspec.Struct, frozen=True):
    """Ask the replay socket, anew, for everything from `start` on. Answers to earlier requests no longer count."""

    start: int


class StopReplay(msgspec.Struct, frozen=True):
    """No answer is awaited any more."""


class Retire(msgspec.Struct, frozen=True):
    """The stream is no longer followed: drop what its worker holds, and its cursor."""


Verdict = Apply | NewEpoch | Fence | AskReplay | StopReplay
BusVerdict = Apply | NewEpoch | Fence | Retire


def fingerprint(payload: bytes) -> bytes:
    """What identifies a message across restarts of this daemon: 8 bytes."""
    return blake2b(payload, digest_size=8).digest()
