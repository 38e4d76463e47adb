"""What was published and is not acknowledged yet, and what comes next. Pure: fed with answers and times.

Records are published in order of their running numbers, up to a number of them ahead of the first acknowledgement. One
that fails takes all behind it with it: everything is published again from the first one that is not acknowledged, at
first that one alone. So a record is never repeated behind its successor, and what the server had already, it drops by
its message id. Answers to what was given up no longer count.

Servers that share a stream may still lose a record and take the next ones, when their leader hands over. Then what is
read is out of order. So with them one record of each worker is on its way at a time. Without that it shows here as a
record that is not acknowledged before one that is: `Retreat.overtaken` counts those.
"""

from __future__ import annotations

from collections import deque
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


class _Sent:
    __slots__ = ("done", "key", "record", "sent_ms", "size")

    def __init__(self, key: int, record: Record, size: int, sent_ms: int) -> None:
        self.key = key
        self.record = record
        self.size = size
        self.sent_ms = sent_ms
        self.done = False


class Window:
    """At most `most` records and about `most_bytes` are on their way. An answer is awaited for `timeout_ms`."""

    def __init__(self, most: int, most_bytes: int, timeout_ms: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._timeout_ms = timeout_ms
        self._sent: deque[_Sent] = deque()
        self._by_token: dict[int, _Sent] = {}
        self._bytes = 0
        self._token = 0
        self.cautious = True
        """Whether a failed record must be acknowledged before others may follow."""
        self.one_by_one = False
        """Whether one record of each stream is on its way at a time."""
        self._under_way: set[str] = set()
        self.through = 0
        """Every record up to this running number is acknowledged."""
        self.highest = 0
        """The highest running number that was ever published."""

    @property
    def after(self) -> int:
        """The running number after which the next record is published."""
        return self._sent[-1].key if self._sent else self.through

    @property
    def in_flight(self) -> int:
        """Records without an answer, or with one that is waiting for those before them."""
        return len(self._sent)

    def room(self) -> tuple[int, int]:
        """How many records, and how many bytes, may follow now. After a failure, one until it is acknowledged."""
        most = 1 if self.cautious else self._most
        return most - len(self._sent), self._most_bytes - self._bytes

    def may_follow(self, record: Record) -> bool:
        """Whether a record may be published although those before it are on their way."""
        return not self.one_by_one or record.stream not in self._under_way

    def send(self, key: int, record: Record, size: int, now_ms: int) -> int:
        """Note that a record is published now. Returns the token that its answer must bear."""
        self._token += 1
        sent = _Sent(key, record, size, now_ms)
        self._sent.append(sent)
        self._by_token[self._token] = sent
        self._bytes += size
        self._under_way.add(record.stream)
        self.highest = max(self.highest, key)
        return self._token

    def acknowledge(self, token: int) -> list[Acknowledged]:
        """The server has the record. Returns those that are now done, in order; an unknown token changes nothing."""
        sent = self._by_token.pop(token, None)
        if sent is None:
            return []
        sent.done = True
        self._under_way.discard(sent.record.stream)
        return list(self._finish())

    def _finish(self) -> Iterable[Acknowledged]:
        while self._sent and self._sent[0].done:
            sent = self._sent.popleft()
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
        return bool(self._sent) and now_ms - self._sent[0].sent_ms > self._timeout_ms

    def retreat(self) -> Retreat:
        """Give up what is in flight: it is published again, from the first one that is not acknowledged on."""
        overtaken: dict[str, int] = {}
        lost: set[str] = set()
        for sent in self._sent:
            stream = sent.record.stream
            if not sent.done:
                lost.add(stream)
            elif stream in lost:
                overtaken[stream] = overtaken.get(stream, 0) + 1
        retreat = Retreat(len(self._sent), overtaken)
        self._sent.clear()
        self._by_token.clear()
        self._under_way.clear()
        self._bytes = 0
        self.cautious = True
        return retreat
