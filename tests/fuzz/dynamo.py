"""What is fuzzed of Dynamo's messages: opened, translated for everybody in them, and stored."""

from __future__ import annotations

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import StoreRun
from kvcensus.translators.dynamo import POSITION_MAX, DynamoTranslator
from kvcensus.translators.dynamo_envelope import DynamoAddress, Opened, open_dynamo, open_dynamo_frames
from kvcensus.translators.translation import Rejection, TranslatorOptions

from ..dynamo_captures import NAMES, messages_of
from .decoders import Target, check_translation
from .mutation import MSGPACK_LIES

_JSON_LIES = (b"null", b"[", b"]", b"{", b"}", b'"', b"-1", b"1e9", b"18446744073709551616", b'"cleared"', b"\xff")
_HELD_MAX = 10_000


def dynamo() -> Target:
    """A message has addresses, each of which gets operations that keep the backend's contract, or it is refused."""
    backend = MemoryBackend()

    def run(payload: bytes) -> None:
        for opened in (open_dynamo(payload), open_dynamo_frames([b"", payload[:8], payload[8:16], payload[16:]])):
            if isinstance(opened, Rejection):
                assert opened.raw is not None
                continue
            _check_opened(opened)
            for address in {DynamoAddress(7, 0), *opened.addresses[:8]}:
                one = DynamoTranslator(TranslatorOptions(address.name, "m", "m"), address)
                for wire in (payload, opened.inner):
                    translation = one.translate(wire, 0)
                    check_translation(translation, wire)
                    for operation in translation.operations:
                        if isinstance(operation, StoreRun):
                            assert operation.start_index is None or 0 < operation.start_index <= POSITION_MAX
                    backend.apply(translation.operations)
        if len(backend) > _HELD_MAX:
            backend.clear()

    seeds = {m.payload or m.frames[3][5:] for name in NAMES for m in messages_of(name)}
    return Target(sorted(seed for seed in seeds if len(seed) < 8 << 10), (*MSGPACK_LIES, *_JSON_LIES), run)


def _check_opened(opened: Opened) -> None:
    assert len(opened.addresses) == len(opened.event_ids) == len(set(opened.addresses))
    assert all(0 <= low <= high for low, high in opened.event_ids)
    assert opened.first in (0, 1)
    assert opened.lineage or opened.publisher_id is None
