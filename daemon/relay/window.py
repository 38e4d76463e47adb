"""What was published and is not acknowledged yet, and what comes next. Pure: fed with answers and times.

Records are published in order of their running numbers, up to a number of them ahead of the first acknowledgement. One
that fails takes all behind it with it: everything is published again from the first one that is not acknowledged, at
first that one alone. So a record is never repeated behind its successor, and what the server had already, it drops by
its message id. Answers to what was given up no longer count.

Servers that share a stream may still lose a record and take the next ones, when their leader hands over. Then what is
read is out of order. So with them one record of each worker is on its way at a time, and those behind it are held.
Without that it shows here as a record that is not acknowledged before one that is: `Retreat.overtaken` counts those.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import msgspec

from .record import Position, Record


class Acknowledged(msgspec.Struct, frozen=True):
    """A record that the bus has, as have all before it."""

    key: int
    stream: str
    position: Position
    spooled_at_ms: int


class Retreat(msgspec.Struct):
    """Records that are to be published again, and by stream how many of them the server took before one it lost."""

    records: int
    overtaken: dict[str, int]


class _Taken:
    """A record that is held or on its way."""

    __slots__ = ("done", "key", "record", "sent_ms", "size")

    def __init__(self, key: int, record: Record, size: int) -> None:
        self.key = key
        self.record = record
        self.size = size
        self.sent_ms: int | None = None
        self.done = False


class Window:
    """At most `most` records and about `most_bytes` are held or on their way. An answer is awaited for `timeout_ms`.

    A record is held until those of its stream before it allow it to be published: others need not wait for it.
    """

    def __init__(self, most: int, most_bytes: int, timeout_ms: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._timeout_ms = timeout_ms
        self._taken: deque[_Taken] = deque()
        self._held: dict[str, deque[_Taken]] = {}
        self._by_token: dict[int, _Taken] = {}
        self._bytes = 0
        self._token = 0
        self.cautious = True
        """Whether a failed record must be acknowledged before others may follow."""
        self.one_by_one = False
        """Whether one record of each stream is on its way at a time."""
        self._under_way: Counter[str] = Counter()
        self.through = 0
        """Every record up to this running number is acknowledged."""
        self.repeated = 0
        """Records that were published again."""
        self._given_up: set[int] = set()

    @property
    def after(self) -> int:
        """The running number after which the next record is held."""
        return self._taken[-1].key if self._taken else self.through

    def __len__(self) -> int:
        """Records that are held or without an answer, or have one that is waiting for those before them."""
        return len(self._taken)

    def room(self) -> tuple[int, int]:
        """How many records, and how many bytes, may be held now. After a failure, one until it is acknowledged."""
        most = 1 if self.cautious else self._most
        return most - len(self._taken), self._most_bytes - self._bytes

    def hold(self, key: int, record: Record) -> None:
        """The next record is to be published."""
        taken = _Taken(key, record, len(record.payload))
        self._taken.append(taken)
        self._held.setdefault(record.stream, deque()).append(taken)
        self._bytes += taken.size

    def ready(self) -> list[tuple[int, Record]]:
        """The held records that may be published now, in order."""
        found: list[_Taken] = []
        for stream, held in self._held.items():
            if not self.one_by_one:
                found += held
            elif not self._under_way[stream]:
                found.append(held[0])
        return [(taken.key, taken.record) for taken in sorted(found, key=_key_of)]

    def send(self, record: Record, now_ms: int) -> int:
        """Note that a record is published now, the first one held of its stream. Returns the token of its answer."""
        held = self._held[record.stream]
        taken = held.popleft()
        if not held:
            del self._held[record.stream]
        taken.sent_ms = now_ms
        self._token += 1
        self._by_token[self._token] = taken
        self._under_way[record.stream] += 1
        if taken.key in self._given_up:
            self._given_up.discard(taken.key)
            self.repeated += 1
        return self._token

    def acknowledge(self, token: int) -> list[Acknowledged]:
        """The server has the record. Returns those that are now done, in order; an unknown token changes nothing."""
        sent = self._by_token.pop(token, None)
        if sent is None:
            return []
        sent.done = True
        self._under_way[sent.record.stream] -= 1
        return list(self._finish())

    def _finish(self) -> Iterable[Acknowledged]:
        while self._taken and self._taken[0].done:
            sent = self._taken.popleft()
            self._bytes -= sent.size
            self.cautious = False
            self.through = sent.key
            record = sent.record
            yield Acknowledged(sent.key, record.stream, Position(record.epoch, record.seq), record.at_ms)

    def answered(self, token: int) -> tuple[int, Record] | None:
        """The running number and the record that an answer is for, None when it no longer counts."""
        sent = self._by_token.get(token)
        return None if sent is None else (sent.key, sent.record)

    def overdue(self, now_ms: int) -> bool:
        """Whether an answer should have come by now."""
        sent_ms = self._taken[0].sent_ms if self._taken else None
        return sent_ms is not None and now_ms - sent_ms > self._timeout_ms

    def retreat(self) -> Retreat:
        """Give up what is held or in flight: it is published again, from the first that is not acknowledged on."""
        overtaken: dict[str, int] = {}
        lost: set[str] = set()
        sent = [taken for taken in self._taken if taken.sent_ms is not None]
        for one in sent:
            stream = one.record.stream
            if not one.done:
                lost.add(stream)
            elif stream in lost:
                overtaken[stream] = overtaken.get(stream, 0) + 1
        retreat = Retreat(len(sent), overtaken)
        self._given_up = {key for key in self._given_up if key > self.through} | {one.key for one in sent}
        self._taken.clear()
        self._held.clear()
        self._by_token.clear()
        self._under_way.clear()
        self._bytes = 0
        self.cautious = True
        return retreat


def _key_of(taken: _Taken) -> int:
    return taken.key
