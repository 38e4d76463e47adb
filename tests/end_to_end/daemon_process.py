"""The real daemon as a process, and questions to it as anybody outside would ask them."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from kvcensus.daemon.bench.processes import free_port

WAIT_S = 30.0


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.02)


class DaemonProcess:
    """`kvcensus run` with the given arguments, its data and its log in `directory`."""

    def __init__(self, directory: Path, *arguments: str, backend: str = "lmdb", port: int = 0) -> None:
        self.directory = directory
        self.log_path = directory / "daemon.log"
        self.port = port or free_port()
        self._command = [sys.executable, "-m", "kvcensus.daemon.cli", "run", *arguments]
        self._command += ["--data-dir", str(directory / "data"), "--http", f"127.0.0.1:{self.port}"]
        self._command += ["--backend", backend]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Self:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        if wait:
            self.wait_until_it_answers()
        return self

    def wait_until_it_answers(self) -> None:
        wait_until(self.answers, "the daemon answers")

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_path.read_text()[-3000:]
        try:
            self.get("/livez")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def request(self, method: str, path: str, body: Any = None, accept: str = "application/json") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"Accept": accept, "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, body = self.request("GET", path)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, body: Any) -> Any:
        status, answer = self.request("POST", path, body)
        assert status == 200, answer
        return json.loads(answer)

    def problems(self) -> list[str]:
        """What `/readyz` says is wrong."""
        _, body = self.request("GET", "/readyz")
        found: list[str] = json.loads(body)["problems"]
        return found

    def streams(self) -> dict[str, dict[str, Any]]:
        return {stream["source"]: stream for stream in self.get("/v1/streams")["streams"]}

    def stream(self) -> dict[str, Any]:
        (stream,) = self.streams().values()
        return stream

    def snapshot(self) -> list[dict[str, Any]]:
        status, body = self.request("GET", "/v1/snapshot", accept="application/x-ndjson")
        assert status == 200, body
        return [json.loads(line) for line in body.splitlines()]

    def copies(self) -> dict[str, dict[tuple[bytes, int], int]]:
        """By worker: how many copies of each (hash, group)."""
        held: dict[str, dict[tuple[bytes, int], int]] = {}
        for record in self.snapshot():
            block = (bytes.fromhex(record["block_hash"]), record["group"])
            held.setdefault(record["worker_id"], {})[block] = record["ref_count"]
        return held

    def match(self, block_hashes: tuple[bytes, ...]) -> dict[str, int]:
        body = {"block_hashes": [one.hex() for one in block_hashes]}
        return {worker["worker_id"]: worker["blocks"] for worker in self.post("/v1/match", body)["workers"]}

    def metric(self, name: str, **labels: str) -> float:
        status, body = self.request("GET", "/metrics", accept="text/plain")
        assert status == 200
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in body.decode().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                return float(value)
        raise AssertionError(f"no metric {name} {labels}")

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]
