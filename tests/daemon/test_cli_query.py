"""`query` and `snapshot` against a running daemon that followed a captured engine."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES, load_capture
from ..end_to_end.daemon_process import DaemonProcess, wait_until

NAME = "vllm-0.32.0-basic"
STAGE = load_capture(NAME).stages[-1]
PROBE = max(STAGE.probes, key=lambda probe: probe.prefix_blocks)
BLOCK = PROBE.block_hashes[1].hex()
PARENT = PROBE.block_hashes[0].hex()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that holds what the captured engine had cached at its end."""
    directory = tmp_path_factory.mktemp("daemon")
    with ReplayedEngine(Recording(CAPTURES / f"{NAME}.jsonl.gz")) as engine:
        flags = ["--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint]
        with DaemonProcess(directory, *flags, "--worker", "engine", "--model", "m") as running:
            assert engine.wait_subscribers()
            engine.publish_rest()
            last = STAGE.messages[-1].seq
            wait_until(lambda: bool(running.stream()["last_seq"] == last), "everything is committed")
            yield running


def kvcensus(*arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)


def query(daemon: DaemonProcess, *arguments: str, given: str = "") -> list[list[str]]:
    """The rows of a table, split at runs of spaces, without the head."""
    asked = kvcensus("query", *arguments, "--http", f"127.0.0.1:{daemon.port}", given=given)
    assert asked.returncode == 0, asked.stderr
    return [line.split() for line in asked.stdout.splitlines()[1:]]


def query_json(daemon: DaemonProcess, *arguments: str) -> Any:
    asked = kvcensus("query", *arguments, "--json", "--http", f"http://127.0.0.1:{daemon.port}")
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout)


def test_match_gives_the_prefix_that_the_engine_had(daemon: DaemonProcess) -> None:
    hashes = [one.hex() for one in PROBE.block_hashes]
    (row,) = query(daemon, "match", *hashes)
    assert row[:5] == ["engine/0", str(PROBE.prefix_blocks), f"hbm={PROBE.prefix_blocks}", row[1], "fresh"]
    (again,) = query(daemon, "match", "-", given="\n".join(hashes))
    assert again[:5] == row[:5]
    (worker,) = query_json(daemon, "match", *hashes, "--trusted-only")["workers"]
    assert worker["blocks"] == PROBE.prefix_blocks


def test_a_scope_narrows_the_answer(daemon: DaemonProcess) -> None:
    assert query(daemon, "match", PARENT, "--model", "m") != []
    assert query(daemon, "match", PARENT, "--model", "other") == []
    assert query(daemon, "match", PARENT, "--model", "m", "--tokenizer", "other") == []
    assert query(daemon, "match", PARENT, "--model", "m", "--adapter", "") == []
    assert query(daemon, "locate", PARENT, "--model", "m", "--tenant", "other") == []
    assert query(daemon, "locate", PARENT, "--group", "0") != []
    assert query(daemon, "locate", PARENT, "--group", "1") == []
    asked = kvcensus("query", "locate", PARENT, "--tenant", "t", "--http", f"127.0.0.1:{daemon.port}")
    assert asked.returncode == 2
    assert "need --model" in asked.stderr


def test_locate_and_children_show_the_chain(daemon: DaemonProcess) -> None:
    (row,) = query(daemon, "locate", BLOCK)
    assert row[:8] == ["engine/0", "hbm", BLOCK, PARENT, "1", "0", "1", "m"]
    assert BLOCK in [row[2] for row in query(daemon, "children", PARENT, "--model", "m")]
    assert PARENT in [row[2] for row in query(daemon, "children", "--model", "m")]
    (residency,) = query_json(daemon, "locate", BLOCK)["residencies"]
    assert (residency["prefix_hash"], residency["block_index"]) == (PARENT, 1)
    asked = kvcensus("query", "children", "--http", f"127.0.0.1:{daemon.port}")
    assert asked.returncode == 2
    assert "--model is needed" in asked.stderr


def test_workers_and_streams_tell_how_far_they_are(daemon: DaemonProcess) -> None:
    last = str(STAGE.messages[-1].seq)
    (worker,) = query(daemon, "workers")
    assert worker[:3] == ["engine/0", "fresh", last]
    assert worker[-1] == f"hbm/0={len(STAGE.copies)}"
    (stream,) = query(daemon, "streams")
    assert (stream[0], stream[2], stream[5]) == ("engine", "live", last)
    assert query_json(daemon, "streams")["streams"][0]["worker_id"] == "engine/0"


def test_the_daemons_refusal_names_the_field(daemon: DaemonProcess) -> None:
    asked = kvcensus("query", "match", PARENT, "xyz", "--http", f"127.0.0.1:{daemon.port}")
    assert asked.returncode == 1
    assert asked.stderr.startswith("Error: block_hashes[1]: ")


def test_the_snapshot_is_the_same_from_the_daemon_and_from_its_directory(daemon: DaemonProcess, tmp_path: Path) -> None:
    address = ["--http", f"127.0.0.1:{daemon.port}"]
    from_daemon = kvcensus("snapshot", *address)
    from_directory = kvcensus("snapshot", "--data-dir", daemon.directory / "data")
    assert from_daemon.returncode == from_directory.returncode == 0, from_directory.stderr
    lines = sorted(from_daemon.stdout.splitlines())
    assert lines == sorted(from_directory.stdout.splitlines())
    held = {(bytes.fromhex(one["block_hash"]), one["group"]): one["ref_count"] for one in map(json.loads, lines)}
    assert held == STAGE.copies

    output = tmp_path / "index.jsonl"
    output.write_text("old")
    assert kvcensus("snapshot", *address, "--output", output).returncode == 0
    assert sorted(output.read_text().splitlines()) == lines
    assert list(tmp_path.iterdir()) == [output]


def test_a_snapshot_shows_its_progress_on_a_terminal(daemon: DaemonProcess) -> None:
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "snapshot", "--http", f"127.0.0.1:{daemon.port}"]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=inner, check=False)
    os.close(inner)
    assert ended.returncode == 0
    blocks = len(STAGE.copies)
    assert f"{blocks}/{blocks}".encode() in os.read(outer, 65536)
    os.close(outer)


def test_a_snapshot_to_where_nothing_can_be_written(daemon: DaemonProcess, tmp_path: Path) -> None:
    address = ["--http", f"127.0.0.1:{daemon.port}"]
    ended = kvcensus("snapshot", *address, "--output", tmp_path / "absent" / "index.jsonl")
    assert ended.returncode == 74
    assert "No such file or directory" in ended.stderr
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "kvcensus.daemon.cli", "snapshot", *address]
        stopped = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert stopped.returncode == 74
    assert stopped.stderr == "Error: standard output: No space left on device\n"


ANSWERS = {
    b"GET /v1/workers": b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"workers":[]}',
    b"GET /v1/snapshot": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n",
}


def test_a_snapshot_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in ANSWERS:
                connection, _ = server.accept()
                with connection:
                    request = connection.recv(65536)
                    connection.sendall(next(text for start, text in ANSWERS.items() if request.startswith(start)))

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ended = kvcensus("snapshot", "--http", address, "--output", tmp_path / "index.jsonl")
        thread.join(10)
    assert ended.returncode == 69
    assert ended.stderr == f"Error: http://{address}/v1/snapshot: the answer broke off\n"
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_does_not_answer_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ended = kvcensus("query", "workers", "--http", address, "--timeout-seconds", "0.2")
    assert ended.returncode == 69
    assert ended.stderr == f"Error: http://{address}/v1/workers: timed out\n"
