"""`kvcensus tap` as a process, beside a simulated engine and a real NATS server."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcensus.daemon.recording import Recording
from kvcensus.daemon.relay.convention import Address, address_headers, numbered, subject_of
from kvcensus.daemon.streams.delivery import Control

from ..captures_reader import CAPTURES
from ..nats_servers import Talk, nats_server

KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]
CAPTURE = CAPTURES / "vllm-0.32.0-restart.jsonl.gz"


def tap(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVCENSUS, "tap", *arguments], capture_output=True, text=True, timeout=60, check=False)


def lines(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    command = [*KVCENSUS, "simulate", "--ranks", "0", "--name", "gpu", "--rate", "50", "--blocks", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    endpoint: str = json.loads(process.stdout.readline())["engines"][0]["ranks"][0]["endpoint"]
    yield endpoint
    process.kill()
    process.wait()


def test_events_pass_as_json_lines_filtered_and_counted(engine: str) -> None:
    found = lines(tap(engine, "--event", "store", "--count", "5"))
    assert [one["kind"] for one in found] == ["store"] * 5
    prefix = found[0]["block_hashes"][0][:1]
    some = lines(tap(engine, "--hash", prefix, "--tier", "GPU", "--count", "3"))
    assert all(any(name.startswith(prefix) for name in [*one["block_hashes"], one.get("parent", "")]) for one in some)
    (raw,) = lines(tap(engine, "--raw", "--count", "1"))
    assert raw["payload"][1][0]["type"].startswith("Block")


def test_a_source_of_a_configuration(engine: str, tmp_path: Path) -> None:
    config = tmp_path / "k.toml"
    config.write_text(f"[[sources]]\nname = 'llama'\nendpoint = '{engine}'\nmodel = 'm'\n")
    (one,) = lines(tap("llama", "--config", config, "--event", "store", "--count", "1"))
    assert (one["worker"], one["model"]) == ("llama/0", "m")
    assert "NAME of one of: llama" in tap("other", "--config", config).stderr


def test_an_end_without_a_message() -> None:
    assert lines(tap("tcp://127.0.0.1:1", "--duration", "0.3")) == []


def test_a_recording_gives_every_event_of_it() -> None:
    found = lines(tap(CAPTURE))
    messages = [one.seq for one in Recording(CAPTURE)]
    assert {one["seq"] for one in found} == set(messages)
    assert sum(one["kind"] == "backwards" for one in found) == 1


def test_a_terminal_gets_readable_lines() -> None:
    outer, inner = pty.openpty()
    process = subprocess.Popen([*KVCENSUS, "tap", CAPTURE, "--count", "1"], stdout=inner)
    os.close(inner)
    assert " store hbm 9 blocks " in os.read(outer, 65536).decode()
    assert process.wait(60) == 0
    os.close(outer)


def test_a_stream_of_jetstream_is_seen_without_a_consumer(tmp_path: Path) -> None:
    payload = next(iter(Recording(CAPTURE))).payload
    address = Address("gpu-7", 0, "m", "vllm")
    headers = numbered(address_headers("5eed", address), 1, 0, Control.NONE)
    with nats_server(tmp_path) as server:
        talk = Talk([server.url], {})
        try:
            talk.add_stream("KV", ["kvevents.>"])
            command = [*KVCENSUS, "tap", "--nats", server.url, "--stream", "KV", "--count", "1"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            assert "following kvevents.>" in process.stderr.readline()
            talk.store(subject_of("kvevents", address), payload, headers)
            assert process.stdout is not None
            one = json.loads(process.stdout.readline())
            assert (one["kind"], one["worker"]) == ("store", "gpu-7/0")
            assert process.wait(60) == 0
            consumers = talk.do(talk.jetstream.consumers_info("KV"))
            assert consumers == []
        finally:
            talk.close()
    gone = tap("--nats", server.url)
    assert gone.returncode == 69


def test_wrong_usage_is_told() -> None:
    assert "give an ENDPOINT" in tap().stderr
    assert "do not go with it" in tap("tcp://h:1", "--raw", "--event", "store").stderr
    assert "is not hex" in tap("tcp://h:1", "--hash", "xyz").stderr
    assert "no known spelling" in tap("tcp://h:1", "--tier", "TAPE").stderr
    assert tap("/nonexistent").returncode == 74
