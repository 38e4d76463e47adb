"""What was refused is kept, read while the daemon runs, survives kill -9, and is tried again with more knowledge."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .daemon_process import DaemonProcess, wait_until
from .test_faults_on_the_wire import BAD_PAYLOADS, Peer, batch, stored

QUARANTINE = [sys.executable, "-m", "kvcensus.daemon.cli", "quarantine"]


@pytest.fixture
def peer() -> Iterator[Peer]:
    one = Peer()
    one.socket.xpub_verbose = True
    yield one
    one.socket.close()


@pytest.fixture
def config(tmp_path: Path, peer: Peer) -> Path:
    file = tmp_path / "kvcensus.toml"
    file.write_text(
        f'data_dir = "{tmp_path}/data"\n[[sources]]\nname = "w"\nmodel = "m"\nendpoint = "{peer.endpoint}"\n'
    )
    return file


@contextmanager
def following(tmp_path: Path, config: Path, peer: Peer, backend: str = "lmdb") -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, "--config", str(config), backend=backend) as daemon:
        wait_until(lambda: bool(peer.socket.poll(20)) and peer.socket.recv()[:1] == b"\x01", "it subscribes")
        yield daemon


def quarantine(*arguments: str | Path) -> Any:
    ended = subprocess.run([*QUARANTINE, *arguments, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def refused(config: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = quarantine("list", "--config", config)["entries"]
    return entries


def send_bad_payloads(peer: Peer) -> int:
    """One good message, then one of each kind of bad one. Returns the last number."""
    peer.send(0, batch(stored(1)))
    for seq, (payload, _, _) in enumerate(BAD_PAYLOADS.values(), 1):
        peer.send(seq, payload)
    return len(BAD_PAYLOADS)


@pytest.mark.parametrize("backend", ["lmdb", "memory"])
def test_every_bad_payload_is_listed_while_the_daemon_runs(
    tmp_path: Path, config: Path, peer: Peer, backend: str
) -> None:
    with following(tmp_path, config, peer, backend) as daemon:
        last = send_bad_payloads(peer)
        wait_until(lambda: daemon.stream()["last_seq"] == last, "all are committed")
        entries = refused(config)
        kinds = list(BAD_PAYLOADS.values())
        assert [(one["seq"], one["reason"]) for one in entries] == [
            (seq, reason) for seq, (_, reason, _) in enumerate(kinds, 1)
        ]
        for entry, (payload, _, field) in zip(entries, kinds):
            assert (entry["source"], entry["stream"], entry["engine"]) == ("w", "w", "vllm")
            assert (entry["epoch"], field in entry["field"], entry["detail"] != "") == (1, True, True)
            if entry["event"] is None:
                assert quarantine("show", str(entry["id"]), "--config", config)["raw_hex"] == payload.hex()
        assert daemon.metric("kvcensus_quarantine_entries") == len(kinds)
        assert daemon.metric("kvcensus_quarantine_added_total") == len(kinds)
        assert daemon.metric("kvcensus_quarantine_bytes") > sum(len(payload) for payload, _, _ in kinds[:5])
        assert daemon.metric("kvcensus_quarantine_errors_total") == 0


def test_kill_9_neither_loses_an_entry_nor_keeps_one_twice(tmp_path: Path, config: Path, peer: Peer) -> None:
    with following(tmp_path, config, peer) as daemon:
        last = send_bad_payloads(peer)
        wait_until(lambda: daemon.stream()["last_seq"] == last, "all are committed")
        daemon.kill()
    before = refused(config)
    assert len(before) == len(BAD_PAYLOADS)
    with following(tmp_path, config, peer) as again:
        assert again.metric("kvcensus_quarantine_entries") == len(before)
        peer.send(last + 1, batch(stored(2, medium="TAPE")))
        wait_until(lambda: again.stream()["last_seq"] == last + 1, "it goes on")
        assert [one["id"] for one in refused(config)] == [*(one["id"] for one in before), before[-1]["id"] + 1]


def test_messages_that_come_again_after_a_crash_are_the_same_entries(tmp_path: Path, config: Path, peer: Peer) -> None:
    """The index is what a crash before its commit leaves: without the messages, which the engine then sends again."""
    with following(tmp_path, config, peer) as daemon:
        last = send_bad_payloads(peer)
        wait_until(lambda: daemon.stream()["last_seq"] == last, "all are committed")
        daemon.kill()
    before = refused(config)
    for name in ("index.mdb", "index.mdb-lock"):
        (tmp_path / "data" / name).unlink()
    with following(tmp_path, config, peer) as again:
        send_bad_payloads(peer)
        wait_until(lambda: again.stream()["last_seq"] == last, "all are committed again")
        assert refused(config) == before
        assert again.metric("kvcensus_quarantine_added_total") == 0


def test_an_entry_whose_medium_became_known_is_understood_and_dropped(tmp_path: Path, config: Path, peer: Peer) -> None:
    with following(tmp_path, config, peer) as daemon:
        peer.send(0, batch(stored(1), {"type": "BlockFrobbed"}, stored(2, medium="TAPE")))
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "it is committed")
        assert [one["verdict"] for one in quarantine("retry", "--all", "--config", config)["entries"]] == [
            "refused",
            "refused",
        ]
        with config.open("a") as file:
            file.write('media = {TAPE = "object_store"}\n')
        result = quarantine("retry", "--all", "--drop-translated", "--config", config)
        assert [(one["event"], one["verdict"], one["operations"]) for one in result["entries"]] == [
            (1, "refused", 0),
            (2, "translated", 1),
        ]
        assert result["dropped"] == [result["entries"][1]["id"]]
        assert [one["event"] for one in refused(config)] == [1]
        assert len(daemon.copies()["w/0"]) == 1
        peer.send(1, batch(stored(3, medium="TAPE")))
        wait_until(lambda: daemon.stream()["last_seq"] == 1, "the daemon writes on after another process dropped")
        assert [(one["seq"], one["event"]) for one in refused(config)] == [(0, 1), (1, 0)]
        assert daemon.metric("kvcensus_quarantine_entries") == 2


def test_a_quarantine_that_cannot_be_written_does_not_stop_the_stream(tmp_path: Path, config: Path, peer: Peer) -> None:
    (tmp_path / "data" / "quarantine.sqlite").mkdir(parents=True)
    with following(tmp_path, config, peer) as daemon:
        last = send_bad_payloads(peer)
        peer.send(last + 1, batch(stored(7)))
        wait_until(lambda: daemon.stream()["last_seq"] == last + 1, "the stream goes on")
        assert len(daemon.copies()["w/0"]) == 2
        assert daemon.metric("kvcensus_quarantine_errors_total") >= 1
        assert daemon.terminate() == 0
    said = [line["event"] for line in daemon.log() if line["event"].startswith("quarantine_")]
    assert said == ["quarantine_not_written", "quarantine_dropped_by_unwritten"]


@pytest.mark.parametrize("run", range(2))
def test_whatever_the_index_has_passed_is_in_the_quarantine_at_any_kill_9(
    tmp_path: Path, config: Path, peer: Peer, run: int
) -> None:
    """Every message is refused, so the cursor says which entries there must be."""
    with following(tmp_path, config, peer) as daemon:
        sending = threading.Thread(target=send_refused, args=(peer, 3000))
        sending.start()
        time.sleep(random.Random(run).uniform(0.05, 0.6))
        daemon.kill()
        sending.join()
    with following(tmp_path, config, peer) as again:
        passed = range(again.stream()["last_seq"] + 1)
        kept = [entry["seq"] for entry in refused(config)]
        assert len(kept) == len(set(kept))
        assert set(kept) >= set(passed)
        assert again.metric("kvcensus_quarantine_entries") == len(kept)


def send_refused(peer: Peer, messages: int) -> None:
    for seq in range(messages):
        peer.send(seq, batch(stored(seq, medium="TAPE")))
        time.sleep(0.0002)
