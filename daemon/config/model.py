"""The configuration: what there is to set, what it is when it is not set, and why.

A struct that exists is valid: what its types cannot say is checked when it is made, and raises InvalidValue.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvcensus.backends.lmdb import Durability
from kvcensus.backends.lmdb.files import MAP_SIZE
from kvcensus.backends.registry import why_unusable

from ..credentials import CredentialError, open_to_others, read_tokens, server_tls
from .endpoints import ANY_IPV4, Endpoint, is_loopback, listen_address
from .errors import InvalidValue
from .filesystem import FilesystemConfig
from .nats import NatsConfig
from .relay import RelayConfig
from .rocksdb import RocksdbConfig
from .section import MIB, NotNegative, Positive, PositiveBytes, Section
from .shadow import ShadowConfig
from .source import SourceConfig, StreamConfig
from .valkey import ValkeyConfig

_MAX_SOURCES = 1024
_MAX_BUSES = 64


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


class OnCorrupt(StrEnum):
    """What happens at the start to an index that is damaged."""

    REFUSE = "refuse"
    REBUILD = "rebuild"


class HttpConfig(Section, frozen=True):
    """The HTTP side."""

    listen: str = "127.0.0.1:9480"
    """HOST:PORT, "" to switch it off. Loopback, because nothing asks for a password. Port 0: any free one."""
    max_body_bytes: PositiveBytes = 4 * MIB
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


class IndexConfig(Section, frozen=True):
    """The LMDB index."""

    durability: Durability = Durability.PROCESS
    """What a commit survives. `process`: the blocks themselves die with the machine, so syncing would only cost."""
    map_size_bytes: Annotated[int, msgspec.Meta(ge=MIB, le=MAP_SIZE)] = MAP_SIZE
    """Address space reserved for the file, in bytes: no memory and no disk until used. Lower it under a ulimit -v."""
    on_corrupt: OnCorrupt = OnCorrupt.REFUSE
    """What happens to a damaged index at the start. `rebuild`: moved aside, and made again from the engines."""
    reclaim_rows: Positive = 5000
    """Rows looked at in one idle step of reclaiming cleared workers' space: a few milliseconds of the writer."""


class WriterConfig(Section, frozen=True):
    """The one thread that writes the index, and the queue before it."""

    commit_max_blocks: Positive = 16384
    """A transaction closes after this many blocks: beyond it a larger one gains nothing."""
    commit_max_ms: NotNegative = 20
    """… or after this long, whichever comes first: what a commit adds to the lag."""
    queue_max_messages: Positive = 10000
    """Messages that wait for the writer before the sources stop reading: as many as an engine keeps for replay."""
    queue_max_bytes: PositiveBytes = 256 * MIB
    """… or bytes, whichever is reached first: it bounds the memory of the process."""
    drain_deadline_ms: NotNegative = 10000
    """How long SIGTERM waits for the queue to be committed: well under the 30 s that Kubernetes gives."""


class QuarantineConfig(Section, frozen=True):
    """What is kept of frames and events that were refused."""

    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 64 * MIB
    """Most to keep, with 512 bytes of overhead each; the oldest go first. 0 keeps nothing."""
    max_age_hours: Positive = 168
    """Older ones go: a week is long enough to find out on Monday what happened on Friday, and to upgrade."""
    max_payload_bytes: PositiveBytes = MIB
    """A larger one is cut, and cannot be tried again: a batch that stores 65,536 tokens is 0.3 MB."""

    def __post_init__(self) -> None:
        if 0 < self.max_bytes < MIB:
            raise InvalidValue("max_bytes", f"less than {MIB}, and not 0 for none")
        if 0 < self.max_bytes < 2 * self.max_payload_bytes:
            raise InvalidValue("max_payload_bytes", f"more than half of max_bytes ({self.max_bytes})")


class LogConfig(Section, frozen=True):
    """What is logged to stderr, and how."""

    level: LogLevel = LogLevel.INFO
    """`info` has no line per message."""
    format: LogFormat = LogFormat.AUTO
    """`auto` is readable on a terminal and JSON in a pipe."""


class Config(Section, frozen=True):
    """All of it."""

    data_dir: str = "kvcensus-data"
    """Directory of the index and the quarantine, relative to the working directory."""
    backend: str = "lmdb"
    """`lmdb` survives the process; `memory` is rebuilt from the engines at each start. Others: docs/reference."""
    http: HttpConfig = HttpConfig()
    index: IndexConfig = IndexConfig()
    writer: WriterConfig = WriterConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    log: LogConfig = LogConfig()
    relay: RelayConfig = RelayConfig()
    shadow: ShadowConfig = ShadowConfig()
    filesystem: FilesystemConfig = FilesystemConfig()
    rocksdb: RocksdbConfig = RocksdbConfig()
    valkey: ValkeyConfig = ValkeyConfig()
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """For a backend from another package: whatever it says that it takes."""
    sources: Annotated[tuple[SourceConfig, ...], msgspec.Meta(max_length=_MAX_SOURCES)] = ()
    """One table per engine."""
    nats: Annotated[tuple[NatsConfig, ...], msgspec.Meta(max_length=_MAX_BUSES)] = ()
    """One table per bus."""

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise InvalidValue("data_dir", "is empty")
        if problem := why_unusable(self.backend):
            raise InvalidValue("backend", problem)
        if self.shadow.backend and Path(self.shadow.data_dir).absolute() == Path(self.data_dir).absolute():
            raise InvalidValue("shadow.data_dir", "is that of the index")
        names: dict[str, int] = {}
        followed: dict[tuple[str, str], int] = {}
        for number, source in enumerate(self.sources):
            at = f"sources[{number}]"
            if source.max_message_bytes > self.writer.queue_max_bytes:
                raise InvalidValue(
                    f"{at}.max_message_bytes", "more than writer.queue_max_bytes: it could never be queued"
                )
            for endpoint in [source.endpoint] if source.is_bus else [one.endpoint for one in source.streams()]:
                if (other := followed.setdefault((endpoint, source.topic), number)) != number:
                    raise InvalidValue(f"{at}.endpoint", f"{endpoint} is already followed by sources[{other}]")
            if (other := names.setdefault(source.name, number)) != number:
                raise InvalidValue(f"{at}.name", f"{source.name!r} is already that of sources[{other}]")
        self._check_names(names)

    def _check_names(self, names: dict[str, int]) -> None:
        """No two of a name, and none that could be taken for a rank of another. `names` are those of the sources."""
        buses: set[str] = set()
        for number, bus in enumerate(self.nats):
            if bus.name in names or bus.name in buses:
                raise InvalidValue(f"nats[{number}].name", f"{bus.name!r} is already that of another source or bus")
            buses.add(bus.name)
        places = {bus.cursor(): bus.name for bus in self.buses()}
        for number, source in enumerate(self.sources):
            if bus_name := places.get(source.name):
                reason = f"{source.name!r} is what the place in the stream of bus {bus_name} is stored under"
                raise InvalidValue(f"sources[{number}].name", reason)
            worker, _, rank = source.name.rpartition("/")
            if rank.isdecimal() and worker in names:
                reason = f"{source.name!r} could be taken for rank {rank} of sources[{names[worker]}]"
                raise InvalidValue(f"sources[{number}].name", reason)

    def streams(self) -> Iterator[tuple[SourceConfig, StreamConfig]]:
        """Every stream to follow, with its source."""
        for source in self.sources:
            for stream in source.streams():
                yield source, stream

    def backend_options(self) -> dict[str, Any]:
        """What the backend is opened with: its own table, or `[options]` for one that has none here."""
        table = getattr(self, self.backend, None)
        return msgspec.to_builtins(table) if isinstance(table, Section) else dict(self.options)

    def buses(self) -> list[SourceConfig | NatsConfig]:
        """Everything to follow whose messages say of which worker they are."""
        return [*(source for source in self.sources if source.is_bus), *self.nats]

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant, one sentence each."""
        found = self.http.warnings() + [warning for source in self.sources for warning in source.warnings()]
        if self.backend == "valkey":
            found += [f"valkey.{warning}" for warning in self.valkey.warnings()]
        found += [warning for bus in self.nats for warning in bus.warnings()]
        if not self.sources and not self.nats:
            return [*found, "no source is configured: nothing will be followed"]
        return found + [
            f"source {source.name}: {source.endpoint} connects to this machine; an engine that was given 0.0.0.0 "
            "connects too, so nobody binds: give the engine tcp://*:PORT, or set bind = true here"
            for source in self.sources
            if not source.bind and Endpoint.parse(source.endpoint).host == ANY_IPV4
        ]
