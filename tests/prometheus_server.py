"""A real Prometheus with the rules of deploy/prometheus, in which time passes faster.

The rules are those files with every duration (`for:` and the ranges in brackets) divided by one factor, and nothing
else changed. Scrapes and evaluations are every second, so with the factor 15 a range has as many scrapes in it as at an
interval of 15 s.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .nats_servers import free_port

RULES = Path(__file__).parents[1] / "deploy" / "prometheus" / "rules"
FACTOR = 15
PROGRAM = shutil.which("prometheus")
MISSING = "" if PROGRAM else "prometheus is not installed (Debian: apt-get install prometheus)"
needs_prometheus = pytest.mark.skipif(bool(MISSING), reason=MISSING)

_START_S = 60.0
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_DURATION = re.compile(r"(?P<before>\[|\bfor: )(?P<number>\d+)(?P<unit>[smh])(?=\]|\s)")

_CONFIG = """\
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [rules/*.yml]
scrape_configs:
  - job_name: files
    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]
"""


def scaled(rules: str, factor: int) -> str:
    """The same rules with every duration divided by `factor`."""

    def shorter(found: re.Match[str]) -> str:
        milliseconds = 1000 * int(found["number"]) * _SECONDS[found["unit"]] // factor
        return f"{found['before']}{milliseconds}ms"

    return _DURATION.sub(shorter, rules)


class Prometheus:
    """One server. Targets come and go while it runs."""

    def __init__(self, directory: Path, factor: int = FACTOR) -> None:
        self.port = free_port()
        self._directory = directory
        self._targets: dict[str, list[str]] = {}
        (directory / "rules").mkdir(parents=True)
        for path in RULES.glob("*.yml"):
            (directory / "rules" / path.name).write_text(scaled(path.read_text(), factor))
        (directory / "prometheus.yml").write_text(_CONFIG)
        self.scrape({})
        self._process: subprocess.Popen[bytes] | None = None

    def scrape(self, targets: dict[str, list[str]]) -> None:
        """Scrape these from now on: addresses by job."""
        groups = [{"targets": addresses, "labels": {"job": job}} for job, addresses in targets.items()]
        new = self._directory / "targets.new"
        new.write_text(json.dumps(groups))
        new.replace(self._directory / "targets.json")

    def start(self) -> None:
        assert PROGRAM is not None
        words = [f"--config.file={self._directory}/prometheus.yml", f"--storage.tsdb.path={self._directory}/data"]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, *words, f"--web.listen-address=127.0.0.1:{self.port}"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while not self._ready():
            assert self._process.poll() is None, (self._directory / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self._directory / "log").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def get(self, path: str, **words: object) -> Any:
        """The data of an answer of its API, asked with these parameters."""
        asked = f"{path}?{urllib.parse.urlencode(words)}" if words else path
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{asked}", timeout=30) as answer:
            return json.load(answer)["data"]

    def alerts(self) -> dict[str, str]:
        """`pending` or `firing`, by name of every alert that is either; firing where some series are."""
        found: dict[str, str] = {}
        for alert in self.get("/api/v1/alerts")["alerts"]:
            name = alert["labels"]["alertname"]
            if found.get(name) != "firing":
                found[name] = alert["state"]
        return found

    def firing(self, name: str) -> list[dict[str, Any]]:
        """What is firing of one alert, with labels and annotations."""
        alerts = self.get("/api/v1/alerts")["alerts"]
        return [one for one in alerts if one["labels"]["alertname"] == name and one["state"] == "firing"]

    def scraped(self, addresses: set[str]) -> bool:
        """Whether each of these was scraped, with success."""
        targets = self.get("/api/v1/targets?state=active")["activeTargets"]
        return addresses <= {one["labels"]["instance"] for one in targets if one["health"] == "up"}

    def problems(self) -> list[str]:
        """Rules that could not be evaluated."""
        rules = [rule for group in self.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        return [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule.get("lastError")]


@contextmanager
def prometheus(directory: Path, factor: int = FACTOR) -> Iterator[Prometheus]:
    """A running server, gone afterwards."""
    server = Prometheus(directory, factor)
    try:
        server.start()
        yield server
    finally:
        server.stop()
