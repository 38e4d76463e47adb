"""The daemon under test: a process of its own, killed and started again, asked as anybody outside would."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..config.load import ENVIRONMENT_PREFIX
from .machine import Link

_WAIT_S = 60.0
_POLL_S = 0.02
_COUNTED = (
    "gaps",
    "missing_messages",
    "replay_requests",
    "replayed_messages",
    "duplicates",
    "restarts",
    "unrecovered_messages",
    "malformed_messages",
    "rejections",
    "disconnects",
)
"""What `kvcensus_stream_…_total` has of all streams together."""


def _environment() -> dict[str, str]:
    """Without what would override the configuration that is drilled."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


class DaemonFailed(Exception):
    """The daemon ended, or did not end, as it should not have."""


class DaemonUnderTest:
    """`kvcensus run` with a configuration file. `found` sums what its counters said before each of its ends."""

    def __init__(self, config_path: Path, log_path: Path, port: int, link: Link) -> None:
        self._command = [*link.prefix, sys.executable, "-m", "kvcensus.daemon.cli", "run", "--config", str(config_path)]
        self._log_path = log_path
        self._address = (link.daemon, port)
        self._process: subprocess.Popen[bytes] | None = None
        self.found: Counter[str] = Counter()

    @property
    def runs(self) -> bool:
        """Whether it was started and has not been ended. Raises DaemonFailed when it ended by itself."""
        if self._process is None:
            return False
        if (code := self._process.poll()) is not None:
            self._process = None
            raise DaemonFailed(f"the daemon ended by itself with {code}: {self._last_words()}")
        return True

    def start(self) -> None:
        """Start it, without waiting."""
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=_environment())

    def wait_until_it_answers(self) -> None:
        """Raises DaemonFailed when it does not."""
        deadline = time.monotonic() + _WAIT_S
        while self.runs and time.monotonic() < deadline:
            try:
                self._get("/livez")
            except OSError:
                time.sleep(_POLL_S)
            else:
                return
        raise DaemonFailed(f"the daemon does not answer after {_WAIT_S:g} s: {self._last_words()}")

    def kill(self) -> None:
        """kill -9."""
        if self.runs:
            assert self._process is not None
            self.note_counters()
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        """SIGTERM. Raises DaemonFailed when it does not end with 0 in time."""
        if not self.runs:
            return
        assert self._process is not None
        self.note_counters()
        self._process.send_signal(signal.SIGTERM)
        process, self._process = self._process, None
        try:
            code = process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DaemonFailed(f"the daemon still ran {_WAIT_S:g} s after SIGTERM") from None
        if code not in (0, -signal.SIGTERM):
            raise DaemonFailed(f"the daemon ended with {code} after SIGTERM: {self._last_words()}")

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.runs:
            assert self._process is not None
            self._process.send_signal(number)

    def streams(self) -> dict[str, dict[str, Any]]:
        """`/v1/streams` by worker."""
        return {one["worker_id"]: one for one in json.loads(self._get("/v1/streams"))["streams"]}

    def snapshot(self) -> list[dict[str, Any]]:
        """Every line of `/v1/snapshot`."""
        return [json.loads(line) for line in self._get("/v1/snapshot", "application/x-ndjson").splitlines()]

    def readiness(self) -> tuple[bool, str]:
        """`/readyz`: whether it is, and the body."""
        connection = http.client.HTTPConnection(*self._address, timeout=5)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            return answer.status == http.HTTPStatus.OK, answer.read().decode()
        finally:
            connection.close()

    def note_counters(self) -> None:
        """Add what its counters say to `found`: they end with the process."""
        try:
            text = self._get("/metrics", "text/plain").decode()
        except (OSError, http.client.HTTPException):
            return
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            for name in _COUNTED:
                if series.startswith(f"kvcensus_stream_{name}_total{{"):
                    self.found[name] += int(float(value))

    def _get(self, path: str, accept: str = "application/json") -> bytes:
        connection = http.client.HTTPConnection(*self._address, timeout=5)
        try:
            connection.request("GET", path, headers={"Accept": accept})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise OSError(f"{path}: {answer.status} {body[:200]!r}")
        return body

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        return " | ".join(line for line in lines[-3:])[-800:]
