"""What outside tools rely on: the command line, /v1/snapshot, /v1/match, /v1/streams, worker ids.

Extend these, never break them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES, load_capture
from .daemon_process import DaemonProcess, wait_until

NAME = "vllm-0.32.0-basic"
RESIDENCY_FIELDS = {
    "model_id": str,
    "tokenizer_id": str,
    "adapter_id": (str, type(None)),
    "tenant_id": str,
    "prefix_hash": (str, type(None)),
    "block_hash": str,
    "block_index": (int, type(None)),
    "token_count": int,
    "worker_id": str,
    "tier": str,
    "bytes": int,
    "last_access_ms": int,
    "ref_count": int,
    "pinned": bool,
    "rank": (int, type(None)),
    "group": int,
}


@pytest.fixture(scope="module", params=["lmdb", "memory"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with ReplayedEngine(Recording(CAPTURES / f"{NAME}.jsonl.gz")) as engine:
        arguments = ["--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint, "--engine-type", "vllm"]
        arguments += ["--topic", "kv", "--worker", "gpu-7", "--model", "tiny"]
        with DaemonProcess(tmp_path_factory.mktemp("contract"), *arguments, backend=request.param) as one:
            wait_until(lambda: one.stream()["state"] == "live", "the stream is live")
            engine.publish_rest()
            last = load_capture(NAME).stages[-1].messages[-1].seq
            wait_until(lambda: one.stream()["last_seq"] == last, "the last message is committed")
            yield one


def test_the_snapshot_has_one_residency_a_line_with_all_fields_inline(daemon: DaemonProcess) -> None:
    records = daemon.snapshot()
    assert len(records) == len(load_capture(NAME).stages[-1].copies)
    for record in records:
        for field, kind in RESIDENCY_FIELDS.items():
            assert isinstance(record[field], kind), (field, record)
        assert record["block_hash"] == record["block_hash"].lower()
        bytes.fromhex(record["block_hash"])
        assert record["worker_id"] == "gpu-7/0"
        assert record["rank"] == 0


def test_match_answers_each_worker_with_its_tiers_trust_and_freshness(daemon: DaemonProcess) -> None:
    probe = max(load_capture(NAME).stages[-1].probes, key=lambda one: one.prefix_blocks)
    hashes = [one.hex() for one in probe.block_hashes]
    for scope in ({}, {"scope": None}, {"scope": {"model_id": "tiny"}}):
        answer = daemon.post("/v1/match", {"block_hashes": hashes, "trusted_only": False, **scope})
        (worker,) = answer["workers"]
        assert worker["worker_id"] == "gpu-7/0"
        assert worker["rank"] == 0
        assert worker["trust"] == "fresh"
        assert worker["last_seq"] == daemon.stream()["last_seq"]
        assert worker["age_ms"] >= 0
        assert worker["tiers"] == {"hbm": probe.prefix_blocks}
        assert worker["blocks"] == probe.prefix_blocks
    other = {"block_hashes": hashes, "scope": {"model_id": "another"}}
    assert daemon.post("/v1/match", other)["workers"] == []


def test_streams_tell_how_far_each_one_is(daemon: DaemonProcess) -> None:
    stream = daemon.stream()
    assert stream["source"] == "gpu-7"
    assert stream["rank"] == 0
    assert stream["epoch"] == 1
    assert isinstance(stream["last_seq"], int)
    assert stream["state"] == "live"


def test_the_four_are_in_the_openapi_description(daemon: DaemonProcess) -> None:
    described = daemon.get("/openapi.json")
    assert {"/v1/match", "/v1/snapshot", "/v1/streams"} <= described["paths"].keys()
    text = str(described)
    for word in ("NAME/RANK", *RESIDENCY_FIELDS, "trusted_only", "block_hashes", "last_seq", "age_ms"):
        assert word in text, word
