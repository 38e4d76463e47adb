"""A real Prometheus that scrapes a real daemon and relay under load, and the dashboard as Grafana asks it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..end_to_end.daemon_process import DaemonProcess, wait_until
from ..end_to_end.relay_process import JETSTREAM, RelayProcess
from ..nats_servers import nats_server, talking
from ..prometheus_server import Prometheus, prometheus

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "kvcensus.json"
RATE_INTERVAL = "8s"
"""Scrapes are every second here."""
SCRAPES = 12


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def data_panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def asked(expression: str, instances: list[str]) -> str:
    """A query as Grafana sends it with All chosen, which are the values that the variable offers."""
    chosen = "|".join(instances)
    for name, value in {"instance": f"({chosen})", "stream": ".+", "__rate_interval": RATE_INTERVAL}.items():
        expression = expression.replace(f"${name}", value)
    return expression


def series(server: Prometheus, expression: str, *, minutes: float = 0) -> list[dict[str, Any]]:
    """What Prometheus answers: of now, or of the last minutes."""
    ready = server.get("/api/v1/query", query="kvcensus_ready")["result"]
    query = asked(expression, [one["metric"]["instance"] for one in ready])
    if minutes:
        end = float(server.get("/api/v1/query", query="time()")["result"][1])
        found = server.get("/api/v1/query_range", query=query, start=end - 60 * minutes, end=end, step=2)
    else:
        found = server.get("/api/v1/query", query=query)
    result: list[dict[str, Any]] = found["result"]
    return result


class _Endpoints:
    """What a relay is started with."""

    def __init__(self, rank: dict[str, Any]) -> None:
        self.endpoint, self.replay_endpoint = rank["endpoint"], rank["replay_endpoint"]


@contextmanager
def stage(directory: Path) -> Iterator[Prometheus]:
    """Three engines, two followed by the daemon, one relayed into JetStream, from where it is followed as well."""
    simulate = [
        "simulate",
        "--engines",
        "3",
        "--ranks",
        "1",
        "--rate",
        "40",
        "--name",
        "gpu",
        "--cpu-blocks",
        "300",
        "--blocks",
        "900",
    ]
    command = [sys.executable, "-m", "kvcensus.daemon.cli", *simulate, "--restart-every", "3000"]
    with nats_server(directory) as server, subprocess.Popen(command, stdout=subprocess.PIPE) as engines:
        assert engines.stdout is not None
        try:
            ranks = [rank for one in json.loads(engines.stdout.readline())["engines"] for rank in one["ranks"]]
            with talking(server.url) as client:
                client.add_stream(JETSTREAM, ["kvevents.>"])
            config = directory / "kvcensus.toml"
            config.write_text(
                "".join(
                    f"[[sources]]\nname = 'gpu-{at}'\nendpoint = '{rank['endpoint']}'\n"
                    f"replay_endpoint = '{rank['replay_endpoint']}'\nranks = 1\n"
                    for at, rank in enumerate(ranks[:2])
                )
                + f"[[nats]]\nname = 'fleet'\ntype = 'vllm'\nstream = '{JETSTREAM}'\n"
                + f"[nats.connection]\nservers = ['{server.url}']\n"
            )
            relayed: Any = _Endpoints(ranks[2])
            with (
                DaemonProcess(directory, "--config", str(config)) as daemon,
                RelayProcess(directory / "relay", relayed, "--nats", server.url) as relay,
                prometheus(directory / "prometheus") as scraping,
            ):
                addresses = {f"127.0.0.1:{one.port}" for one in (daemon, relay)}
                scraping.scrape(
                    {"kvcensus": [f"127.0.0.1:{daemon.port}"], "kvcensus-relay": [f"127.0.0.1:{relay.port}"]}
                )
                wait_until(lambda: scraping.scraped(addresses), "both are scraped", 60)
                wait_until(lambda: len(series(scraping, "kvcensus_stream_epoch > 0")) >= 3, "all are followed", 60)
                wait_until(lambda: _scrapes(scraping) >= SCRAPES, "there is a past", 60)
                yield scraping
        finally:
            engines.kill()


def _scrapes(server: Prometheus) -> int:
    counted = series(server, "count_over_time(kvcensus_ready[5m])")
    return int(counted[0]["value"][1]) if counted else 0
