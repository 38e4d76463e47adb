"""Payloads that are translated together come to what each comes to in turn, or are not translated together at all."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from kvcensus.translators.dynamo import DynamoTranslator
from kvcensus.translators.dynamo_envelope import DynamoAddress
from kvcensus.translators.hashes import HASHES_MAX
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Together, Translation, Translator, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..captures_reader import capture_names, load_capture

pack = msgspec.msgpack.encode
TRANSLATORS = {"vllm": VllmTranslator, "sglang": SglangTranslator}
CAPTURES = [(engine, name) for engine in TRANSLATORS for name in capture_names(engine)]


def one_by_one(translator: Translator, payloads: Sequence[bytes], facts: int) -> Together | None:
    whole, times_ms = Translation([], [], facts=facts), []
    for payload in payloads:
        one = translator.translate(payload, whole.facts)
        if one.rejections:
            return None
        whole.operations += one.operations
        whole.stored_events += one.stored_events
        whole.removed_events += one.removed_events
        whole.cleared_events += one.cleared_events
        whole.facts, whole.rank = one.facts, one.rank
        whole.engine_ms, whole.hashes = one.engine_ms, one.hashes
        times_ms += [one.engine_ms] if one.engine_ms else []
    return Together(whole, times_ms)


@pytest.mark.parametrize(("engine", "name"), CAPTURES)
def test_a_capture_is_the_same_in_bursts_and_one_by_one(engine: str, name: str) -> None:
    options = TranslatorOptions("engine", "model")
    translator, other = TRANSLATORS[engine](options), TRANSLATORS[engine](options)
    payloads = [message.payload for message in load_capture(name).messages]
    facts, start, size = 0, 0, 1
    while start < len(payloads):
        burst = payloads[start : start + size]
        expected = one_by_one(other, burst, facts)
        assert translator.translate_all(burst, facts) == expected
        facts = expected.translation.facts if expected else other.translate(burst[-1], facts).facts
        start, size = start + size, size % 7 + 1


def stored(number: int) -> bytes:
    return pack([1.5, [["BlockStored", [number], None, [1] * 16, 16, None, "GPU"]], 0])


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(b"nonsense", id="a payload that is none"),
        pytest.param(pack([1.5, [["BlockFrobbed"]], 0]), id="an unknown event"),
        pytest.param(pack([1.5, [["BlockRemoved", [1], "tape"]], 0]), id="an unknown medium"),
        pytest.param(pack([-1.0, [], 0]), id="a time that is none"),
        pytest.param(pack([1.5, [], 1]), id="another rank"),
    ],
)
@pytest.mark.parametrize("translator", [VllmTranslator, SglangTranslator])
def test_what_has_to_be_looked_at_alone_is_not_translated_together(
    translator: type[VllmTranslator | SglangTranslator], odd: bytes
) -> None:
    made = translator(TranslatorOptions("engine"))
    assert made.translate_all([stored(1), stored(2)], 0) is not None
    for payloads in ([odd, stored(1)], [stored(1), odd], [stored(1), odd, stored(2)]):
        assert made.translate_all(payloads, 0) is None


def test_a_message_without_a_time_has_none_among_the_others() -> None:
    payloads = [pack([ts, [], 0]) for ts in (1.5, 0.0, 2.5)]
    together = VllmTranslator(TranslatorOptions("engine")).translate_all(payloads, 0)
    assert together is not None
    assert together.times_ms == [1500, 2500]


def test_the_bound_of_hashes_is_that_of_a_payload() -> None:
    most = pack([1.5, [["BlockRemoved", [7] * HASHES_MAX, "GPU"]], 0])
    together = VllmTranslator(TranslatorOptions("engine")).translate_all([most, most], 0)
    assert together is not None
    assert len(together.translation.operations) == 2


def test_a_burst_is_of_one_form_and_the_next_may_be_of_another() -> None:
    made = VllmTranslator(TranslatorOptions("engine"))
    in_map = pack([1.5, [{"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}], 0])
    assert made.translate_all([stored(1), in_map], 0) is None
    assert made.translate_all([in_map, in_map], 0) is not None
    assert made.translate_all([stored(1)], 0) is not None


def test_messages_of_dynamo_are_taken_one_by_one() -> None:
    made = DynamoTranslator(TranslatorOptions("7"), DynamoAddress(7, 0))
    assert made.translate_all([pack([])], 0) is None
