"""A NATS bus to follow: whose events come over it, on which subjects, and how far it is trusted to keep them."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from .errors import InvalidValue
from .nats_servers import NatsServers
from .section import MIB, NotNegative, Positive, PositiveBytes
from .source import SourceType
from .translated import Translated

_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,200}")
_SUBJECT = re.compile(r"[^\s]{1,1024}")
_STREAM = re.compile(r"[^\s.*>/\\\\]{1,255}")


class NatsConfig(Translated, frozen=True, kw_only=True):
    """One bus. Its workers are found by what its messages say of themselves."""

    name: str
    """What the bus is called in answers, logs and metrics. Its workers have names of their own."""
    type: SourceType
    """Whose events come over it: `dynamo`, or `vllm` or `sglang` as a relay sends them."""
    connection: NatsServers = NatsServers()
    """The servers, and how to reach them."""
    subjects: tuple[Annotated[str, msgspec.Meta(max_length=1024)], ...] = ()
    """Subjects to follow, with wildcards. Default: every subject that Dynamo, or a relay, publishes on."""
    alive_subject: Annotated[str, msgspec.Meta(max_length=1024)] = "kvalive.*.*.*"
    """Where relays send their signs of life, "" for nowhere. Dynamo sends none."""
    stream: str = ""
    """The JetStream stream that keeps the messages; "": core NATS, where what is missed is lost."""
    worker_prefix: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """Put before the name of every worker: two buses may have workers of one name."""
    max_workers: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1024
    """Workers that are followed; those beyond it are refused. Each has its own row in every metric of a stream."""
    pending_max_messages: Positive = 65536
    """Messages that the client holds for us (core NATS), or asks for at a time: it drops what is beyond (core)."""
    pending_max_bytes: PositiveBytes = 64 * MIB
    """… or bytes, whichever is reached first: it bounds the memory of the process."""
    lease_ms: NotNegative = 600000
    """A worker whose relay is silent for so long is dropped; 0: never. Ten minutes: a model loads in less."""
    silent_lease_ms: NotNegative = 86400000
    """The same for workers that send no signs of life: a day, since an idle engine publishes nothing."""
    stale_after_ms: Positive = 30000
    """A worker is `stale` after so long without a sign of life from its relay, which sends one every 5 s."""
    poll_ms: Positive = 5000
    """How often a stream is asked what it still has (JetStream): how late an expired message is noticed."""

    def __post_init__(self) -> None:
        self.settle_tokenizer()
        if not _NAME.fullmatch(self.name):
            raise InvalidValue("name", f"{self.name!r} is not 1 to 200 of the characters A-Z a-z 0-9 . _ : @ -")
        named = [(f"subjects[{number}]", subject) for number, subject in enumerate(self.subjects)]
        for key, subject in [*named, *([("alive_subject", self.alive_subject)] if self.alive_subject else [])]:
            if not _SUBJECT.fullmatch(subject) or ".." in subject or subject.startswith(".") or subject.endswith("."):
                raise InvalidValue(key, f"{subject!r} is no subject of NATS")
        if self.stream and not _STREAM.fullmatch(self.stream):
            raise InvalidValue("stream", f"{self.stream!r} is no name of a stream: no spaces, and none of . * > / \\\\")

    def cursor(self) -> str:
        """The name of the cursor that says how far the stream has been read."""
        return f"nats:{self.name}"

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        return [f"nats {self.name}: {warning}" for warning in self.connection.warnings()]
