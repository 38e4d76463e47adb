"""What `kvcensus relay` publishes, where it keeps it until then, and what it makes of a stream that is missing."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import msgspec

from .errors import InvalidValue
from .nats_servers import NatsServers
from .section import Positive, PositiveBytes, Section

_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}")
_STREAM = re.compile(r"[^\s.*>/\\]{1,255}")
_GIB = 1 << 30
_MAX_REPLICAS = 5
"""As many as NATS knows."""


class Pipeline(StrEnum):
    """Whether several records of one worker may be on their way at a time."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class RelayConfig(Section, frozen=True):
    """A sidecar's way to the bus. Its streams are those of `[[sources]]`."""

    stream: str = ""
    """The JetStream stream that takes the messages. `kvcensus relay` needs one; `kvcensus run` relays nothing."""
    connection: NatsServers = NatsServers()
    """The servers, and how to reach them."""
    prefix: str = "kvevents"
    """First tokens of the subjects of messages: PREFIX.MODEL.WORKER.RANK."""
    alive_prefix: str = "kvalive"
    """The same for signs of life, which no stream keeps."""
    spool_dir: str = "kvcensus-spool"
    """Directory of what is not acknowledged yet, relative to the working directory. It must outlive the process."""
    spool_max_bytes: PositiveBytes = _GIB
    """Most to keep: 1 GiB, a quarter of an hour of 10,000 blocks/s. Beyond it the oldest go, and workers are fenced."""
    publish_window: Positive = 256
    """Records on their way at a time, published and not acknowledged: it bounds what has to be published again."""
    pipeline: Pipeline = Pipeline.AUTO
    """Several records of one worker at a time: `auto` where one server keeps the stream. Several may mix them up."""
    ack_timeout_ms: Positive = 5000
    """How long a server may take to acknowledge: a cluster elects a new leader in less."""
    heartbeat_ms: Positive = 5000
    """How often the bus is told that a worker's engine is there. Whoever follows is to wait for several."""
    create_stream: bool = False
    """Make the stream when it is missing. Off, because its limits are a matter of everybody who uses it."""
    stream_max_age_s: Annotated[int, msgspec.Meta(ge=0)] = 86400
    """Of a stream that is made: how long it keeps messages; 0: for ever. A day: an outage of its readers."""
    stream_max_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of a stream that is made: its limit; 0: none but that of the server."""
    stream_replicas: Annotated[int, msgspec.Meta(ge=1, le=_MAX_REPLICAS)] = 1
    """Of a stream that is made: servers that keep it. 3 in a cluster, so that one may be lost."""
    stream_duplicates_s: Positive = 120
    """Of a stream that is made: how long it knows message ids, to drop what comes twice. The servers' own default."""

    def __post_init__(self) -> None:
        if self.stream and not _STREAM.fullmatch(self.stream):
            raise InvalidValue("stream", f"{self.stream!r} is no name of a stream: no spaces, and none of . * > / \\")
        for key in ("prefix", "alive_prefix"):
            text = getattr(self, key)
            if not _PREFIX.fullmatch(text):
                raise InvalidValue(key, f"{text!r} is not tokens of A-Z a-z 0-9 _ - with dots between")
        if self.prefix == self.alive_prefix:
            raise InvalidValue("alive_prefix", "is that of the messages: the stream would keep signs of life")
        if not self.spool_dir:
            raise InvalidValue("spool_dir", "is empty")
        if self.stream_max_age_s and self.stream_duplicates_s > self.stream_max_age_s:
            raise InvalidValue("stream_duplicates_s", f"more than stream_max_age_s ({self.stream_max_age_s})")
