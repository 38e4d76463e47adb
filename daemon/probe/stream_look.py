"""What the messages of one engine say: which form, which releases, and what the configured type makes of them. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from kvcensus.backends.model import StoreRun
from kvcensus.translators.dynamo_envelope import open_dynamo_frames
from kvcensus.translators.translation import Rejection, Translator
from kvcensus.translators.wire import EVENTS_MAX, UNDECODABLE

from ..config import SourceConfig, SourceType
from ..engines import translator_of
from .findings import MOST_SHOWN, Numbers, Payloads, StreamFinding, note
from .releases import Candidates, Event, event_of, of_framing, ranges

LOOKED_AT_MAX = 2_000
"""Messages, and ten times as many events, that are taken apart; later ones are only counted: all look alike."""

_SKEW_MS = 1_000
_SEQ_BYTES = 8
_LOADS = "LoadStat"
"""What SGLang publishes on a socket of its own, with the same frames."""


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    rank: msgspec.Raw = msgspec.Raw()
    """Empty where the batch has only two items."""


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode


class PayloadLook:
    """Takes the payloads of one engine."""

    def __init__(self, engine: SourceType, tenant: str, translator: Translator | None) -> None:
        """`engine` and `tenant` are those of the configuration, `translator` is the one that the daemon would use."""
        self._type = engine
        self._tenant = tenant
        self._translator = translator
        self._facts = 0
        self._candidates = Candidates()
        self._signs: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self.found = Payloads()
        self.notes: list[str] = []
        """What is odd about the messages, one sentence each."""

    def see(self, payload: bytes, received_ms: int | None) -> None:
        """One payload. `received_ms` is our clock; None when it was published some time ago."""
        found = self.found
        found.messages += 1
        if found.messages > LOOKED_AT_MAX or self._candidates.seen > 10 * LOOKED_AT_MAX:
            return
        try:
            batch = _decode_batch(payload)
        except UNDECODABLE:
            self._not_a_batch(payload)
            return
        has_rank = bool(bytes(batch.rank))
        for packed in batch.events[:EVENTS_MAX]:
            event = event_of(packed)
            if event is not None:
                self._candidates.see(event, has_rank)
                self._see_event(event)
        self._translate(payload, received_ms)

    def finish(self, topic: bool | None = None) -> Payloads:
        """What was seen. `topic` is how the replay socket frames its answers, None if that is not known."""
        found = self.found
        found.hashes = [*map(_sign_words, [self._signs] if self._signs["integers"] else [])]
        found.hashes += sorted(name for name in self._signs if name.endswith("bytes"))
        found.tenants = len(self._tenants)
        if not self._candidates.seen:
            return found
        left = self._candidates.left
        if topic is not None and left:
            narrowed = of_framing(left, topic)
            if not narrowed:
                with_or_without = "with" if topic else "without"
                self.notes.append(
                    f"the replay socket frames its answers {with_or_without} the topic, which no release does that "
                    "writes such events: something other than the engine answers there, or there"
                )
            left = narrowed or left
        found.releases = ranges(left)
        if left:
            found.fits = any(one.engine is self._type for one in left)
        return found

    def _not_a_batch(self, payload: bytes) -> None:
        self.found.refused_events += 1
        try:
            decoded = msgspec.msgpack.decode(payload)
        except (TypeError, *UNDECODABLE):
            decoded = None
        if isinstance(decoded, list) and decoded and decoded[0] == _LOADS:
            reason = "load statistics of SGLang, which has them on a socket or topic of their own: no KV events"
        else:
            reason = "no msgpack batch [time, events, rank]"
        note(self.found.refused, f"payload: {reason}")

    def _see_event(self, event: Event) -> None:
        found, fields = self.found, event.fields
        note(found.form, "arrays" if event.length else "maps")
        if event.length:
            found.lengths[event.kind] = max(event.length, found.lengths.get(event.kind, 0))
        for name in fields:
            if name != "type":
                note(found.fields, name)
        for one in event.hashes[:MOST_SHOWN]:
            self._see_hash(one)
        if isinstance(fields.get("medium"), str):
            note(found.media, fields["medium"])
        if event.kind == "BlockStored":
            found.stored += 1
            self._see_stored(fields)
        elif event.kind == "BlockRemoved":
            found.removed += 1
        else:
            found.cleared += 1

    def _see_hash(self, hashed: object) -> None:
        if isinstance(hashed, int):
            self._signs["integers"] += 1
            self._signs["negative" if hashed < 0 else "large" if hashed >= 1 << 63 else "small"] += 1
        elif isinstance(hashed, bytes):
            self._signs[f"{len(hashed)} bytes"] += 1

    def _see_stored(self, fields: dict[str, Any]) -> None:
        found = self.found
        block_size, adapter, number = fields.get("block_size"), fields.get("lora_name"), fields.get("lora_id")
        group, kind = fields.get("group_idx"), fields.get("kv_cache_spec_kind")
        if isinstance(block_size, int):
            note(found.block_sizes, block_size)
        if isinstance(adapter, str):
            note(found.adapters, adapter)
        elif isinstance(number, int):
            note(found.adapters, str(number))
        if isinstance(group, int):
            note(found.groups, f"{group} {kind}" if isinstance(kind, str) else str(group))

    def _translate(self, payload: bytes, received_ms: int | None) -> None:
        """As the daemon would."""
        if self._translator is None:
            return
        found = self.found
        result = self._translator.translate(payload, self._facts)
        self._facts = result.facts
        found.refused_events += len(result.rejections)
        for rejection in result.rejections:
            note(found.refused, rejected(rejection))
        if result.rank is not None:
            note(found.ranks, result.rank)
        for operation in result.operations:
            if isinstance(operation, StoreRun) and operation.scope.tenant_id != self._tenant:
                self._tenants.add(operation.scope.tenant_id)
        if received_ms is not None and result.engine_ms:
            behind = received_ms - result.engine_ms
            found.behind_ms = behind if found.behind_ms is None else min(behind, found.behind_ms)


class StreamLook:
    """Takes the messages of one stream as they come."""

    def __init__(self, finding: StreamFinding, source: SourceConfig, rank: int | None) -> None:
        self.finding = finding
        self._rank = rank
        self._type = source.type
        translator = translator_of(source.type, source.options_of(source.name), source.name, rank)
        self.payloads = PayloadLook(source.type, source.tenant, translator)
        self._others: Counter[str] = Counter()

    def live(self, frames: list[bytes], received_ms: int) -> None:
        """One message of the live socket."""
        found = self.finding
        found.messages += 1
        found.bytes += sum(map(len, frames))
        note(found.frames, len(frames))
        if len(frames) != 3 or len(frames[1]) != _SEQ_BYTES:
            found.malformed += 1
            if not isinstance(open_dynamo_frames(frames), Rejection):
                self._others["dynamo"] += 1
            return
        note(found.topics, frames[0].decode(errors="backslashreplace"))
        found.numbers = counted(found.numbers, int.from_bytes(frames[1], "big"))
        self.payloads.see(frames[2], received_ms)

    def replayed(self, payload: bytes) -> None:
        """One message of the replay socket: it tells the form, too, and an idle engine gives no other."""
        self.payloads.see(payload, None)

    def finish(self) -> StreamFinding:
        """Everything, with what is odd about it."""
        found = self.finding
        replay = found.replay
        found.payloads = self.payloads.finish(replay.topic if replay is not None else None)
        found.warnings += self._on_messages() + self.payloads.notes + on_payloads(found.payloads, self._type)
        ranks = found.payloads.ranks
        expected = self._rank if self._rank is not None else next(iter(ranks), None)
        if wrong := [one for one in ranks if one != expected]:
            found.warnings.append(
                f"messages of rank {', '.join(map(str, wrong))} on the stream of rank {expected} would be refused: "
                "see ranks and the ports"
            )
        return found

    def _on_messages(self) -> list[str]:
        found, warnings = self.finding, []
        if self._others["dynamo"]:
            warnings.append('the messages are of Dynamo\'s event plane: set type = "dynamo"')
        elif found.malformed:
            warnings.append(f"{found.malformed} messages are not [topic, 8-byte number, payload]: no engine sends such")
        if found.numbers and found.numbers.missing:
            warnings.append(f"{found.numbers.missing} messages were lost on their way to here")
        if found.numbers and found.numbers.backwards:
            warnings.append("the numbers went backwards: the engine restarted, or two publish here")
        return warnings


def on_payloads(found: Payloads, wanted: SourceType) -> list[str]:
    """What is odd about what an engine sends."""
    warnings = []
    if found.fits is False:
        engine = next(iter(found.releases))
        warnings.append(f'the events are those of {engine}, and type is "{wanted.value}": set type = "{engine}"')
    elif found.fits is None and found.stored + found.removed + found.cleared:
        warnings.append("no release that is known here writes all of these events: a later one, or several publishers")
    if wanted is SourceType.SGLANG:
        warnings += on_old_sglang(found.releases)
    if found.refused_events:
        warnings.append(f"{found.refused_events} events or messages would be refused, such as {found.refused[0]}")
    return warnings + on_clock(found.behind_ms)


def on_clock(behind_ms: int | None) -> list[str]:
    """A word on clocks that differ."""
    if behind_ms is None or abs(behind_ms) <= _SKEW_MS:
        return []
    return ["the clocks differ by more than a second: so do the ages and lags that are reported"]


def on_old_sglang(releases: dict[str, list[tuple[str, str]]]) -> list[str]:
    """A word on SGLang before 0.5.7, when it may be one."""
    if any(first == "0.5.6" for first, _ in releases.get("sglang", [])):
        return [
            "SGLang 0.5.6 to 0.5.6.post2 look like later releases and report removals that are none: "
            "make sure that this is 0.5.7 or later"
        ]
    return []


def counted(numbers: Numbers | None, seq: int) -> Numbers:
    """The numbers seen so far and one more."""
    if numbers is None:
        return Numbers(seq, seq)
    if seq <= numbers.last:
        numbers.backwards += 1
    else:
        numbers.missing += seq - numbers.last - 1
    numbers.last = seq
    return numbers


def rejected(rejection: Rejection) -> str:
    """A rejection in one line."""
    return f"{rejection.reason.value}: {rejection.detail}"[:300]


def _sign_words(signs: Counter[str]) -> str:
    if signs["negative"] and signs["large"]:
        return "integers, signed and unsigned"
    return "integers, signed" if signs["negative"] else "integers, unsigned" if signs["large"] else "integers"
