"""One engine to follow: where it publishes, how long to wait for it, and what its stream does not say."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import msgspec

from kvcensus.translators.translation import worker_id_of

from ..credentials import CredentialError, CurveKeys, open_to_others, read_curve_keys
from .endpoints import HIGHEST_PORT, Endpoint, ports_overlap
from .errors import InvalidValue
from .section import MIB, NotNegative, Positive, PositiveBytes
from .translated import Translated

_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,200}")
_MAX_RANKS = 1024


class SourceType(StrEnum):
    """Whose events a source sends."""

    VLLM = "vllm"
    SGLANG = "sglang"
    DYNAMO = "dynamo"


class OnHole(StrEnum):
    """What a message costs that the engine itself never published."""

    FENCE = "fence"
    TOLERATE = "tolerate"


class StreamConfig(msgspec.Struct, frozen=True):
    """One stream to follow: `stream` (also the worker's id) is NAME, or NAME/RANK with a rank."""

    stream: str
    source: str
    rank: int | None
    endpoint: str
    replay_endpoint: str


class SourceConfig(Translated, frozen=True, kw_only=True):
    """One engine: a publisher, or one publisher per data-parallel rank."""

    endpoint: str
    """Where the engine publishes: tcp://HOST:PORT or ipc://PATH. With ranks, that of rank 0."""
    name: str = ""
    """The worker's name in every answer. Default: `host:port` of the endpoint, so that one flag is enough."""
    type: SourceType = SourceType.VLLM
    """Whose events these are."""
    replay_endpoint: str = ""
    """The engine's replay socket, "" for none. Without it a gap stays a gap. With ranks, that of rank 0."""
    bind: bool = False
    """Bind `endpoint` here, for an engine that connects (vLLM does unless its endpoint has `*`, `::` or ipc)."""
    topic: str = ""
    """Only topics that start with this. "" is every topic and the engines' own default."""
    ranks: Annotated[int, msgspec.Meta(ge=0, le=_MAX_RANKS)] = 0
    """The engine's data_parallel_size: n streams, rank r at port + r of both endpoints. 0: one stream without rank."""
    receive_hwm: Positive = 100000
    """Messages that ZMQ may hold for us: what the engines hold for a subscriber. Never unlimited (0)."""
    max_message_bytes: PositiveBytes = 64 * MIB
    """A larger message breaks the connection: 16 times a batch that stores a million tokens."""
    replay_timeout_ms: Positive = 5000
    """How long to wait for the next frame of a replay. An idle engine answers within 100 ms, a busy one in seconds."""
    replay_attempts: Positive = 5
    """Requests for the same missing messages before they are given up: an engine may drop some of each reply."""
    hold_max_messages: Positive = 10000
    """Live messages held while a replay runs: as many as an engine keeps. Further ones are asked for again."""
    on_hole: OnHole = OnHole.FENCE
    """What a message costs that was never published: its events happened, so `tolerate` may believe too much."""
    probe_ms: Positive = 10000
    """How long a stream may be silent before its engine is asked whether anything was missed."""
    stale_after_ms: Positive = 30000
    """A worker is `stale` after so long without a sign of life: three probes, or a lost connection at once."""
    lease_ms: NotNegative = 600000
    """A worker whose engine is gone for so long is cleared; 0: never. Ten minutes: longer than it takes to load."""
    silent_after_ms: Positive = 300000
    """A source that has not delivered anything so long after the start raises the silent-stream metric."""
    reconnect_min_ms: Positive = 100
    """First wait before reconnecting: a restarted engine is seen at once."""
    reconnect_max_ms: Positive = 5000
    """Longest wait between attempts, which double: a missing engine costs a connect every 5 s."""
    heartbeat_ms: NotNegative = 5000
    """Interval of ZMTP pings, 0 for none. A silent engine and a dead link look the same without them."""
    curve_server_key_file: str = ""
    """Certificate with the public key of the CURVE server at the endpoints. "" for none: engines do not speak CURVE."""
    curve_secret_key_file: str = ""
    """Certificate with our own keys, as `kvcensus keys` makes it."""

    def __post_init__(self) -> None:
        endpoint = self._endpoint()
        if not self.name:
            msgspec.structs.force_setattr(self, "name", endpoint.default_name())
        self.settle_tokenizer()
        if not _NAME.fullmatch(self.name):
            raise InvalidValue("name", f"{self.name!r} is not 1 to 200 of the characters A-Z a-z 0-9 . _ : / @ -")
        if self.reconnect_max_ms < self.reconnect_min_ms:
            raise InvalidValue("reconnect_max_ms", f"less than reconnect_min_ms ({self.reconnect_min_ms})")
        self._check_replay(endpoint)
        self._check_curve()
        if self.is_bus and (self.replay_endpoint or self.ranks):
            key = "replay_endpoint" if self.replay_endpoint else "ranks"
            raise InvalidValue(key, "does not go with type dynamo: its messages say their rank, and have no replay")

    @property
    def is_bus(self) -> bool:
        """Whether the messages say of which worker they are."""
        return self.type is SourceType.DYNAMO

    def cursor(self) -> str:
        """The name of the cursor of a bus."""
        return f"zmq:{self.name}"

    def _check_curve(self) -> None:
        if self.curve_secret_key_file and not self.curve_server_key_file:
            raise InvalidValue("curve_server_key_file", "is needed with curve_secret_key_file")
        if self.curve_server_key_file and not self.curve_secret_key_file:
            raise InvalidValue("curve_secret_key_file", "is needed with curve_server_key_file; kvcensus keys makes one")
        if self.curve_server_key_file and self.bind:
            raise InvalidValue(
                "curve_server_key_file", "with bind the engine would have to speak CURVE, which none does"
            )
        try:
            self.curve_keys()
        except CredentialError as error:
            own = error.path == self.curve_secret_key_file
            raise InvalidValue("curve_secret_key_file" if own else "curve_server_key_file", str(error)) from error

    def curve_keys(self) -> CurveKeys | None:
        """The keys in the files now, None without CURVE. Raises CredentialError."""
        if not self.curve_server_key_file:
            return None
        return read_curve_keys(self.curve_server_key_file, self.curve_secret_key_file)

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        path = self.curve_secret_key_file
        if not path or not open_to_others(path):
            return []
        return [f"source {self.name}: curve_secret_key_file: {path} can be read by others than its owner: chmod 600"]

    def _endpoint(self) -> Endpoint:
        endpoint = self._parsed("endpoint", self.endpoint)
        if not self.bind and endpoint.is_wildcard:
            raise InvalidValue(
                "endpoint", f"{endpoint} is no address to connect to; set bind = true if the engine connects"
            )
        if endpoint.port == 0 and not endpoint.path and not (self.bind and self.ranks == 0):
            raise InvalidValue("endpoint", "port 0 is no address to connect to")
        return endpoint

    def _check_replay(self, endpoint: Endpoint) -> None:
        if not self.replay_endpoint:
            return
        replay = self._parsed("replay_endpoint", self.replay_endpoint)
        if replay.is_wildcard or (replay.port == 0 and not replay.path):
            raise InvalidValue("replay_endpoint", f"{replay} is no address to connect to; give the engine's own")
        if ports_overlap(endpoint, replay, self.ranks):
            raise InvalidValue(
                "replay_endpoint",
                f"its ports meet those of {endpoint} with {max(self.ranks, 1)} rank(s); "
                f"the engine needs a replay port of at least {endpoint.port + max(self.ranks, 1)}",
            )

    def _parsed(self, key: str, text: str) -> Endpoint:
        try:
            endpoint = Endpoint.parse(text)
        except ValueError as error:
            raise InvalidValue(key, str(error)) from error
        if endpoint.path and self.ranks > 1:
            raise InvalidValue(key, "ipc has no port to add a rank to; configure each rank as a source of its own")
        if endpoint.port + max(self.ranks - 1, 0) > HIGHEST_PORT:
            raise InvalidValue(key, f"rank {self.ranks - 1} would be at a port above {HIGHEST_PORT}")
        return endpoint

    def streams(self) -> list[StreamConfig]:
        """The streams of this source, in the order of their ranks. A bus brings its own."""
        if self.is_bus:
            return []
        endpoint = Endpoint.parse(self.endpoint)
        replay = Endpoint.parse(self.replay_endpoint) if self.replay_endpoint else None
        ranks: list[int | None] = list(range(self.ranks)) if self.ranks else [None]
        return [
            StreamConfig(
                stream=worker_id_of(self.name, rank),
                source=self.name,
                rank=rank,
                endpoint=str(endpoint.of_rank(rank or 0)),
                replay_endpoint=str(replay.of_rank(rank or 0)) if replay else "",
            )
            for rank in ranks
        ]
