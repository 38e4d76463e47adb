"""The state of a bus: whose life each of its workers is in, who numbers their messages, and where numbers are missing.

A bus brings messages of workers that nobody configured. Each message says whose it is, which life of it, and which
number it has there, so continuity needs no proof but the next number. Nothing can be asked for again: a number that is
missing fences every worker whose messages it may have been about.

Times are monotonic milliseconds given by the caller. Every method returns verdicts, each with the stream it is for, to
be carried out in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from kvcensus.backends.model import Cursor
from kvcensus.translators.translation import worker_id_of

from ..counters import IntakeCounters
from ..status import StreamState
from .delivery import Control, Delivery
from .verdicts import Apply, BusVerdict, Fence, NewEpoch, Retire

FORMER_LINEAGES = 8
"""Lineages remembered of a worker, to tell that two publish for it at a time."""
RECENT_MESSAGES = 1024
"""Messages remembered of a worker whose messages do not say which life they are of."""

Verdicts = list[tuple[str, BusVerdict]]


class BusLimits(msgspec.Struct, frozen=True):
    """How long a silent worker is kept, in ms; 0: for ever.

    `lease_ms` is for workers that send signs of life, `silent_lease_ms` for those that do not. `durable`: the bus keeps
    its messages until they are read, so a new connection has missed none.
    """

    lease_ms: int = 600_000
    silent_lease_ms: int = 86_400_000
    durable: bool = False


class WorkerLife:
    """What is known of one worker of a bus. `applied` is the last number of its own messages."""

    def __init__(self, bus: Bus, counters: IntakeCounters, cursor: Cursor | None, now_ms: int) -> None:
        self._bus = bus
        self.counters = counters
        lineage, _, epoch = cursor.life.rpartition(":") if cursor else ("", "", "")
        self.lineage = lineage
        self.life = int(epoch or 0)
        self.epoch = cursor.epoch if cursor else 0
        self.applied = cursor.seq if cursor else -1
        self.former: deque[str] = deque(maxlen=FORMER_LINEAGES)
        self.recent: dict[int, int] = {}
        self.contested = False
        self.beats = False
        self.gone = False
        self.proven = cursor is None
        """Whether nothing can have been missed since the connection was made."""
        self.life_at_ms = now_ms

    @property
    def state(self) -> StreamState:
        """What the stream is doing: what its bus does, unless the worker's own publisher has lost its engine."""
        return StreamState.DISCONNECTED if self.gone else self._bus.state

    def begin(self, lineage: str, life: int) -> None:
        """Another life begins."""
        self.lineage, self.life = lineage, life
        self.epoch += 1
        self.applied = -1
        self.recent.clear()
        self.contested = False
        self.gone = False
        self.proven = True

    @property
    def expects_life(self) -> bool:
        """Whether a silent worker would have been heard of."""
        return self.beats


class _Numbering:
    """One sequence of numbers: the last one, the life it is of, and whether all of that life was seen."""

    __slots__ = ("epoch", "last", "whole")

    def __init__(self, epoch: int, last: int, whole: bool) -> None:
        self.epoch = epoch
        self.last = last
        self.whole = whole


class Bus:
    """Decides what each message is to its workers.

    `admit` is asked whether to follow a new one, by the name of its stream.
    """

    def __init__(self, limits: BusLimits, admit: Callable[[str, Delivery, WorkerLife], bool]) -> None:
        self._limits = limits
        self._admit = admit
        self.workers: dict[str, WorkerLife] = {}
        self._numberings: dict[str, _Numbering] = {}
        self._connected = False
        self._was_connected = False
        self._hears = True
        self.behind = False
        """Whether a durable bus still has messages that were published before now."""
        self.refused = 0
        """Messages of workers that were not admitted, or that had no number."""

    @property
    def state(self) -> StreamState:
        """What the bus is doing."""
        if not self._connected:
            return StreamState.DISCONNECTED if self._was_connected else StreamState.CONNECTING
        return StreamState.REPLAYING if self.behind else StreamState.LIVE

    def restore(self, cursor: Cursor, now_ms: int) -> WorkerLife:
        """Take up a worker from its cursor."""
        key = cursor.stream
        worker = self.workers[key] = WorkerLife(self, IntakeCounters(), cursor, now_ms)
        worker.proven = self._limits.durable
        for name in (_own(worker.lineage, key), worker.lineage):
            known = self._numberings.get(name)
            # Cursors do not tell of workers that were refused or dropped, so it may not be whole.
            last = cursor.seq if known is None else max(known.last, cursor.seq)
            self._numberings[name] = _Numbering(worker.life, last, False)
        return worker

    def connected(self, now_ms: int) -> None:
        """The bus is there. Leases begin anew: a silence was ours."""
        self._connected = self._was_connected = True
        self._begin_leases(now_ms)

    def hears(self, signs: bool, now_ms: int) -> None:
        """Whether signs of life can arrive: while they cannot, that there are none says nothing."""
        if signs and not self._hears:
            self._begin_leases(now_ms)
        self._hears = signs

    def _begin_leases(self, now_ms: int) -> None:
        for worker in self.workers.values():
            worker.life_at_ms = now_ms

    def disconnected(self) -> None:
        """The bus is gone. What it does not keep is lost, whether or not there was anything."""
        self._connected = False
        if not self._limits.durable:
            self.doubt()

    def doubt(self) -> None:
        """Messages may have been missed, and nobody knows whose: each worker has to be heard of again."""
        for worker in self.workers.values():
            worker.proven = False

    def receive(self, message: list[Delivery], now_ms: int) -> Verdicts:
        """One message: what it is to each worker that it has something of."""
        head = message[0]
        if len(message) > 1 and not head.shared:
            return [verdict for delivery in message for verdict in self.receive([delivery], now_ms)]
        if head.control in (Control.ALIVE, Control.GONE):
            self._note_life(head, now_ms)
            return []
        if head.seq < 0 and head.control is Control.NONE and not self._limits.durable:
            self.refused += 1
            return []
        name = head.lineage if head.shared else _own(head.lineage, key_of(head))
        verdicts = self._check_gap(name, head)
        follows, whole = False, True
        for delivery in message:
            key = key_of(delivery)
            worker = self._worker(key, delivery, now_ms)
            if worker is None:
                self.refused += 1
                whole = False
                follows = follows or (head.shared and bool(self._numbered(head)))
                continue
            worker.life_at_ms = now_ms
            worker.counters.messages += 1
            worker.counters.bytes += len(delivery.payload)
            found = self._judge(key, worker, name, delivery)
            if found is not None:
                follows = follows or delivery.lineage == worker.lineage
                verdicts += found
        if follows:
            self._note(name, head)
        if not whole:
            self._forgo(name)
        return verdicts

    def receive_run(self, head: Delivery, payloads: list[bytes], now_ms: int) -> Verdicts:
        """Messages of one worker and epoch, numbered on its own from `head.seq` on: what `receive` comes to for each.

        The list of payloads is given away.
        """
        key = key_of(head)
        worker, numbering = self.workers.get(key), self._numberings.get(_own(head.lineage, key))
        if worker is None or numbering is None or not self._continues(worker, numbering, head):
            verdicts: Verdicts = []
            for seq, payload in enumerate(payloads, head.seq):
                verdicts += self.receive([msgspec.structs.replace(head, seq=seq, payload=payload)], now_ms)
            return verdicts
        worker.applied = numbering.last = head.seq + len(payloads) - 1
        worker.life_at_ms = now_ms
        worker.counters.messages += len(payloads)
        worker.counters.bytes += sum(map(len, payloads))
        return [(key, Apply(head.seq, payloads))]

    @staticmethod
    def _continues(worker: WorkerLife, numbering: _Numbering, head: Delivery) -> bool:
        """Whether a message is simply the next one of a worker that is believed."""
        lives = worker.life == numbering.epoch == head.epoch and worker.lineage == head.lineage != ""
        return lives and worker.epoch > 0 and worker.proven and worker.applied + 1 == numbering.last + 1 == head.seq

    def lost(self, reason: str) -> Verdicts:
        """The bus itself says that messages are gone, and not whose: no worker can be believed."""
        for numbering in self._numberings.values():
            numbering.whole = False
        return [(key, Fence(worker.applied, reason)) for key, worker in self.workers.items()]

    def torn(self, message: list[Delivery], reason: str) -> Verdicts:
        """Part of a message is unreadable: it may have been about any worker under its numberings."""
        found = {key: worker for delivery in message for key, worker in self._numbered(delivery)}
        return [(key, Fence(worker.applied, reason)) for key, worker in found.items()]

    def tick(self, now_ms: int) -> Verdicts:
        """Time has passed: who was silent for longer than its lease is no worker of this bus any more."""
        if not self._connected:
            return []
        gone = []
        for key, worker in self.workers.items():
            lease_ms = self._limits.lease_ms if worker.beats and self._hears else self._limits.silent_lease_ms
            if lease_ms and now_ms - worker.life_at_ms > lease_ms:
                gone.append(key)
        for key in gone:
            lineage = self.workers.pop(key).lineage
            self._forgo(lineage)
            self._leave(lineage, key)
        return [(key, Retire()) for key in gone]

    def _note_life(self, beat: Delivery, now_ms: int) -> None:
        worker = self.workers.get(key_of(beat))
        if worker is None or beat.lineage != worker.lineage:
            return
        worker.life_at_ms = now_ms
        worker.beats = True
        worker.gone = beat.control is Control.GONE
        if beat.epoch == worker.life and beat.seq == worker.applied:
            worker.proven = True
        elif not self._limits.durable and (beat.epoch, beat.seq) > (worker.life, worker.applied):
            # Lost, or on its way: signs of life may overtake messages.
            worker.proven = False

    def _worker(self, key: str, delivery: Delivery, now_ms: int) -> WorkerLife | None:
        worker = self.workers.get(key)
        if worker is None:
            worker = WorkerLife(self, IntakeCounters(), None, now_ms)
            if not self._admit(key, delivery, worker):
                return None
            self.workers[key] = worker
        return worker

    def _check_gap(self, name: str, head: Delivery) -> Verdicts:
        """Numbers missing before this message fence every worker that they may have been about."""
        numbering = self._numberings.get(name)
        if numbering is None or head.control is not Control.NONE or head.epoch != numbering.epoch or head.seq < 0:
            return []
        missing = head.seq - numbering.last - 1
        if missing <= 0:
            return []
        numbering.whole = False
        reason = f"{missing} messages were lost before number {head.seq}, and nobody can be asked for them"
        verdicts: Verdicts = []
        for key, worker in self._numbered(head):
            worker.counters.gaps += 1
            worker.counters.missing += missing
            worker.counters.unrecovered += missing
            verdicts.append((key, self._fence(worker, head.seq - 1, reason)))
        return verdicts

    def _numbered(self, head: Delivery) -> list[tuple[str, WorkerLife]]:
        """The workers in the life that a message is of, under its numbering."""
        keys = self.workers if head.shared else (key_of(head),)
        found = ((key, self.workers.get(key)) for key in keys)
        return [(key, one) for key, one in found if one and one.lineage == head.lineage and one.life == head.epoch]

    def _judge(self, key: str, worker: WorkerLife, name: str, delivery: Delivery) -> Verdicts | None:
        """What a message is to one of its workers; None for nothing at all."""
        known = worker.epoch > 0
        if known and delivery.lineage != worker.lineage and delivery.lineage in worker.former:
            return self._contest(key, worker)
        same = known and delivery.lineage == worker.lineage
        if same and (delivery.epoch < worker.life or self._is_duplicate(worker, name, delivery)):
            worker.counters.duplicates += 1
            return None
        verdicts: Verdicts = []
        if not same or delivery.epoch > worker.life or self._went_back(worker, delivery):
            verdicts += self._another_life(key, worker, name, delivery)
        if delivery.control is Control.FENCE:
            verdicts.append((key, self._fence(worker, delivery.seq, "whoever publishes says that messages are lost")))
        elif delivery.control is Control.NONE:
            verdicts.append((key, self._accept(worker, delivery)))
        return verdicts

    def _accept(self, worker: WorkerLife, delivery: Delivery) -> Apply:
        seq = worker.applied + 1 if delivery.seq < 0 else delivery.seq
        worker.applied = seq
        if not worker.proven:
            for _, other in self._numbered(delivery):
                other.proven = True
        if not delivery.lineage:
            worker.recent[seq] = hash(delivery.payload)
            if len(worker.recent) > RECENT_MESSAGES:
                del worker.recent[next(iter(worker.recent))]
        return Apply(seq, [delivery.payload])

    def _is_duplicate(self, worker: WorkerLife, name: str, delivery: Delivery) -> bool:
        if delivery.epoch > worker.life or (delivery.seq < 0 and delivery.control is not Control.FENCE):
            return False
        if not delivery.lineage:
            return worker.recent.get(delivery.seq) == hash(delivery.payload)
        numbering = self._numberings.get(name)
        if numbering is None or delivery.epoch != numbering.epoch:
            return False
        # A fence after the last number is about what follows it.
        return delivery.seq < numbering.last + (delivery.control is Control.NONE)

    @staticmethod
    def _went_back(worker: WorkerLife, delivery: Delivery) -> bool:
        """Without a lineage a number that was passed before is that of another life."""
        return not delivery.lineage and 0 <= delivery.seq <= worker.applied

    def _another_life(self, key: str, worker: WorkerLife, name: str, delivery: Delivery) -> Verdicts:
        reason = "first message"
        if worker.epoch:
            worker.counters.restarts += 1
            reason = "the worker's messages are of another life"
        former = worker.lineage
        worker.begin(delivery.lineage, delivery.epoch)
        if former and former != delivery.lineage:
            worker.former.append(former)
            self._leave(former, key)
        verdicts: Verdicts = [(key, NewEpoch(worker.epoch, reason, f"{delivery.lineage}:{delivery.epoch}"))]
        if delivery.control is not Control.NONE:
            return verdicts
        if delivery.seq < 0:
            verdicts.append((key, self._fence(worker, -1, "its messages have no numbers: its beginning is unknown")))
        elif delivery.seq > delivery.first and not self._follows_whole(name, delivery):
            worker.counters.gaps += 1
            worker.counters.missing += delivery.seq - delivery.first
            worker.counters.unrecovered += delivery.seq - delivery.first
            verdicts.append((key, self._fence(worker, delivery.seq - 1, "its life began before the first message")))
        return verdicts

    def _follows_whole(self, name: str, delivery: Delivery) -> bool:
        """Whether everything under this numbering was seen, so that there was nothing of a worker that is new to it."""
        numbering = self._numberings.get(name)
        if numbering is None or not numbering.whole or not delivery.lineage:
            return False
        return numbering.epoch == delivery.epoch and delivery.seq == numbering.last + 1

    def _forgo(self, name: str) -> None:
        """Something under this numbering was seen and not kept: who is new to it later has a past."""
        numbering = self._numberings.get(name)
        if numbering is not None:
            numbering.whole = False

    def _leave(self, lineage: str, key: str) -> None:
        """A worker is no longer of this lineage. What numbers nobody is forgotten."""
        self._numberings.pop(_own(lineage, key), None)
        if not any(one.lineage == lineage for one in self.workers.values()):
            self._numberings.pop(lineage, None)

    def _contest(self, key: str, worker: WorkerLife) -> Verdicts | None:
        worker.counters.duplicates += 1
        if worker.contested:
            return None
        worker.contested = True
        return [(key, Fence(worker.applied, "two publishers send messages of this worker"))]

    def _note(self, name: str, head: Delivery) -> None:
        """The numbering has come as far as this message."""
        if head.seq < 0 and head.control is not Control.LIFE:
            return
        last = head.first - 1 if head.control is Control.LIFE else head.seq
        known = self._numberings.get(name)
        if known is None or head.epoch > known.epoch:
            self._numberings[name] = _Numbering(head.epoch, last, last <= head.first)
        elif head.epoch == known.epoch and (last > known.last or not head.lineage):
            known.last = last
            known.whole = known.whole and head.control is not Control.FENCE

    @staticmethod
    def _fence(worker: WorkerLife, seq: int, reason: str) -> Fence:
        worker.applied = max(worker.applied, seq)
        return Fence(worker.applied, reason)


def key_of(delivery: Delivery) -> str:
    """The name of the stream of a worker's messages."""
    return worker_id_of(delivery.worker, delivery.rank)


def _own(lineage: str, key: str) -> str:
    """The name of a numbering of one worker alone."""
    return f"{lineage} {key}"
