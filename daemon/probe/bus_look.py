"""What the messages of one bus say: which workers, by whom, in which format, of which releases. Pure."""

from __future__ import annotations

from kvcensus.backends.model import RemoveBlocks, StoreRun
from kvcensus.translators.dynamo_envelope import FRAME_HEADER_BYTES, Opened, open_dynamo, open_dynamo_frames
from kvcensus.translators.translation import Rejection, Translator

from ..config import NatsConfig, SourceConfig, SourceType
from ..engines import translator_of
from ..sources.opening import Opening, open_deliveries, open_message
from ..streams.delivery import Control, Delivery
from .dynamo_releases import DynamoCandidates
from .findings import BusFinding, Worker, note
from .stream_look import LOOKED_AT_MAX, PayloadLook, counted, on_clock, on_old_sglang, rejected

WORKERS_MAX = 10_000
"""Workers that are told apart; further ones are only counted as messages."""

_WRONG_TYPE = {
    SourceType.DYNAMO: 'are those of a relay or an engine, and type is "dynamo"',
    SourceType.VLLM: 'are Dynamo\'s: set type = "dynamo"',
    SourceType.SGLANG: 'are Dynamo\'s: set type = "dynamo"',
}


class _Seen:
    """One worker."""

    def __init__(self, worker: Worker, translator: Translator | None, payloads: PayloadLook | None) -> None:
        self.worker = worker
        self.translator = translator
        self.payloads = payloads
        self.facts = 0


class BusLook:
    """Takes the messages of one bus, in any order of workers."""

    def __init__(self, finding: BusFinding, config: NatsConfig | SourceConfig) -> None:
        self.finding = finding
        self._config = config
        self._prefix = config.worker_prefix if isinstance(config, NatsConfig) else ""
        self._is_dynamo = config.type is SourceType.DYNAMO
        self._workers: dict[tuple[str, int | None], _Seen] = {}
        self._lineages: set[str] = set()
        self._dynamo = DynamoCandidates()
        self._others = 0
        self._sequences: dict[str, int] = {}
        self._lost = 0

    def message(
        self, subject: str, headers: dict[str, str] | None, payload: bytes, received_ms: int | None, *, in_order: bool
    ) -> None:
        """One message of NATS. `received_ms` None: it was published some time ago."""
        found = self.finding
        found.messages += 1
        found.bytes += len(payload)
        note(found.subjects, subject)
        if found.messages > LOOKED_AT_MAX:
            return
        opening = open_message(self._config.type, self._prefix, subject, headers, payload)
        opened = open_dynamo(payload) if payload else None
        if self._is_dynamo:
            self._note_format(opened, payload, received_ms)
        elif isinstance(opened, Opened) and opened.addresses:
            self._others += 1
        self._take(opening, in_order)

    def sign_of_life(self, subject: str, headers: dict[str, str] | None, payload: bytes) -> None:
        """One message on the subject of the signs of life of relays."""
        self._take(open_message(self._config.type, self._prefix, subject, headers, payload), False)

    def frames(self, frames: list[bytes], received_ms: int) -> None:
        """One message of Dynamo's ZMQ event plane."""
        found = self.finding
        found.messages += 1
        found.bytes += sum(map(len, frames))
        if found.messages > LOOKED_AT_MAX:
            return
        if frames:
            note(found.subjects, frames[0].decode(errors="backslashreplace"))
        opened = open_dynamo_frames(frames)
        if isinstance(opened, Rejection):
            self._others += len(frames) == 3
            self._take(Opening([], [opened]), True)
            return
        payload = frames[-1][FRAME_HEADER_BYTES:]
        self._note_format(opened, payload, received_ms)
        self._take(open_deliveries(opened, payload, self._prefix), True)

    def finish(self) -> BusFinding:
        """Everything, with what is odd about it."""
        found = self.finding
        for seen in self._workers.values():
            if seen.payloads is not None:
                self._finish_engine(seen.worker, seen.payloads)
        found.publishers = len(self._lineages)
        for form in sorted(self._dynamo.forms):
            note(found.formats, _form_words(*form))
        if self._dynamo.forms:
            found.releases = {SourceType.DYNAMO.value: self._dynamo.ranges()}
        ordered = sorted(self._workers.values(), key=lambda one: (one.worker.worker, one.worker.rank or 0))
        found.workers = [seen.worker for seen in ordered]
        if self._others:
            self._warn(f"{self._others} of the messages {_WRONG_TYPE[self._config.type]}")
        elif found.refused_messages:
            self._warn(f"{found.refused_messages} events or messages would be refused, such as {found.refused[0]}")
        if self._lost:
            self._warn(f"{self._lost} messages were lost on their way to here")
        for one in on_clock(found.behind_ms):
            self._warn(one)
        return found

    def _finish_engine(self, worker: Worker, look: PayloadLook) -> None:
        """What was in the messages of an engine that a relay sent."""
        found, payloads = self.finding, look.finish()
        worker.releases, worker.media = payloads.releases, payloads.media
        worker.stored, worker.removed, worker.cleared = payloads.stored, payloads.removed, payloads.cleared
        found.refused_messages += payloads.refused_events
        for one in payloads.refused:
            note(found.refused, one)
        for one in payloads.form:
            note(found.formats, f"events of engines as {one}")
        if payloads.fits is False:
            engine = next(iter(worker.releases))
            self._warn(f"worker {worker.worker}: its events are those of {engine}, not of {worker.engine}")
        if worker.engine == SourceType.SGLANG:
            for one in on_old_sglang(worker.releases):
                self._warn(one)

    def _warn(self, sentence: str) -> None:
        note(self.finding.warnings, sentence)

    def _note_format(self, opened: Opened | Rejection | None, payload: bytes, received_ms: int | None) -> None:
        if not isinstance(opened, Opened):
            return
        self._dynamo.see(payload)
        if received_ms is not None and opened.published_ms:
            behind = received_ms - opened.published_ms
            before = self.finding.behind_ms
            self.finding.behind_ms = behind if before is None else min(behind, before)

    def _take(self, opening: Opening, in_order: bool) -> None:
        found = self.finding
        found.refused_messages += len(opening.rejections)
        for rejection in opening.rejections:
            note(found.refused, rejected(rejection))
        for delivery in opening.deliveries:
            self._deliver(delivery, in_order)

    def _deliver(self, delivery: Delivery, in_order: bool) -> None:
        key = (delivery.worker, delivery.rank)
        seen = self._workers.get(key)
        if seen is None:
            if len(self._workers) >= WORKERS_MAX:
                return
            seen = self._workers[key] = self._new(delivery)
        worker = seen.worker
        if delivery.lineage:
            self._lineages.add(delivery.lineage)
        if delivery.control in (Control.ALIVE, Control.GONE):
            worker.alive = worker.alive or delivery.control is Control.ALIVE
            return
        worker.messages += 1
        if in_order and delivery.seq >= 0 and not delivery.shared:
            worker.numbers = counted(worker.numbers, delivery.seq)
        if delivery.shared and in_order:
            self._count_shared(delivery)
        if delivery.control:
            return
        if seen.payloads is not None:
            seen.payloads.see(delivery.payload, None)
        elif seen.translator is not None:
            self._translate(seen, delivery.payload)

    def _count_shared(self, delivery: Delivery) -> None:
        """A publisher numbers the messages of all its workers in one sequence, and one message may be of several."""
        before = self._sequences.get(delivery.lineage)
        if before is not None and delivery.seq > before + 1:
            self._lost += delivery.seq - before - 1
        if before is None or delivery.seq > before:
            self._sequences[delivery.lineage] = delivery.seq

    def _new(self, delivery: Delivery) -> _Seen:
        config = self._config
        engine = delivery.engine or config.type.value
        name = delivery.worker.removeprefix(self._prefix)
        translator = translator_of(engine, config.options_of(delivery.worker, delivery.model), name, delivery.rank)
        worker = Worker(delivery.worker, delivery.rank, engine, delivery.model)
        if engine == SourceType.DYNAMO:
            return _Seen(worker, translator, None)
        return _Seen(worker, None, PayloadLook(SourceType(engine), config.tenant, translator))

    def _translate(self, seen: _Seen, payload: bytes) -> None:
        """As the daemon would: an event of another worker in the message is not this one's."""
        if seen.translator is None:
            return
        result = seen.translator.translate(payload, seen.facts)
        seen.facts = result.facts
        worker, found = seen.worker, self.finding
        worker.stored += result.stored_events
        worker.removed += result.removed_events
        worker.cleared += result.cleared_events
        found.refused_messages += len(result.rejections)
        for rejection in result.rejections:
            note(found.refused, rejected(rejection))
        for operation in result.operations:
            if isinstance(operation, StoreRun | RemoveBlocks):
                note(worker.media, str(operation.tier))


def _form_words(encoding: str, envelope: bool, array: bool) -> str:
    events = "many events each" if array else "one event each"
    return f"{encoding}, {events}" + (" in an envelope" if envelope else "")
