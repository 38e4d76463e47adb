"""Damage to what real engines sent: nothing raises, and each event that can be told apart is accounted for."""

from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import RejectReason, Translation, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..captures_reader import load_capture
from .sglang_families import ARRAYS, WITHOUT_MEDIUM

pack = msgspec.msgpack.encode


class Engine(NamedTuple):
    translator: type[VllmTranslator] | type[SglangTranslator]
    real: list[bytes]

    def translate(self, payload: bytes, facts: int = 0) -> Translation:
        return self.translator(TranslatorOptions("engine")).translate(payload, facts)


def _payloads(names: list[str], some: slice) -> list[bytes]:
    """Some payloads of captures, by their size."""
    return [
        message.payload
        for name in names
        for message in sorted(load_capture(name).messages, key=lambda message: len(message.payload))[some]
    ]


VLLM = _payloads(["vllm-0.9.2-clear", "vllm-0.12.0-byteshash", "vllm-0.32.0-swa", "vllm-0.32.0-lora"], slice(40, 70, 3))
SGLANG = _payloads(["sglang-0.5.23-evict", "sglang-0.5.23-page1", "sglang-0.5.23-clear"], slice(0, 30, 3))
OLD_SGLANG = [
    family.batch(msgspec.msgpack.decode(payload)[1]) for payload in SGLANG[::3] for family in (ARRAYS, WITHOUT_MEDIUM)
]
EACH = pytest.mark.parametrize(
    "engine",
    [Engine(VllmTranslator, VLLM), Engine(SglangTranslator, SGLANG + OLD_SGLANG)],
    ids=["vllm", "sglang"],
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def accounted(engine: Engine, payload: bytes) -> None:
    """Each event of a payload that can be told apart is an operation or a rejection."""
    translation = engine.translate(payload)
    try:
        _, events, *_ = msgspec.msgpack.decode(payload, type=tuple[Any, list[msgspec.Raw], msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    refused = {rejection.reason for rejection in translation.rejections if rejection.event is None}
    if refused & {RejectReason.RANK, RejectReason.PAYLOAD} and not translation.operations:
        return
    of_events = [rejection for rejection in translation.rejections if rejection.event is not None]
    assert len(translation.operations) + len(of_events) == len(events)


@EACH
@given(data=st.data())
def test_flipped_bits_raise_nothing_and_lose_no_event(engine: Engine, data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(engine.real)))
    for place in data.draw(st.lists(st.integers(0, len(damaged) * 8 - 1), min_size=1, max_size=4)):
        damaged[place // 8] ^= 1 << place % 8
    accounted(engine, bytes(damaged))


@EACH
@given(data=st.data())
def test_a_cut_payload_is_one_rejection(engine: Engine, data: st.DataObject) -> None:
    payload = data.draw(st.sampled_from(engine.real))
    translation = engine.translate(payload[: data.draw(st.integers(0, len(payload) - 1))])
    assert [rejection.reason for rejection in translation.rejections] == [RejectReason.PAYLOAD]
    assert translation.operations == []


@EACH
@given(payload=st.binary(max_size=60))
def test_noise_raises_nothing(engine: Engine, payload: bytes) -> None:
    accounted(engine, payload)
    accounted(engine, b"\x93\xcb" + bytes(8) + b"\x91" + payload + b"\x00")


@EACH
@given(value=values, data=st.data())
def test_an_event_put_between_leaves_its_siblings_alone(engine: Engine, value: Any, data: st.DataObject) -> None:
    payload = data.draw(st.sampled_from(engine.real))
    ts, events, rank = msgspec.msgpack.decode(payload)
    at = data.draw(st.integers(0, len(events)))
    damaged = engine.translate(pack([ts, [*events[:at], value, *events[at:]], rank]), 1)
    assert damaged.operations == engine.translate(payload, 1).operations
    assert [rejection.event for rejection in damaged.rejections] == [at]


@EACH
@given(value=values, data=st.data())
def test_a_field_replaced_by_anything_leaves_its_siblings_alone(
    engine: Engine, value: Any, data: st.DataObject
) -> None:
    payload = data.draw(st.sampled_from(engine.real))
    ts, events, rank = msgspec.msgpack.decode(payload)
    at = data.draw(st.integers(0, len(events) - 1))
    event = events[at]
    event[data.draw(st.sampled_from(list(event) if isinstance(event, dict) else range(len(event))))] = value
    whole, damaged = engine.translate(payload, 1), engine.translate(pack([ts, events, rank]), 1)
    siblings = [*whole.operations[:at], *whole.operations[at + 1 :]]
    if damaged.rejections:
        assert [rejection.event for rejection in damaged.rejections] == [at]
        assert damaged.operations == siblings
    else:
        assert [*damaged.operations[:at], *damaged.operations[at + 1 :]] == siblings
