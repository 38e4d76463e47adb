"""What a translator gives back: operations for the index, and what it had to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from kvcensus.backends.model import CacheTier, Operation


class RejectReason(StrEnum):
    """Why a payload, or one event of it, was refused. A closed set: each is a metric label."""

    PAYLOAD = "payload"
    """The payload is not the msgpack of a batch: truncated, of another shape, of wrong types."""
    EVENT_TYPE = "event_type"
    """An event of a kind that this version does not know."""
    EVENT_SHAPE = "event_shape"
    """An event whose fields are missing or of the wrong type."""
    BLOCK_HASH = "block_hash"
    """A block hash that is no 64-bit integer and no byte string of acceptable length."""
    MEDIUM = "medium"
    """A medium that is no known spelling of a tier. It never becomes a default tier."""
    RANK = "rank"
    """A data-parallel rank that is not that of the stream."""
    RELEASE = "release"
    """An event of an engine's release whose events do not say what an index must know."""


class Rejection(msgspec.Struct, frozen=True):
    """A refused event, or what is wrong with the payload as a whole when `event` is None.

    `event` is the position in the batch, `field` the path of what is wrong, `detail` one sentence, `raw` the refused
    bytes.
    """

    reason: RejectReason
    detail: str
    field: str = ""
    event: int | None = None
    raw: bytes = b""


class Translation(msgspec.Struct, gc=False):
    """One payload as operations, in the order of its events.

    `engine_ms` is the engine's clock in ms since the Unix epoch, `rank` its data-parallel rank or None.
    `stored_events`, `removed_events` and `cleared_events` count events, `hashes` block hashes. `facts` is what the
    translator remembers of the stream now.
    """

    operations: list[Operation]
    rejections: list[Rejection]
    engine_ms: int = 0
    rank: int | None = None
    stored_events: int = 0
    removed_events: int = 0
    cleared_events: int = 0
    facts: int = 0
    hashes: int = 0


class Together(NamedTuple):
    """Several payloads as if they were one, with the engine's clock at each that tells it, in ms since the epoch."""

    translation: Translation
    times_ms: list[int]


class ClearScope(StrEnum):
    """What AllBlocksCleared clears: every tier of the worker, or only its device memory."""

    ALL = "all"
    DEVICE = "device"


class HashJoin(StrEnum):
    """Whether byte-string hashes are cut to the 64-bit pattern of integer ones.

    `auto`: once the stream has shown integer hashes. `never`: they stay as they are. `always`: from the first.
    """

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class TranslatorOptions(msgspec.Struct, frozen=True):
    """What the wire does not say about one source, from its configuration.

    `worker` names the worker, without rank. `media` adds spellings of tiers. `bytes_per_block` is in bytes, 0: unknown.
    """

    worker: str
    model_id: str = ""
    tokenizer_id: str = ""
    tenant_id: str = ""
    count_copies: bool = True
    clears: ClearScope = ClearScope.ALL
    hash_join: HashJoin = HashJoin.AUTO
    media: dict[str, CacheTier] = {}
    bytes_per_block: int = 0


class Translator(Protocol):
    """Turns payloads of one stream into operations. Pure: the same payload and facts give the same translation."""

    def translate(self, payload: bytes, facts: int) -> Translation:
        """Translate one payload. Never raises for what a peer sent: that becomes rejections."""

    def translate_all(self, payloads: Sequence[bytes], facts: int) -> Together | None:
        """Translate payloads as `translate` does each in turn. None where they have to be taken one by one.

        They have when something is refused, or when they are of several ranks.
        """


def worker_id_of(worker: str, rank: int | None) -> str:
    """NAME for a stream without rank, NAME/RANK with one."""
    return worker if rank is None else f"{worker}/{rank}"
