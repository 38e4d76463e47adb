"""Drills, shortly: real daemons through every fault, and a drill that must find what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcensus.daemon.recording import Recording

from ..valkey_servers import needs_server, running_server, why_untested


def drill(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "drill", "--json", "--keep", str(tmp_path / "kept")]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=110)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def test_after_all_faults_mixed_every_worker_is_right_or_says_that_it_is_not(tmp_path: Path) -> None:
    code, report = drill(tmp_path, "--seeds", "3", "--messages", "100", "--jobs", "2")
    assert code == 0, [one for one in report["drills"] if one["problems"] or one["workers"]]
    assert report["summary"]["diverged"] == 0
    assert report["summary"]["workers"]["equal"] + report["summary"]["workers"]["untrusted"] == 9
    assert sum(report["summary"]["injected"].values()) > 15
    assert not (tmp_path / "kept").exists()


def test_after_faults_that_leave_the_ring_whole_every_worker_is_equal(tmp_path: Path) -> None:
    faults = "kill,term,drop,duplicate,reorder,disconnect,restart,holes"
    code, report = drill(
        tmp_path, "--seeds", "2", "--seed", "100", "--faults", faults, "--messages", "150", "--jobs", "2"
    )
    assert code == 0, report["drills"]
    assert report["summary"]["workers"] == {"equal": 6, "untrusted": 0, "behind": 0, "diverged": 0}


@pytest.mark.parametrize("backend", ["filesystem", "rocksdb", "holt", "memory"])
def test_every_backend_is_drilled_by_what_can_happen_to_it(tmp_path: Path, backend: str) -> None:
    if missing := why_untested(backend):
        pytest.skip(missing)
    faults = "kill,term,restart,full-map,full-disk"
    code, report = drill(tmp_path, "--seed", "7", "--faults", faults, "--messages", "150", "--backend", backend)
    assert code == 0, report["drills"]
    assert report["summary"]["workers"]["equal"] == 3
    assert "full-map" in report["skipped"]
    assert ("full-disk" in report["summary"]["injected"]) is ("full-disk" not in report["skipped"])
    if backend == "memory":
        assert report["skipped"]["full-disk"] == "the memory backend has no file"


@needs_server
def test_an_index_on_a_server_is_drilled_in_a_namespace_that_is_gone_afterwards(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        config = tmp_path / "kvcensus.toml"
        config.write_text(
            f'backend = "valkey"\n[valkey]\nservers = ["{server.address}"]\n'
            f'[shadow]\nbackend = "valkey"\n[shadow.options]\nservers = ["{server.address}"]\n'
        )
        arguments = ["--seed", "3", "--faults", "kill,drop,partition", "--messages", "150", "--against", str(config)]
        code, report = drill(tmp_path, *arguments)
        assert code == 0, report["drills"]
        assert report["summary"]["workers"]["equal"] == 3
        assert "would not reach" in report["skipped"]["partition"]
        assert server.cli("dbsize").split()[-1] == "0"


def test_a_configuration_of_the_user_is_drilled_under_its_own_names(tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    config.write_text(
        'data_dir = "/nonexistent"\n[[sources]]\nname = "prod"\nendpoint = "tcp://gpu-host:5557"\nranks = 2\n'
        'replay_endpoint = "tcp://gpu-host:5567"\nreplay_timeout_ms = 400\nreconnect_max_ms = 200\n'
    )
    code, report = drill(
        tmp_path, "--seed", "1", "--faults", "kill,drop", "--messages", "120", "--against", str(config)
    )
    assert code == 0, report["drills"]
    assert [one["worker_id"] for one in report["drills"][0]["workers"]] == ["prod/0", "prod/1"]


def test_a_divergence_ends_with_1_and_leaves_what_reproduces_it(tmp_path: Path) -> None:
    """A source that waits for an answer of its mute replay socket for a minute is not there after a second.

    On a busy machine a socket may speak again before it is asked: one of several seeds is enough.
    """
    config = tmp_path / "kvcensus.toml"
    config.write_text(
        '[[sources]]\nname = "w"\nendpoint = "tcp://h:1"\nreplay_endpoint = "tcp://h:9"\nreplay_timeout_ms = 60000\n'
    )
    arguments = ["--seed", "3", "--seeds", "4", "--faults", "mute,drop", "--against", str(config)]
    code, report = drill(tmp_path, *arguments, "--deadline-seconds", "1", "--jobs", "2")
    assert code == 1
    assert report["summary"]["diverged"] >= 1
    kept = next((tmp_path / "kept").glob("seed-*"))
    assert f"seed-{json.loads((kept / 'plan.json').read_text())['seed']}" == kept.name
    assert json.loads((kept / "result.json").read_text())["workers"][0]["outcome"] == "behind"
    made = [message.seq for message in Recording(kept / "w.made.jsonl.gz")]
    assert made == list(range(len(made)))
    assert (kept / "daemon.log").stat().st_size
