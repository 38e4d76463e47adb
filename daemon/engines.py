"""Whose events this version can translate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvcensus.translators.dynamo import DynamoTranslator
from kvcensus.translators.dynamo_envelope import WORKER, DynamoAddress
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Translator, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from .config import SourceType

ENGINE_TRANSLATORS: Mapping[str, Callable[[TranslatorOptions], Translator]] = {
    SourceType.VLLM: VllmTranslator,
    SourceType.SGLANG: SglangTranslator,
}
"""By the type of a source. Dynamo's needs an address as well."""


def translator_of(engine: str, options: TranslatorOptions, name: str, rank: int | None) -> Translator | None:
    """The translator of one stream; None when this version has none for its engine.

    `name` is what the messages call the worker.
    """
    if engine != SourceType.DYNAMO:
        made = ENGINE_TRANSLATORS.get(engine)
        return made(options) if made else None
    number, _, domain = name.partition("@")
    try:
        address = DynamoAddress(int(number), rank or 0, domain or WORKER)
    except ValueError:
        return None
    return DynamoTranslator(options, address)
