"""The same through real sockets: a publisher process, a daemon process, and questions over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq

from .frames import Workload, make_workload

_WAIT_S = 300.0
_POLL_S = 0.02


class Daemon(msgspec.Struct, frozen=True):
    """A running daemon: its process id and HTTP port."""

    pid: int
    port: int


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def running_daemon(endpoint: str, backend: str, directory: Path) -> Iterator[Daemon]:
    """`kvcensus run --engine ENDPOINT` as a process of its own."""
    with _daemon(["--engine", endpoint, "--worker", "bench"], backend, directory) as daemon:
        yield daemon


@contextmanager
def configured_daemon(config: Path, backend: str, directory: Path) -> Iterator[Daemon]:
    """`kvcensus run --config FILE` as a process of its own."""
    with _daemon(["--config", str(config)], backend, directory) as daemon:
        yield daemon


@contextmanager
def _daemon(what: list[str], backend: str, directory: Path) -> Iterator[Daemon]:
    port = free_port()
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "run", *what]
    command += ["--backend", backend, "--data-dir", str(directory), "--http", f"127.0.0.1:{port}"]
    with Path(f"{directory}.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait_until_alive(process, port)
            yield Daemon(process.pid, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_until_alive(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(port, "/livez")
        except OSError:
            time.sleep(_POLL_S)
        else:
            return
    raise RuntimeError("the daemon did not start")


def get(port: int, path: str) -> bytes:
    """The body of one GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def rss_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process in MB: (its own, pages of mapped files)."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Rss")
    )
    own = int(fields["RssAnon"].split()[0])
    files = int(fields["RssFile"].split()[0])
    return own / 1000, files / 1000


class Publisher:
    """A process that publishes a workload once told to, at `blocks_per_s` or as fast as it can."""

    def __init__(self, blocks: int, blocks_per_message: int, blocks_per_s: float = 0.0) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "kvcensus.daemon.bench.processes"]
        command += [self.endpoint, str(blocks), str(blocks_per_message), str(blocks_per_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_ready(self) -> None:
        """Wait until its messages are made and somebody has subscribed."""
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def go(self) -> None:
        """Start publishing."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def chains(self) -> list[list[bytes]]:
        """Chains of block hashes that it published."""
        assert self._process.stdout is not None
        return [[bytes.fromhex(one) for one in chain] for chain in json.loads(self._process.stdout.readline())]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Fed(msgspec.Struct, frozen=True):
    """A daemon that has committed a workload: how fast, in blocks/s, and its own memory in MB before it began."""

    daemon: Daemon
    publisher: Publisher
    blocks_per_s: float
    own_before_mb: float


@contextmanager
def fed_daemon(
    blocks: int, blocks_per_message: int, backend: str, directory: Path, blocks_per_s: float = 0.0
) -> Iterator[Fed]:
    """A daemon with its data under `directory`, after it has committed `blocks` blocks from a publisher process."""
    publisher = Publisher(blocks, blocks_per_message, blocks_per_s)
    messages = -(-blocks // blocks_per_message)
    try:
        with (
            tempfile.TemporaryDirectory(dir=directory) as place,
            running_daemon(publisher.endpoint, backend, Path(place, "index")) as daemon,
        ):
            publisher.wait_ready()
            own_before_mb, _ = rss_mb(daemon.pid)
            elapsed = _ingest(daemon.port, publisher, messages - 1)
            yield Fed(daemon, publisher, messages * blocks_per_message / elapsed, own_before_mb)
    finally:
        publisher.stop()


def _ingest(port: int, publisher: Publisher, last_seq: int) -> float:
    """Seconds from the first message sent to the last one committed, as an observer outside sees it."""
    started = time.perf_counter()
    publisher.go()
    while True:
        streams = json.loads(get(port, "/v1/streams"))["streams"]
        elapsed = time.perf_counter() - started
        if streams and streams[0]["last_seq"] >= last_seq:
            return elapsed
        if elapsed > _WAIT_S:
            raise RuntimeError(f"stuck at {streams}")
        time.sleep(_POLL_S)


def _publish(endpoint: str, workload: Workload, blocks_per_s: float) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.sndhwm = 0
    publisher.bind(endpoint)
    publisher.recv()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    started = time.monotonic()
    for seq, payload in enumerate(workload.messages):
        if blocks_per_s:
            time.sleep(max(0.0, started + seq * workload.blocks_per_message / blocks_per_s - time.monotonic()))
        publisher.send_multipart([b"", seq.to_bytes(8, "big"), payload])
    sys.stdout.write(json.dumps([[one.hex() for one in chain] for chain in workload.chains]) + "\n")
    sys.stdout.flush()
    while os.getppid() > 1:
        time.sleep(1)


if __name__ == "__main__":
    _publish(sys.argv[1], make_workload(int(sys.argv[2]), int(sys.argv[3])), float(sys.argv[4]))
