"""`kvcensus doctor` as a process, beside a daemon that runs, one that does not, and an index that is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvcensus.daemon.bench.processes import free_port
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES
from .daemon_process import DaemonProcess, wait_until

WAIT_S = 60.0


def doctor(*arguments: str | Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the findings by check."""
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "doctor", *arguments, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout, ended.stderr
    return ended.returncode, {one["check"]: one for one in json.loads(ended.stdout)["findings"]}


def configured(directory: Path, engine: ReplayedEngine, port: int) -> Path:
    config = directory / "kvcensus.toml"
    config.write_text(
        f"data_dir = '{directory}/data'\n[http]\nlisten = '127.0.0.1:{port}'\n[[sources]]\nname = 'engine'\n"
        f"endpoint = '{engine.endpoint}'\nreplay_endpoint = '{engine.replay_endpoint}'\n"
    )
    return config


def test_a_daemon_before_while_and_after_it_runs(tmp_path: Path) -> None:
    with ReplayedEngine(Recording(CAPTURES / "vllm-0.32.0-basic.jsonl.gz")) as engine:
        daemon = DaemonProcess(tmp_path)
        config = configured(tmp_path, engine, daemon.port)
        code, found = doctor("--config", config, "--probe-s", "1")
        assert (code, found["data directory"]["says"].endswith("can be made")) == (0, True)
        assert found["streams"]["says"] == "1 reached"

        daemon = DaemonProcess(tmp_path, "--config", str(config), port=daemon.port)
        with daemon:
            assert daemon.process is not None
            assert engine.wait_subscribers()
            engine.publish_rest()
            wait_until(lambda: bool(daemon.stream()["last_seq"] >= 0), "something is committed", WAIT_S)
            code, found = doctor("--config", config)
            assert code == 0, found
            assert found["owner"]["says"] == f"process {daemon.process.pid} writes it"
            assert found["ready"]["verdict"] == "ok"
            assert found["streams"]["says"] == "1 followed, all reached"
            assert "of the schema of this version" in found["file"]["says"]
    code, found = doctor("--config", config, "--probe-s", "0.5")
    assert code == 1
    assert found["engine"]["verdict"] == "problem"
    assert "nothing listens at" in found["engine"]["says"]
    assert found["owner"]["says"] == "nobody has it"


def test_the_token_is_that_of_the_configuration(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("c2VjcmV0\n")
    tokens.chmod(0o644)
    config = tmp_path / "kvcensus.toml"
    port = free_port()
    config.write_text(
        f"data_dir = '{tmp_path}/data'\nhttp = {{listen = '127.0.0.1:{port}', token_file = '{tokens}'}}\n"
    )
    with DaemonProcess(tmp_path, "--config", str(config), port=port):
        code, found = doctor("--config", config)
    assert (code, found["http"]["says"]) == (0, f"answers at 127.0.0.1:{port}")
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "doctor", "--config", str(config)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    assert "tokens can be read by others than its owner: chmod 600" in shown
    assert "c2VjcmV0" not in shown


def test_what_is_wrong_is_found_and_nothing_is_changed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o777)
    data.chmod(0o777)
    (data / "index.mdb").write_bytes(b"no index" * 2048)
    (data / "index.mdb-lock").touch()
    before = sorted((one.name, one.stat().st_size) for one in data.iterdir())
    code, found = doctor("--data-dir", data, "--http", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert found["mode"]["verdict"] == "problem"
    assert found["file"]["verdict"] == "problem"
    assert sorted((one.name, one.stat().st_size) for one in data.iterdir()) == before


def test_a_configuration_that_cannot_be_used_is_a_problem_and_the_rest_is_checked(tmp_path: Path) -> None:
    config = tmp_path / "k.toml"
    config.write_text("[http]\nlisten = 'x'\n")
    code, found = doctor("--config", config, "--data-dir", tmp_path / "data", "--http", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert found["settings"]["says"] == f"{config}:2: http.listen: 'x' is not HOST:PORT"
    assert "machine" in {one["area"] for one in found.values()}


def test_people_get_a_list_with_advice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "doctor", "--data-dir", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    assert shown.startswith("machine\n")
    assert "checks: " in shown.splitlines()[-1]
    alone = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60, check=False)
    assert alone.returncode == 2
    assert "give --config FILE" in alone.stderr


def test_a_data_directory_that_is_none_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        code, found = doctor("--data-dir", place, "--no-probe")
        assert code == 1
        assert found["data directory"]["verdict"] == "problem"
        assert "file" not in found, "there is no index to look at"
