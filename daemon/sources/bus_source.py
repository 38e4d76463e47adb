"""One bus that is followed: its workers, as its messages bring them, and how far it has been read.

The thread that receives owns it. Everybody else only reads whole values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvcensus.backends.model import Cursor
from kvcensus.translators.translation import Rejection, RejectReason, Together, Translation

from ..claims import Claims
from ..config import OnFence, SourceType
from ..config.translated import Translated
from ..counters import BusCounters, IntakeCounters
from ..engines import translator_of
from ..followed import Followed, monotonic_ms
from ..frame_queue import Advance, Item, Refuse
from ..logs import get_logger
from ..status import BusStatus, StreamState
from ..streams.bus import Bus, BusLimits, Verdicts, WorkerLife, key_of
from ..streams.delivery import Delivery
from ..streams.verdicts import Apply, Fence, NewEpoch, Retire
from .opening import Opening

_LOG_EVERY_MS = 10_000

log = get_logger("bus")


class BusSettings(msgspec.Struct, frozen=True):
    """What a bus is told, whatever its transport. `cursor` names its position; `jetstream` is "" for none."""

    name: str
    cursor: str
    endpoints: tuple[str, ...]
    limits: BusLimits
    stale_after_ms: int
    events: Translated
    type: SourceType
    jetstream: str = ""
    max_workers: int = 1024
    worker_prefix: str = ""


class BusSource:
    """A bus of the configuration. `problem` is one sentence on why nothing comes, "" when something could."""

    def __init__(self, settings: BusSettings, cursors: Iterable[Cursor], claims: Claims) -> None:
        """`cursors` are those of the index; the ones of this bus are taken up."""
        self.settings = settings
        self.name = settings.name
        self._claims = claims
        self.bus = Bus(settings.limits, self._admit)
        self.counters = BusCounters()
        self.problem = ""
        self.pending = 0
        """Messages that the stream still has for us (JetStream)."""
        self.waiting: Callable[[], int] = lambda: 0
        """Messages that wait in the client (core NATS)."""
        self.was_connected = False
        self._workers: dict[str, Followed] = {}
        self._leaving: dict[str, Followed] = {}
        """Workers that were dropped. Until that is committed nobody else may follow them: it would be dropped, too."""
        self._made_for: dict[str, tuple[str, str]] = {}
        self._muffled_until_ms = 0
        self.position = Followed(
            source=self.name,
            stream=settings.cursor,
            rank=None,
            endpoint=", ".join(settings.endpoints),
            translator=_Untranslated(),
            view=_BusView(self.bus),
            intake=IntakeCounters(),
            cursor=None,
            engine=settings.type,
        )
        claims.claim(settings.cursor, settings.cursor)  # no worker's: both would be stored under one name
        now = monotonic_ms()
        for cursor in cursors:
            if cursor.source != self.name:
                continue
            if cursor.stream == settings.cursor:
                self.position.cursor = cursor
            elif cursor.epoch and claims.claim(cursor.stream, self.name):
                life = self.bus.restore(cursor, now)
                worker = _name_of(cursor.stream, cursor.rank)
                self._workers[cursor.stream] = self._follow(cursor.stream, worker, cursor.rank, life, cursor)

    @property
    def connected(self) -> bool:
        """Whether the bus is there."""
        return self.bus.state in (StreamState.LIVE, StreamState.REPLAYING)

    def workers(self) -> list[Followed]:
        """Every worker that is followed now."""
        return list(self._workers.values())

    def status(self) -> BusStatus:
        """The bus as it is now."""
        settings = self.settings
        return BusStatus(
            bus=self.name,
            type=settings.type,
            servers=settings.endpoints,
            jetstream=settings.jetstream,
            state=self.bus.state,
            problem=self.problem,
            position=self.position.cursor.seq,
            pending=self.pending + self.waiting(),
            workers=len(self._workers),
            refused=self.bus.refused,
        )

    def connection_made(self) -> None:
        """The bus is there, with nothing wrong."""
        self.was_connected = True
        if self.problem:
            log.info("bus_recovered", bus=self.name)
        self.problem = ""
        self.bus.connected(monotonic_ms())
        self._note_states()
        log.info("bus_connected", bus=self.name)

    def connection_lost(self) -> None:
        """The bus is gone, or nothing comes from it any more."""
        if self.connected:
            self.counters.disconnects += 1
            log.warning("bus_disconnected", bus=self.name)
        self.bus.disconnected()
        self._note_states()

    def fail(self, problem: str) -> None:
        """Nothing comes from the bus, for this reason. It is tried again."""
        if problem != self.problem:
            log.error("bus_problem", bus=self.name, detail=problem)
        self.problem = problem

    def take(self, opening: Opening, payload: bytes) -> list[Item]:
        """What a message comes to."""
        deliveries, rejections = opening
        items: list[Item] = []
        if deliveries:
            items = self._items(self.bus.receive(deliveries, monotonic_ms()))
            for delivery in deliveries:
                self._settle_translator(delivery)
        if rejections:
            seq = deliveries[0].seq if deliveries else -1
            items += [(self.position, Refuse(seq, payload, rejection)) for rejection in rejections]
            if deliveries:
                reason = "part of a message could not be read: it may have been about this worker"
                items += self._items(self.bus.torn(deliveries, reason))
        return items

    def take_run(self, head: Delivery, payloads: list[bytes]) -> list[Item]:
        """What messages of one worker come to. See `Bus.receive_run`."""
        items = self._items(self.bus.receive_run(head, payloads, monotonic_ms()))
        self._settle_translator(head)
        return items

    def lost(self, reason: str) -> list[Item]:
        """The bus has lost messages, and nobody knows whose."""
        log.error("bus_lost_messages", bus=self.name, reason=reason, workers=len(self._workers))
        return self._items(self.bus.lost(reason))

    def tick(self) -> list[Item]:
        """Time has passed: leases, and the states that are shown."""
        for key in [key for key, followed in self._leaving.items() if followed.left]:
            del self._leaving[key]
            self._claims.release(key, self.name)
        items = self._items(self.bus.tick(monotonic_ms()))
        self._note_states()
        return items

    def advance(self, position: int, life: str) -> Item:
        """The stream `life` has been read up to `position`: to be queued behind what that brought."""
        return self.position, Advance(position, life)

    def retire(self) -> list[Item]:
        """The bus is no longer followed: neither are its workers."""
        return [(stream, Retire()) for stream in (*self._workers.values(), self.position)]

    def close(self) -> None:
        """Somebody else may follow its workers. What it brought is committed."""
        self._claims.release(self.settings.cursor, self.settings.cursor)
        for key in (*self._workers, *self._leaving):
            self._claims.release(key, self.name)

    def _note_states(self) -> None:
        for one in (*self._workers.values(), self.position):
            one.note_state()

    def _admit(self, key: str, delivery: Delivery, life: WorkerLife) -> bool:
        if len(self._workers) >= self.settings.max_workers:
            self._complain("worker_refused", worker=key, detail=f"max_workers is {self.settings.max_workers}")
            return False
        if not self._claims.claim(key, self.name):
            detail = f"{self._claims.owner(key)} already follows a worker of this name; see worker_prefix"
            self._complain("worker_refused", worker=key, detail=detail)
            return False
        self._leaving.pop(key, None)
        self._workers[key] = self._follow(key, delivery.worker, delivery.rank, life, None)
        log.info("worker_joined", bus=self.name, worker=key)
        return True

    def _follow(self, key: str, worker: str, rank: int | None, life: WorkerLife, cursor: Cursor | None) -> Followed:
        settings = self.settings
        return Followed(
            source=self.name,
            stream=key,
            rank=rank,
            endpoint=self.position.endpoint,
            translator=_Untranslated(),
            view=life,
            intake=life.counters,
            cursor=cursor,
            worker=worker,
            engine=settings.type,
            keeps_fenced=settings.events.on_fence is OnFence.KEEP,
            stale_after_ms=settings.stale_after_ms,
        )

    def _settle_translator(self, delivery: Delivery) -> None:
        """A worker's translator is made for what its messages say of it."""
        key = key_of(delivery)
        made_for = (delivery.engine, delivery.model)
        if self._made_for.get(key) == made_for or key not in self._workers:
            return
        followed = self._workers[key]
        engine = delivery.engine or self.settings.type
        name = delivery.worker.removeprefix(self.settings.worker_prefix)
        options = self.settings.events.options_of(delivery.worker, delivery.model)
        translator = translator_of(engine, options, name, delivery.rank)
        if translator is not None:
            followed.engine, followed.translator = engine, translator
            self._made_for[key] = made_for

    def _items(self, verdicts: Verdicts) -> list[Item]:
        items: list[Item] = []
        for key, verdict in verdicts:
            followed = self._workers.get(key)
            if followed is None:
                continue
            items.append((followed, verdict))
            if isinstance(verdict, Apply):
                continue
            if isinstance(verdict, Retire):
                self._leaving[key] = self._workers.pop(key)
                self._made_for.pop(key, None)
            _report(self.name, key, verdict)
        return items

    def _complain(self, event: str, **facts: object) -> None:
        now = monotonic_ms()
        if now >= self._muffled_until_ms:
            self._muffled_until_ms = now + _LOG_EVERY_MS
            log.error(event, bus=self.name, **facts)


class _BusView:
    """A bus has no signs of life of its own: its connection is one."""

    expects_life = False
    proven = True
    life_at_ms = 0

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    @property
    def state(self) -> StreamState:
        return self._bus.state


class _Untranslated:
    """Stands where no message has come yet that says whose events they are."""

    def translate(self, payload: bytes, facts: int) -> Translation:
        detail = "nobody knows whose events these are"
        return Translation([], [Rejection(RejectReason.PAYLOAD, detail, raw=payload)], facts=facts)

    def translate_all(self, payloads: Sequence[bytes], facts: int) -> Together | None:
        return None


def _report(bus: str, key: str, verdict: NewEpoch | Fence | Retire) -> None:
    if isinstance(verdict, NewEpoch):
        log.info("epoch_started", bus=bus, stream=key, epoch=verdict.epoch, reason=verdict.reason, life=verdict.life)
    elif isinstance(verdict, Fence):
        log.warning("worker_fenced", bus=bus, stream=key, seq=verdict.seq, reason=verdict.reason)
    else:
        log.info("worker_left", bus=bus, worker=key, reason="it was silent for longer than its lease")


def _name_of(stream: str, rank: int | None) -> str:
    return stream if rank is None else stream.removesuffix(f"/{rank}")
