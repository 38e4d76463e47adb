"""The real daemon with its index on a real server: an outage is waited for, a server that has lost data is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("valkey")

from kvcensus.daemon.engine_replay import ReplayedEngine
from tests.valkey_servers import needs_server, running_server

from .daemon_process import DaemonProcess, wait_until
from .test_lmdb_hazards import held, message, stored

pytestmark = needs_server
RUNS = 12


def configured(directory: Path, engine: ReplayedEngine, server: str) -> DaemonProcess:
    config = directory / "kvcensus.toml"
    source = f'name = "w"\nendpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"'
    config.write_text(f'[valkey]\nservers = ["{server}"]\ntimeout_ms = 500\nlease_ms = 1000\n[[sources]]\n{source}\n')
    return DaemonProcess(directory, "--config", str(config), backend="valkey")


def problems(daemon: DaemonProcess) -> list[str]:
    found: list[str] = json.loads(daemon.request("GET", "/readyz")[1])["problems"]
    return found


def test_what_is_published_during_an_outage_of_the_server_is_in_the_index_after_it(tmp_path: Path) -> None:
    messages = [message(seq, stored(seq)) for seq in range(RUNS)]
    settings = {"appendonly": "yes", "appendfsync": "always"}
    with (
        running_server(tmp_path / "server", settings) as server,
        ReplayedEngine(messages) as engine,
        configured(tmp_path, engine, server.address) as daemon,
    ):
        wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
        engine.publish(RUNS // 2)
        wait_until(lambda: daemon.stream()["last_seq"] == RUNS // 2 - 1, "the first half is applied")
        server.kill()
        engine.publish_rest()
        wait_until(lambda: any("nothing can be written" in one for one in problems(daemon)), "the outage is told")
        status, body = daemon.request("POST", "/v1/match", {"block_hashes": [one[0].hex() for one in held(1)]})
        assert (status, b"valkey" in body) == (503, True), body
        server.start()
        wait_until(lambda: daemon.stream()["last_seq"] == RUNS - 1, "the second half is applied")
        wait_until(lambda: not problems(daemon), "the outage is over")
        assert daemon.copies() == {"w": held(*range(RUNS))}

        server.kill()
        wait_until(lambda: any("nothing can be written" in one for one in problems(daemon)), "an idle one tells it too")
        server.start()
        wait_until(lambda: not problems(daemon), "the second outage is over")
        assert [line["event"] for line in daemon.log()].count("backend_is_back") == 2
        assert daemon.terminate() == 0


def test_a_daemon_whose_server_was_emptied_ends_and_its_next_start_restores_the_truth(tmp_path: Path) -> None:
    messages = [message(seq, stored(seq)) for seq in range(RUNS)]
    with running_server(tmp_path / "server") as server, ReplayedEngine(messages) as engine:
        daemon = configured(tmp_path, engine, server.address)
        with daemon:
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            engine.publish(RUNS - 1)
            wait_until(lambda: daemon.stream()["last_seq"] == RUNS - 2, "all is applied")
            server.cli("FLUSHALL")
            assert daemon.process is not None
            assert daemon.process.wait(20) == 1
            assert "emptied" in daemon.log_path.read_text()
        with daemon:
            engine.publish_rest()
            wait_until(lambda: daemon.stream()["last_seq"] == RUNS - 1, "all is applied again")
            wait_until(lambda: daemon.copies() == {"w": held(*range(RUNS))}, "the truth is restored")
