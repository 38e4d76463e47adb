"""What a batch of messages makes of the cursor of their stream."""

from __future__ import annotations

import msgspec

from kvcensus.backends.model import Cursor

from .followed import Followed, now_ms
from .status import Trust
from .streams.verdicts import fingerprint


def never_followed(cursor: Cursor) -> Cursor:
    """The cursor of a stream whose blocks go with it: should it outlive them, it must not say that they are there."""
    return Cursor(stream=cursor.stream, epoch=0, seq=-1, source=cursor.source)


class Batched(dict[Followed, "Progress"]):
    """By stream, what a batch makes of its cursor; of one that is new to the batch, what is committed."""

    def __missing__(self, stream: Followed) -> Progress:
        progress = self[stream] = Progress(stream.cursor)
        return progress


class Progress:
    """What a batch makes of a stream's cursor."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.payload: bytes | None = None
        self.engine_ms: list[int] = []
        self.seq = cursor.seq
        self.messages = cursor.messages
        self.stored = cursor.blocks_stored
        self.removed = cursor.blocks_removed
        self.facts = cursor.facts
        self.rank = cursor.rank
        self.worker_id = cursor.worker_id
        self.trust = cursor.trust
        self.reason = cursor.reason
        self.since_ms = cursor.since_ms
        self.epoch = cursor.epoch
        self.fingerprint = cursor.fingerprint
        self.life = cursor.life

    def set_trust(self, trust: Trust, reason: str) -> None:
        if trust != self.trust or reason != self.reason:
            self.trust, self.reason, self.since_ms = trust, reason, now_ms()

    def advanced(self) -> Cursor:
        return msgspec.structs.replace(
            self.cursor,
            epoch=self.epoch,
            seq=self.seq,
            fingerprint=self.fingerprint if self.payload is None else fingerprint(self.payload),
            worker_id=self.worker_id,
            rank=self.rank,
            engine_ms=max(self.engine_ms, default=self.cursor.engine_ms),
            committed_ms=now_ms(),
            messages=self.messages,
            blocks_stored=self.stored,
            blocks_removed=self.removed,
            trust=self.trust,
            reason=self.reason,
            since_ms=self.since_ms,
            facts=self.facts,
            life=self.life,
        )
