"""Whose events this version can translate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import Translator, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from .config import SourceType

TRANSLATORS: Mapping[str, Callable[[TranslatorOptions], Translator]] = {
    SourceType.VLLM: VllmTranslator,
    SourceType.SGLANG: SglangTranslator,
}
"""By the type of a source."""
