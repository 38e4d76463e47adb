"""Real servers for tests, of the operating system's package: one with what a test wants of it, or a cluster of three.

Every server listens on loopback and keeps its files in a directory of the test.
"""

from __future__ import annotations

import atexit
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvcensus.backends.registry import why_unusable
from tests.nats_servers import free_port

_START_S = 20.0
PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
CLI = shutil.which("valkey-cli") or shutil.which("redis-cli")
MISSING = "" if PROGRAM and CLI else "neither valkey-server nor redis-server is installed: apt-get install redis-server"
needs_server = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class ValkeyServer:
    """One server process. Its port and its files outlive a restart."""

    def __init__(self, directory: Path, settings: Mapping[str, str] | None = None, *, tls: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        ports = {"port": "0", "tls-port": str(self.port)} if tls else {"port": str(self.port)}
        self.settings = {**ports, "save": "", **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        assert PROGRAM is not None
        settings = {"bind": "127.0.0.1", "dir": str(self.directory), "daemonize": "no", **self.settings}
        arguments = [part for key, value in settings.items() for part in (f"--{key}", *(value.split(" ") or [""]))]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._ready():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "the server does not begin to answer"
            time.sleep(0.02)

    def _ready(self) -> bool:
        if self.settings["port"] == "0":
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.5).close()
            except OSError:
                return False
            return True
        try:
            with socket.create_connection(("127.0.0.1", self.port), 0.5) as probe:
                probe.settimeout(0.5)
                probe.sendall(b"PING\r\n")
                answer = probe.recv(64)
        except OSError:
            return False
        return answer.startswith((b"+PONG", b"-NOAUTH"))

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Let it end in order."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def pause(self) -> None:
        """It accepts connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def cli(self, *command: str) -> str:
        """What a command answers."""
        assert CLI is not None
        return subprocess.run(
            [CLI, "-p", str(self.port), *command], capture_output=True, text=True, check=True
        ).stdout.strip()


@contextmanager
def running_server(
    directory: Path, settings: Mapping[str, str] | None = None, *, tls: bool = False
) -> Iterator[ValkeyServer]:
    """One server, as long as it is needed. With `tls` it speaks nothing else."""
    server = ValkeyServer(directory, settings, tls=tls)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def running_cluster(directory: Path) -> Iterator[list[ValkeyServer]]:
    """Three masters without replicas, each with a third of the slots."""
    assert CLI is not None
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "appendonly": "yes"}
    nodes: list[ValkeyServer] = []
    try:
        for number in range(3):
            node = directory / f"node{number}"
            nodes.append(ValkeyServer(node, {**settings, "cluster-port": str(free_port())}))
        command = [CLI, "--cluster", "create", *(node.address for node in nodes), "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + _START_S
        while not all("cluster_state:ok" in node.cli("cluster", "info") for node in nodes):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@cache
def shared_server() -> ValkeyServer:
    """One server for whatever needs no other one, until the process ends. Who takes it empties it first."""
    directory = Path(tempfile.mkdtemp(prefix="valkey-"))
    server = ValkeyServer(directory)
    atexit.register(shutil.rmtree, directory)
    atexit.register(server.kill)
    return server


def with_server(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a backend, with an empty server if it is one that needs a server."""
    if name != "valkey":
        return dict(options)
    shared_server().cli("FLUSHALL")
    return {**options, "servers": [shared_server().address]}


def why_untested(name: str) -> str:
    """What is missing for tests of a backend, in one sentence; "" for nothing."""
    return why_unusable(name) or (MISSING if name == "valkey" else "")
