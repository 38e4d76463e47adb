"""What messages say: operations as the index would apply them, what is refused, which numbers are missing. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from kvcensus.backends.model import Operation, RemoveBlocks, StoreRun
from kvcensus.translators.dynamo_envelope import FRAME_HEADER_BYTES, open_dynamo_frames
from kvcensus.translators.translation import Rejection, RejectReason, Translation, Translator, worker_id_of

from ..config import NatsConfig, SourceConfig
from ..engines import translator_of
from ..sources.opening import Opening, open_deliveries, open_message
from ..streams.delivery import Control, Delivery
from ..unpacked import unpacked
from .inbox import Incoming

WORKERS_MAX = 10_000
"""Workers that are told apart by their numbers and by what their translators remember."""

_FRAMES = 3
_SEQ_BYTES = 8
_ROOT_WORD = "root"


class Kind(StrEnum):
    """What is seen."""

    STORE = "store"
    REMOVE = "remove"
    CLEAR = "clear"
    REJECTED = "rejected"
    GAP = "gap"
    BACKWARDS = "backwards"
    LIFE = "life"
    FENCE = "fence"
    MESSAGE = "message"
    """A payload as it is."""


EVENTS = (Kind.STORE, Kind.REMOVE, Kind.CLEAR)


class Seen(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. Hashes are hex; `parent` is `root` at the start of a chain, null when it was not reported.

    Times are in ms since the Unix epoch. `missing` has the first and the last number of a gap; `field` and `reason`
    are those of a rejection; `payload` is JSON-able, or `payload_hex` are the bytes.
    """

    received_ms: int
    kind: Kind
    worker: str
    name: str = ""
    rank: int | None = None
    seq: int | None = None
    engine_ms: int = 0
    tier: str | None = None
    group: int | None = None
    model: str = ""
    adapter: str | None = None
    tenant: str = ""
    parent: str | None = None
    block_hashes: list[str] = []
    token_count: int = 0
    missing: tuple[int, int] | None = None
    reason: str = ""
    field: str = ""
    detail: str = ""
    payload: Any = None
    payload_hex: str = ""
    place: str = ""
    """The topic or subject."""


class _Known:
    """What is remembered of one worker."""

    def __init__(self, translator: Translator | None) -> None:
        self.translator = translator
        self.facts = 0


class Tap:
    """Decodes the messages of one source or bus."""

    def __init__(self, config: SourceConfig | NatsConfig, *, raw: bool = False) -> None:
        self._config = config
        self._raw = raw
        self._known: dict[tuple[str, int | None, str], _Known] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._ranks: dict[str, int | None] = {}
        if isinstance(config, SourceConfig):
            self._ranks = {stream.endpoint: stream.rank for stream in config.streams()}

    def see(self, message: Incoming) -> Iterator[Seen]:
        """Everything that one message says, in order."""
        config = self._config
        if isinstance(config, NatsConfig):
            payload = message.frames[0]
            opening = open_message(config.type, config.worker_prefix, message.subject, message.headers, payload)
            yield from self._opened(message, opening, message.subject, payload)
        elif config.is_bus:
            yield from self._dynamo_frames(message)
        else:
            yield from self._engine_frames(config, message)

    def _engine_frames(self, config: SourceConfig, message: Incoming) -> Iterator[Seen]:
        frames, rank = message.frames, self._ranks.get(message.endpoint)
        worker = worker_id_of(config.name, rank)
        if len(frames) != _FRAMES or len(frames[1]) != _SEQ_BYTES:
            lengths = ", ".join(str(len(frame)) for frame in frames)
            detail = f"not [topic, 8-byte number, payload], but frames of {lengths} bytes"
            yield Seen(message.received_ms, Kind.REJECTED, worker, config.name, rank, reason="payload", detail=detail)
            return
        topic, seq = frames[0].decode(errors="backslashreplace"), int.from_bytes(frames[1], "big")
        base = Seen(message.received_ms, Kind.MESSAGE, worker, config.name, rank, seq, place=topic)
        yield from self._numbered(base, (message.endpoint,))
        if self._raw:
            yield _with_payload(base, frames[2])
            return
        known = self._worker(config.name, rank, config.type.value, "")
        yield from self._translated(base, known, frames[2])

    def _dynamo_frames(self, message: Incoming) -> Iterator[Seen]:
        frames, prefix = message.frames, ""
        topic = frames[0].decode(errors="backslashreplace") if frames else ""
        opened = open_dynamo_frames(frames)
        if isinstance(opened, Rejection):
            yield from self._opened(message, Opening([], [opened]), topic, frames[-1] if frames else b"")
            return
        payload = frames[-1][FRAME_HEADER_BYTES:]
        yield from self._opened(message, open_deliveries(opened, payload, prefix), topic, payload)

    def _opened(self, message: Incoming, opening: Opening, place: str, payload: bytes) -> Iterator[Seen]:
        nobody = Seen(message.received_ms, Kind.MESSAGE, "", place=place)
        for rejection in opening.rejections:
            yield _rejected(nobody, rejection)
        for delivery in opening.deliveries:
            worker = worker_id_of(delivery.worker, delivery.rank)
            seq = delivery.seq if delivery.seq >= 0 else None
            base = Seen(message.received_ms, Kind.MESSAGE, worker, delivery.worker, delivery.rank, seq, place=place)
            yield from self._delivered(base, delivery)
        if self._raw and not opening.deliveries:
            yield _with_payload(nobody, payload)

    def _delivered(self, base: Seen, delivery: Delivery) -> Iterator[Seen]:
        if delivery.control is Control.LIFE:
            yield _changed(base, kind=Kind.LIFE, detail="another life of the worker began")
            return
        if delivery.control is Control.FENCE:
            yield _changed(base, kind=Kind.FENCE, detail="numbers up to this one are lost for good")
            return
        if delivery.control:
            return
        if base.seq is not None:
            who = () if delivery.shared else (delivery.worker, delivery.rank)
            yield from self._numbered(base, (delivery.lineage, delivery.epoch, *who), shared=delivery.shared)
        if self._raw:
            yield _with_payload(base, delivery.payload)
            return
        engine = delivery.engine or self._config.type.value
        known = self._worker(delivery.worker, delivery.rank, engine, delivery.model)
        yield from self._translated(base, known, delivery.payload)

    def _worker(self, name: str, rank: int | None, engine: str, model: str) -> _Known:
        key = (name, rank, engine)
        known = self._known.get(key)
        if known is None:
            config = self._config
            prefix = config.worker_prefix if isinstance(config, NatsConfig) else ""
            options = config.options_of(name, model)
            known = _Known(translator_of(engine, options, name.removeprefix(prefix), rank))
            if len(self._known) < WORKERS_MAX:
                self._known[key] = known
        return known

    def _translated(self, base: Seen, known: _Known, payload: bytes) -> Iterator[Seen]:
        if known.translator is None:
            yield _changed(base, kind=Kind.REJECTED, reason="payload", detail="this version does not translate it")
            return
        result = known.translator.translate(payload, known.facts)
        known.facts = result.facts
        for rejection in result.rejections:
            yield _rejected(base, rejection)
        if base.rank is not None and result.operations and result.rank != base.rank:
            detail = f"the rank is {result.rank}, this stream's is {base.rank}"
            yield _rejected(base, Rejection(RejectReason.RANK, detail, "data_parallel_rank"))
            return
        for operation in result.operations:
            yield _operation(base, operation, result)

    def _numbered(self, base: Seen, key: tuple[Any, ...], *, shared: bool = False) -> Iterator[Seen]:
        """Which numbers are missing before this one. A publisher's shared number may come once for each worker."""
        seq = base.seq
        assert seq is not None
        before = self._numbers.get(key)
        if before is not None or len(self._numbers) < WORKERS_MAX:
            self._numbers[key] = seq
        if before is None or (shared and seq == before):
            return
        if seq > before + 1:
            lost = seq - before - 1
            detail = f"{lost} messages did not come: {before + 1} to {seq - 1}"
            yield _changed(base, kind=Kind.GAP, missing=(before + 1, seq - 1), detail=detail)
        elif seq <= before:
            detail = f"the number before was {before}: the engine restarted, or a message came twice"
            yield _changed(base, kind=Kind.BACKWARDS, detail=detail)


def _operation(base: Seen, operation: Operation, result: Translation) -> Seen:
    rank = base.rank if base.rank is not None else result.rank
    base = _changed(base, worker=operation.worker_id, rank=rank, engine_ms=result.engine_ms, place="")
    if isinstance(operation, StoreRun):
        scope = operation.scope
        return _changed(
            base,
            kind=Kind.STORE,
            tier=operation.tier.value,
            group=operation.group,
            model=scope.model_id,
            adapter=scope.adapter_id,
            tenant=scope.tenant_id,
            parent=None if operation.parent is None else operation.parent.hex() or _ROOT_WORD,
            block_hashes=[one.hex() for one in operation.block_hashes],
            token_count=operation.token_count,
        )
    tier = operation.tier.value if operation.tier is not None else None
    if isinstance(operation, RemoveBlocks):
        hashes = [one.hex() for one in operation.block_hashes]
        return _changed(base, kind=Kind.REMOVE, tier=tier, group=operation.group, block_hashes=hashes)
    return _changed(base, kind=Kind.CLEAR, tier=tier)


def _rejected(base: Seen, rejection: Rejection) -> Seen:
    return _changed(
        base, kind=Kind.REJECTED, reason=rejection.reason.value, field=rejection.field, detail=rejection.detail
    )


def _with_payload(base: Seen, payload: bytes) -> Seen:
    """As msgpack, as JSON, or as hex."""
    value, problem = unpacked(payload)
    if payload[:1] in (b"{", b"["):
        try:
            return _changed(base, payload=msgspec.json.decode(payload))
        except msgspec.DecodeError:
            pass
    return _changed(base, payload_hex=payload.hex()) if problem else _changed(base, payload=value)


_changed = msgspec.structs.replace
