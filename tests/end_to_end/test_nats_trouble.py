"""What an operator sees of a bus that cannot be followed: a sentence in /readyz and the log, until it is mended."""

from __future__ import annotations

import json
from pathlib import Path

from kvcensus.daemon.service import NOT_REACHED_YET

from ..nats_servers import nats_server, secret_file, talking
from .daemon_process import DaemonProcess, wait_until


def readiness(daemon: DaemonProcess) -> tuple[int, list[str]]:
    """Status and problems of `/readyz`, once every bus was tried."""
    while True:
        status, body = daemon.request("GET", "/readyz")
        problems = json.loads(body)["problems"]
        if not any(one.endswith(NOT_REACHED_YET) for one in problems):
            return status, problems


def configured(directory: Path, url: str, more: str = "", stream: str = "") -> list[str]:
    file = directory / "kvcensus.toml"
    file.write_text(
        f"[[nats]]\nname = 'fleet'\ntype = 'vllm'\nstream = '{stream}'\n"
        f"[nats.connection]\nservers = ['{url}']\nreconnect_min_ms = 50\nreconnect_max_ms = 200\n{more}"
    )
    return ["--config", str(file)]


def test_a_wrong_password_names_its_file_until_it_is_mended(tmp_path: Path) -> None:
    password = secret_file(tmp_path / "password", "wrong")
    users = {"authorization": {"users": [{"user": "census", "password": "right"}]}}
    with nats_server(tmp_path, users) as server:
        arguments = configured(tmp_path, server.url, f"user = 'census'\npassword_file = '{password}'\n")
        with DaemonProcess(tmp_path, *arguments) as daemon:
            wait_until(lambda: readiness(daemon)[1] != [], "the problem is told")
            status, (problem,) = readiness(daemon)
            assert status == 503
            assert problem.startswith("bus fleet: ")
            assert str(password) in problem
            assert daemon.metric("kvcensus_bus_failing", bus="fleet") == 1
            assert daemon.metric("kvcensus_ready") == 0
            assert any(line["event"] == "bus_problem" and str(password) in line["detail"] for line in daemon.log())

            secret_file(password, "right")
            wait_until(lambda: readiness(daemon) == (200, []), "the bus is followed")
            assert daemon.metric("kvcensus_bus_failing", bus="fleet") == 0


def test_a_missing_stream_is_named_until_somebody_makes_it(tmp_path: Path) -> None:
    with (
        nats_server(tmp_path) as server,
        talking(server.url) as client,
        DaemonProcess(tmp_path, *configured(tmp_path, server.url, stream="KV")) as daemon,
    ):
        wait_until(lambda: readiness(daemon)[1] != [], "the problem is told")
        status, (problem,) = readiness(daemon)
        assert (status, problem) == (503, f"bus fleet: {server.url} has no stream KV")
        client.add_stream("KV", ["kvevents.>"])
        wait_until(lambda: readiness(daemon) == (200, []), "the bus is followed")


def test_a_server_that_goes_later_leaves_what_is_known_to_be_asked_for(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, DaemonProcess(tmp_path, *configured(tmp_path, server.url)) as daemon:
        wait_until(lambda: readiness(daemon) == (200, []), "the bus is followed")
        server.kill()
        wait_until(lambda: readiness(daemon)[1] != [], "the problem is told")
        status, (problem,) = readiness(daemon)
        assert status == 200
        assert server.url in problem
        server.start()
        wait_until(lambda: readiness(daemon) == (200, []), "the bus is followed again")
