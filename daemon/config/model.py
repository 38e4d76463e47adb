"""The configuration: what there is to set, what it is when it is not set, and why.

A struct that exists is valid: what its types cannot say is checked when it is made, and raises InvalidValue.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import msgspec

from kvcensus.backends.lmdb import Durability
from kvcensus.backends.lmdb.files import MAP_SIZE
from kvcensus.backends.model import CacheTier
from kvcensus.translators.translation import ClearScope, HashJoin, TranslatorOptions, worker_id_of

from ..credentials import CredentialError, CurveKeys, open_to_others, read_curve_keys, read_tokens, server_tls
from .endpoints import ANY_IPV4, HIGHEST_PORT, Endpoint, is_loopback, listen_address, ports_overlap
from .errors import InvalidValue

_KIB = 1 << 10
_MIB = 1 << 20
_INT_MAX = (1 << 31) - 1
_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,200}")
_MAX_SOURCES = 1024
_MAX_RANKS = 1024

Positive = Annotated[int, msgspec.Meta(ge=1, le=_INT_MAX)]
NotNegative = Annotated[int, msgspec.Meta(ge=0, le=_INT_MAX)]
PositiveBytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class BackendKind(StrEnum):
    """Where the index lives."""

    LMDB = "lmdb"
    MEMORY = "memory"


class SourceType(StrEnum):
    """Whose events a source sends."""

    VLLM = "vllm"
    SGLANG = "sglang"


class OnCorrupt(StrEnum):
    """What happens at the start to an index that is damaged."""

    REFUSE = "refuse"
    REBUILD = "rebuild"


class OnFence(StrEnum):
    """What happens to the blocks of a worker that cannot be believed any more."""

    DROP = "drop"
    KEEP = "keep"


class OnHole(StrEnum):
    """What a message costs that the engine itself never published."""

    FENCE = "fence"
    TOLERATE = "tolerate"


class LogLevel(StrEnum):
    """What is worth a line."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """`auto`: readable on a terminal, JSON otherwise."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: a misspelt key is an error, never ignored."""


class HttpConfig(_Section, frozen=True):
    """The HTTP side."""

    listen: str = "127.0.0.1:9480"
    """HOST:PORT, "" to switch it off. Loopback, because nothing asks for a password. Port 0: any free one."""
    max_body_bytes: PositiveBytes = 4 * _MIB
    """Largest request body: 16,384 hashes of 32 bytes in hex are 1.1 MB, and a long scope is little."""
    max_hashes_per_query: Positive = 16384
    """Most hashes in one `match` or `locate`: a prompt of 262,144 tokens in blocks of 16."""
    max_snapshots: Positive = 2
    """Snapshots at a time: each takes a copy of the index on disk while it is read."""
    trusted_only: bool = False
    """Whether `match` leaves out workers that are not `fresh` when the question does not say."""
    token_file: str = ""
    """File of bearer tokens, one a line, of which every request needs one. "" for none. Read again when it changes."""
    metrics_need_token: bool = True
    """Whether /metrics needs one too: its labels name the workers, and Prometheus can send one."""
    tls_certificate: str = ""
    """PEM file of the certificate and its chain, "" for plain HTTP. Read again when it changes."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_client_ca: str = ""
    """PEM file of authorities: only clients with a certificate of one of them are let in. "" for any client."""
    max_connections: Positive = 512
    """Connections at a time: half of the 1,024 files that a process may usually open. An idle one makes room."""
    idle_timeout_ms: Positive = 60000
    """How long a connection may be open without a whole request header: a scrape a minute keeps its connection."""
    body_timeout_ms: Positive = 10000
    """How long the body of a request may take: 4 MiB in 10 s are 3.4 Mbit/s."""

    def __post_init__(self) -> None:
        self.address()
        self._check_credentials()

    def _check_credentials(self) -> None:
        if self.tls_key and not self.tls_certificate:
            raise InvalidValue("tls_certificate", "is needed with tls_key")
        if self.tls_certificate and not self.tls_key:
            raise InvalidValue("tls_key", "is needed with tls_certificate")
        if self.tls_client_ca and not self.tls_certificate:
            raise InvalidValue("tls_client_ca", "needs tls_certificate and tls_key")
        try:
            if self.token_file:
                read_tokens(self.token_file)
        except CredentialError as error:
            raise InvalidValue("token_file", str(error)) from error
        try:
            if files := self.tls_files():
                server_tls(*files)
        except CredentialError as error:
            at = "tls_key" if error.path == self.tls_key else "tls_certificate"
            raise InvalidValue("tls_client_ca" if error.path == self.tls_client_ca else at, str(error)) from error

    def tls_files(self) -> tuple[str, str, str] | None:
        """Certificate, key and authorities of clients, None without TLS."""
        return (self.tls_certificate, self.tls_key, self.tls_client_ca) if self.tls_certificate else None

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = [
            f"http.{key}: {path} can be read by others than its owner: chmod 600"
            for key, path in (("token_file", self.token_file), ("tls_key", self.tls_key))
            if path and open_to_others(path)
        ]
        address = self.address()
        if address is None or is_loopback(address[0]):
            return found
        if not self.token_file and not self.tls_client_ca:
            found.append(
                f"http.listen: {self.listen} is open to other machines, and nothing asks who they are: set token_file"
            )
        if not self.tls_certificate:
            found.append(
                f"http.listen: {self.listen} is open to other machines without TLS: set tls_certificate and tls_key"
            )
        return found

    def address(self) -> tuple[str, int] | None:
        """(host, port) to listen on, None when HTTP is off."""
        if not self.listen:
            return None
        try:
            return listen_address(self.listen)
        except ValueError as error:
            raise InvalidValue("listen", str(error)) from error


class IndexConfig(_Section, frozen=True):
    """The LMDB index."""

    durability: Durability = Durability.PROCESS
    """What a commit survives. `process`: the blocks themselves die with the machine, so syncing would only cost."""
    map_size_bytes: Annotated[int, msgspec.Meta(ge=_MIB, le=MAP_SIZE)] = MAP_SIZE
    """Address space reserved for the file, in bytes: no memory and no disk until used. Lower it under a ulimit -v."""
    on_corrupt: OnCorrupt = OnCorrupt.REFUSE
    """What happens to a damaged index at the start. `rebuild`: moved aside, and made again from the engines."""
    reclaim_rows: Positive = 5000
    """Rows looked at in one idle step of reclaiming cleared workers' space: a few milliseconds of the writer."""


class WriterConfig(_Section, frozen=True):
    """The one thread that writes the index, and the queue before it."""

    commit_max_blocks: Positive = 16384
    """A transaction closes after this many blocks: beyond it a larger one gains nothing."""
    commit_max_ms: NotNegative = 20
    """… or after this long, whichever comes first: what a commit adds to the lag."""
    queue_max_messages: Positive = 10000
    """Messages that wait for the writer before the sources stop reading: as many as an engine keeps for replay."""
    queue_max_bytes: PositiveBytes = 256 * _MIB
    """… or bytes, whichever is reached first: it bounds the memory of the process."""
    drain_deadline_ms: NotNegative = 10000
    """How long SIGTERM waits for the queue to be committed: well under the 30 s that Kubernetes gives."""


class QuarantineConfig(_Section, frozen=True):
    """What is kept of frames and events that were refused."""

    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 64 * _MIB
    """Most to keep, with 512 bytes of overhead each; the oldest go first. 0 keeps nothing."""
    max_age_hours: Positive = 168
    """Older ones go: a week is long enough to find out on Monday what happened on Friday, and to upgrade."""
    max_payload_bytes: PositiveBytes = _MIB
    """A larger one is cut, and cannot be tried again: a batch that stores 65,536 tokens is 0.3 MB."""

    def __post_init__(self) -> None:
        if 0 < self.max_bytes < _MIB:
            raise InvalidValue("max_bytes", f"less than {_MIB}, and not 0 for none")
        if 0 < self.max_bytes < 2 * self.max_payload_bytes:
            raise InvalidValue("max_payload_bytes", f"more than half of max_bytes ({self.max_bytes})")


class LogConfig(_Section, frozen=True):
    """What is logged to stderr, and how."""

    level: LogLevel = LogLevel.INFO
    """`info` has no line per message."""
    format: LogFormat = LogFormat.AUTO
    """`auto` is readable on a terminal and JSON in a pipe."""


class StreamConfig(msgspec.Struct, frozen=True):
    """One stream to follow: `stream` (also the worker's id) is NAME, or NAME/RANK with a rank."""

    stream: str
    source: str
    rank: int | None
    endpoint: str
    replay_endpoint: str


class SourceConfig(_Section, frozen=True):
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
    max_message_bytes: PositiveBytes = 64 * _MIB
    """A larger message breaks the connection: 16 times a batch that stores a million tokens."""
    replay_timeout_ms: Positive = 5000
    """How long to wait for the next frame of a replay. An idle engine answers within 100 ms, a busy one in seconds."""
    replay_attempts: Positive = 5
    """Requests for the same missing messages before they are given up: an engine may drop some of each reply."""
    hold_max_messages: Positive = 10000
    """Live messages held while a replay runs: as many as an engine keeps. Further ones are asked for again."""
    on_fence: OnFence = OnFence.DROP
    """What happens to a worker's blocks when messages are lost for good. `keep`: they stay, marked untrusted."""
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
    model: str = ""
    """Model name of the scope: the stream does not say it. Give it when one index serves several models."""
    tokenizer: str = ""
    """Tokenizer name of the scope. Default: that of the model."""
    tenant: str = ""
    """Tenant of blocks whose event names none (a cache salt does)."""
    count_copies: bool = True
    """Count the copies of a block, as vLLM holds and removes them. False with `kv_cache_report_mode="full"`."""
    clears: ClearScope = ClearScope.ALL
    """What AllBlocksCleared empties. `device` when an offloading tier outlives a reset of the prefix cache."""
    hash_join: HashJoin = HashJoin.AUTO
    """Whether byte hashes are cut to the 64 bits of integer ones: `auto` does once a stream has sent both."""
    media: dict[str, CacheTier] = {}
    """Further spellings of tiers: an unknown one is refused, never guessed."""
    bytes_per_block: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 0
    """Size of one block, 0 when unknown: the stream does not say it."""

    def __post_init__(self) -> None:
        endpoint = self._endpoint()
        if not self.name:
            msgspec.structs.force_setattr(self, "name", endpoint.default_name())
        if not self.tokenizer:
            msgspec.structs.force_setattr(self, "tokenizer", self.model)
        if not _NAME.fullmatch(self.name):
            raise InvalidValue("name", f"{self.name!r} is not 1 to 200 of the characters A-Z a-z 0-9 . _ : / @ -")
        if self.reconnect_max_ms < self.reconnect_min_ms:
            raise InvalidValue("reconnect_max_ms", f"less than reconnect_min_ms ({self.reconnect_min_ms})")
        self._check_replay(endpoint)
        self._check_curve()

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
        """The streams of this source, in the order of their ranks."""
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

    def translator_options(self) -> TranslatorOptions:
        """What the translator of each of its streams is told."""
        return TranslatorOptions(
            worker=self.name,
            model_id=self.model,
            tokenizer_id=self.tokenizer,
            tenant_id=self.tenant,
            count_copies=self.count_copies,
            clears=self.clears,
            hash_join=self.hash_join,
            media=self.media,
            bytes_per_block=self.bytes_per_block,
        )


class Config(_Section, frozen=True):
    """All of it."""

    data_dir: str = "kvcensus-data"
    """Directory of the index and the quarantine, relative to the working directory."""
    backend: BackendKind = BackendKind.LMDB
    """`lmdb` survives the process; `memory` is rebuilt from the engines at each start."""
    http: HttpConfig = HttpConfig()
    index: IndexConfig = IndexConfig()
    writer: WriterConfig = WriterConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    log: LogConfig = LogConfig()
    sources: Annotated[tuple[SourceConfig, ...], msgspec.Meta(max_length=_MAX_SOURCES)] = ()
    """One table per engine."""

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise InvalidValue("data_dir", "is empty")
        names: dict[str, int] = {}
        followed: dict[tuple[str, str], int] = {}
        for number, source in enumerate(self.sources):
            at = f"sources[{number}]"
            if source.max_message_bytes > self.writer.queue_max_bytes:
                raise InvalidValue(
                    f"{at}.max_message_bytes", "more than writer.queue_max_bytes: it could never be queued"
                )
            for stream in source.streams():
                if (other := followed.setdefault((stream.endpoint, source.topic), number)) != number:
                    raise InvalidValue(f"{at}.endpoint", f"{stream.endpoint} is already followed by sources[{other}]")
            if (other := names.setdefault(source.name, number)) != number:
                raise InvalidValue(f"{at}.name", f"{source.name!r} is already that of sources[{other}]")
        for number, source in enumerate(self.sources):
            worker, _, rank = source.name.rpartition("/")
            if rank.isdecimal() and worker in names:
                reason = f"{source.name!r} could be taken for rank {rank} of sources[{names[worker]}]"
                raise InvalidValue(f"sources[{number}].name", reason)

    def streams(self) -> Iterator[tuple[SourceConfig, StreamConfig]]:
        """Every stream to follow, with its source."""
        for source in self.sources:
            for stream in source.streams():
                yield source, stream

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = self.http.warnings() + [warning for source in self.sources for warning in source.warnings()]
        if not self.sources:
            return [*found, "no source is configured: nothing will be followed"]
        return found + [
            f"source {source.name}: {source.endpoint} connects to this machine; an engine that was given 0.0.0.0 "
            "connects too, so nobody binds: give the engine tcp://*:PORT, or set bind = true here"
            for source in self.sources
            if not source.bind and Endpoint.parse(source.endpoint).host == ANY_IPV4
        ]
