"""What a probe found, as data: what `kvcensus check --probe --json` prints. Pure.

Times are in ms. Lists of what peers say are cut at MOST_SHOWN: `words` says so.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .releases import Releases

MOST_SHOWN = 20
"""Of the values of a peer's choice: topics, media, adapters, workers."""


class Numbers(msgspec.Struct):
    """Sequence numbers of the messages seen. `missing` were left out; `backwards`: how often they did not go up."""

    first: int
    last: int
    missing: int = 0
    backwards: int = 0


class Payloads(msgspec.Struct):
    """What is in the messages of an engine. `hashes` are words, `lengths` those of arrays by type of event.

    `tenants` counts salts (they are secrets), `releases` may have written all of it. `refused` are the first rejections
    of what `type` makes of it.
    """

    messages: int = 0
    form: list[str] = []
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    fields: list[str] = []
    lengths: dict[str, int] = {}
    hashes: list[str] = []
    block_sizes: list[int] = []
    media: list[str] = []
    groups: list[str] = []
    adapters: list[str] = []
    tenants: int = 0
    ranks: list[int] = []
    releases: dict[str, list[Releases]] = {}
    fits: bool | None = None
    """Whether the releases are of the configured type; None when nothing tells."""
    refused: list[str] = []
    refused_events: int = 0
    behind_ms: int | None = None
    """Our clock minus the engine's, for the message that took the shortest; None without one."""


class Replay(msgspec.Struct):
    """What the replay socket answers. `answered_ms`: until the end marker of an empty range. `topic`: how it frames."""

    endpoint: str
    reached: bool = False
    answered_ms: int | None = None
    topic: bool | None = None
    oldest: int | None = None
    newest: int | None = None
    problem: str = ""


class StreamFinding(msgspec.Struct):
    """One stream of an engine. `publishers` counts connections made, of which bind may have several at once."""

    stream: str
    type: str
    endpoint: str
    bind: bool
    reached: bool = False
    connected_ms: int | None = None
    publishers: int = 0
    seconds: float = 0.0
    messages: int = 0
    bytes: int = 0
    malformed: int = 0
    frames: list[int] = []
    topics: list[str] = []
    numbers: Numbers | None = None
    payloads: Payloads = msgspec.field(default_factory=Payloads)
    replay: Replay | None = None
    problem: str = ""
    warnings: list[str] = []


class Worker(msgspec.Struct):
    """One worker of a bus."""

    worker: str
    rank: int | None
    engine: str
    model: str = ""
    messages: int = 0
    numbers: Numbers | None = None
    alive: bool = False
    """A sign of life came."""
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    media: list[str] = []
    releases: dict[str, list[Releases]] = {}


class JetStream(msgspec.Struct):
    """A stream of JetStream."""

    name: str
    subjects: list[str] = []
    first: int = 0
    last: int = 0
    messages: int = 0
    bytes: int = 0
    oldest_s: float | None = None
    replicas: int = 0
    leader: str = ""
    looked_at: int = 0


class BusFinding(msgspec.Struct):
    """One bus: NATS, or Dynamo's event plane over ZMQ. `reached` includes its subjects and its stream."""

    bus: str
    type: str
    transport: str
    endpoints: list[str]
    reached: bool = False
    connected_ms: int | None = None
    server: str = ""
    version: str = ""
    tls: bool | None = None
    identity: str = ""
    seconds: float = 0.0
    subscribed: list[str] = []
    messages: int = 0
    bytes: int = 0
    subjects: list[str] = []
    publishers: int = 0
    formats: list[str] = []
    releases: dict[str, list[Releases]] = {}
    workers: list[Worker] = []
    refused: list[str] = []
    refused_messages: int = 0
    behind_ms: int | None = None
    jetstream: JetStream | None = None
    problem: str = ""
    warnings: list[str] = []


class ProbeFindings(msgspec.Struct):
    """Everything. `reached`: every endpoint, server and stream that the configuration names answered."""

    seconds: float
    reached: bool
    streams: list[StreamFinding]
    buses: list[BusFinding]


def note(values: list[Any], value: Any) -> None:
    """Add a value that is new, as long as there is room."""
    if value not in values and len(values) <= MOST_SHOWN:
        values.append(value)
