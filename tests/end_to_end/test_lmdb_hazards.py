"""What an LMDB index meets in the real world, in real processes: full, pinned, cut, of another boot, of the future."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import msgspec
import pytest

from kvcensus.backends import ownership
from kvcensus.backends.lmdb import Durability, files
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import RecordedMessage

from .daemon_process import DaemonProcess, wait_until

RUN = 64
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and namespaces need root")


def message(seq: int, *events: dict[str, object]) -> RecordedMessage:
    return RecordedMessage(seq, (b"", seq.to_bytes(8, "big"), msgspec.msgpack.encode([1.5, events, None])))


def stored(run: int) -> dict[str, object]:
    """A chain of RUN blocks of its own."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes(run),
        "parent_block_hash": None,
        "token_ids": [1] * RUN,
        "block_size": 1,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def hashes(run: int) -> list[int]:
    return [(run << 16 | at) * 0x9E3779B97F4A7C15 % (1 << 64) for at in range(1, RUN + 1)]


def held(*runs: int) -> dict[tuple[bytes, int], int]:
    """What a worker holds that stored these."""
    return {(one.to_bytes(8, "big"), 0): 1 for run in runs for one in hashes(run)}


@contextmanager
def followed(
    directory: Path, messages: list[RecordedMessage], settings: str = "", data_dir: Path | None = None
) -> Iterator[tuple[ReplayedEngine, DaemonProcess]]:
    """An engine that has published nothing yet, and the daemon that follows it."""
    config = directory / "kvcensus.toml"
    with ReplayedEngine(messages) as engine:
        source = f'endpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"\nname = "w"'
        config.write_text(f"{settings}\n[[sources]]\n{source}\n")
        daemon = DaemonProcess(directory, "--config", str(config))
        if data_dir is not None:
            at = daemon._command.index("--data-dir")
            daemon._command[at + 1] = str(data_dir)
        with daemon:
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            yield engine, daemon


def logged(daemon: DaemonProcess, event: str) -> list[dict[str, object]]:
    return [line for line in daemon.log() if line["event"] == event]


def problems(daemon: DaemonProcess) -> list[str]:
    status, body = daemon.request("GET", "/readyz")
    answer: list[str] = json.loads(body)["problems"]
    assert (status == 503) == bool(answer)
    return answer


def worker(daemon: DaemonProcess) -> dict[str, object]:
    (one,) = daemon.get("/v1/workers")["workers"]
    answer: dict[str, object] = one
    return answer


# full


def test_a_full_map_stops_the_writing_says_so_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    messages = [message(seq, stored(seq)) for seq in range(300)]
    small = "[index]\nmap_size_bytes = 1048576\n[writer]\ncommit_max_blocks = 512\nqueue_max_messages = 20\n"
    small += "drain_deadline_ms = 500"
    with followed(tmp_path, messages, small) as (engine, daemon):
        while not problems(daemon):
            engine.publish(4)
            time.sleep(0.02)
        engine.publish_rest()
        assert "nothing can be written" in problems(daemon)[0]
        assert "map size" in problems(daemon)[0]
        assert worker(daemon)["trust"] == "stale"
        assert "nothing can be written" in str(worker(daemon)["reason"])
        assert daemon.metric("kvcensus_ready") == 0
        assert daemon.metric("kvcensus_backend_limit_bytes") == 1 << 20
        assert 0.2 < daemon.metric("kvcensus_backend_live_bytes") / (1 << 20) <= 1
        assert daemon.metric("kvcensus_backend_commit_errors_total") > 0
        assert daemon.metric("kvcensus_queue_messages") < 300
        (line,) = logged(daemon, "backend_full")
        assert "map size" in str(line["detail"])
        applied = daemon.stream()["last_seq"]
        assert daemon.copies() == {"w": held(*range(applied + 1))}

        daemon.terminate()
        config = tmp_path / "kvcensus.toml"
        config.write_text(config.read_text().replace("1048576", "67108864"))
        daemon.start()
        wait_until(lambda: daemon.stream()["last_seq"] == 299, "the rest is replayed")
        assert problems(daemon) == []
        assert worker(daemon)["trust"] == "fresh"
        assert daemon.copies() == {"w": held(*range(300))}


def test_a_full_map_takes_room_from_what_was_cleared(tmp_path: Path) -> None:
    """A stream that never pauses: nothing is swept in idle moments, and each life nearly fills the map."""
    lives = [list(range(life * 50, life * 50 + 50)) for life in range(6)]
    events = [event for life in lives for event in ({"type": "AllBlocksCleared"}, *map(stored, life))]
    messages = [message(seq, event) for seq, event in enumerate(events)]
    small = "[index]\nmap_size_bytes = 1572864\n[writer]\ncommit_max_blocks = 512"
    with followed(tmp_path, messages, small) as (engine, daemon):
        engine.publish_rest()
        wait_until(lambda: daemon.stream()["last_seq"] == len(messages) - 1, "all is applied")
        assert logged(daemon, "backend_full")
        assert logged(daemon, "backend_has_room")
        wait_until(lambda: not problems(daemon), "the daemon is ready again")
        assert daemon.copies() == {"w": held(*lives[-1])}


@as_root
def test_a_full_disk_is_waited_out(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        ballast = disk / "ballast"
        messages = [message(seq, stored(seq)) for seq in range(400)]
        settings = "[writer]\ncommit_max_blocks = 512\nqueue_max_messages = 20"
        with followed(tmp_path, messages, settings, disk / "data") as (engine, daemon):
            engine.publish()
            wait_until(lambda: daemon.stream()["last_seq"] == 0, "the first message is applied")
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
            engine.publish_rest()
            wait_until(lambda: bool(problems(daemon)), "the daemon is not ready")
            assert "the disk is full" in problems(daemon)[0]
            assert logged(daemon, "backend_full")
            assert daemon.metric("kvcensus_queue_messages") < 300
            applied = daemon.stream()["last_seq"]
            assert applied < 399
            assert daemon.match(tuple(block for block, _ in held(0))) == {"w": RUN}

            ballast.unlink()
            wait_until(lambda: not problems(daemon), "the daemon is ready again")
            wait_until(lambda: daemon.stream()["last_seq"] == 399, "all is applied")
            assert logged(daemon, "backend_has_room")
            assert daemon.copies() == {"w": held(*range(400))}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MANY_READERS = """
import pathlib, sys, threading
from kvcensus.backends.lmdb import LmdbBackend
directory = pathlib.Path(sys.argv[1])
backend = LmdbBackend(directory / "data")
try:
    with (directory / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
except OSError as error:
    print(error.strerror, flush=True)
together = threading.Barrier(200)
def read():
    with backend._reader.reading():
        if together.wait() == 0:
            print(backend.health().readers)
        together.wait()
threads = [threading.Thread(target=read) for _ in range(200)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@as_root
def test_new_readers_of_an_index_on_a_full_disk_are_no_end_by_a_signal(tmp_path: Path) -> None:
    """LMDB writes into a mapped table of readers, whose pages a full disk could not give."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=True)
    try:
        many = subprocess.run(
            [sys.executable, "-c", MANY_READERS, str(tmp_path)], capture_output=True, text=True, timeout=60
        )
        assert many.returncode == 0, (many.returncode, many.stderr[-1000:])
        full, readers = many.stdout.splitlines()
        assert full == "No space left on device"
        assert int(readers) >= 200
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# readers

PINNING = """
import pathlib, sys, time
from kvcensus.backends.lmdb import LmdbReader
reader = LmdbReader.open(pathlib.Path(sys.argv[1]))
with reader.reading():
    print("pinned", flush=True)
    time.sleep(100)
"""


def test_a_reader_that_pins_the_index_is_seen_and_a_killed_one_is_let_go(tmp_path: Path) -> None:
    events = [{"type": "BlockRemoved", "block_hashes": hashes(1), "medium": "GPU"}, stored(1)]
    messages = [message(seq, events[seq % 2]) for seq in range(6001)]
    settings = "[writer]\ncommit_max_ms = 0\ncommit_max_blocks = 1"
    with followed(tmp_path, messages, settings) as (engine, daemon):
        engine.publish()
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "something is there")
        reader = subprocess.Popen(
            [sys.executable, "-c", PINNING, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        with reader.stdout:
            assert reader.stdout.readline() == "pinned\n"
            for number in range(6000):
                engine.publish()
                time.sleep(0.001)
                if number % 500 != 499:
                    continue
                if daemon.metric("kvcensus_backend_oldest_reader_lag_transactions") > 1000:
                    break
            assert daemon.metric("kvcensus_backend_oldest_reader_lag_transactions") > 1000
            assert daemon.metric("kvcensus_backend_readers") >= 2
            wait_until(lambda: bool(logged(daemon, "reader_pins_the_index")), "it is logged")
            assert logged(daemon, "reader_pins_the_index")[0]["reader_pid"] == reader.pid
            reader.kill()
            reader.wait()
        wait_until(lambda: daemon.metric("kvcensus_backend_oldest_reader_lag_transactions") < 10, "it is let go")


def in_own_pids(code: str, *arguments: str) -> list[str]:
    """A Python process that is PID 1, as that of a container is."""
    return ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, *arguments]


@as_root
def test_two_processes_with_one_pid_are_told_what_to_share(tmp_path: Path) -> None:
    with followed(tmp_path, [message(0, stored(0))]) as (engine, daemon):
        engine.publish_rest()
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "something is there")
        opening = "import pathlib, sys\nfrom kvcensus.backends.lmdb import *\n"
        first = subprocess.Popen(in_own_pids(PINNING, str(tmp_path / "data")), stdout=subprocess.PIPE, text=True)
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "pinned\n"
            code = f"{opening}LmdbReader.open(pathlib.Path(sys.argv[1]))"
            second = subprocess.run(
                in_own_pids(code, str(tmp_path / "data")), capture_output=True, text=True, timeout=20
            )
            assert "BackendPidClash" in second.stderr
            assert "shareProcessNamespace: true" in second.stderr

            daemon.terminate()
            run = ["unshare", "--pid", "--fork", "--mount-proc", *daemon._command]
            clash = subprocess.run(run, capture_output=True, text=True, timeout=20)
            assert clash.returncode == 75
            assert json.loads(clash.stderr.splitlines()[-1])["problem"] == "pid_clash"
            assert "shareProcessNamespace: true" in clash.stderr
        finally:
            subprocess.run(["pkill", "-KILL", "-P", str(first.pid)], check=False)
            first.wait()
            assert first.stdout is not None
            first.stdout.close()


@as_root
def test_a_mount_without_locks_is_refused(tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    with followed(tmp_path, [message(0, stored(0))]) as (engine, daemon):
        engine.publish_rest()
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "something is there")
        subprocess.run(["mount", "--bind", str(tmp_path / "data"), str(view)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
            for command in ("snapshot", "verify"):
                asked = [sys.executable, "-m", "kvcensus.daemon.cli", command, "--data-dir", str(view)]
                answer = subprocess.run(asked, capture_output=True, text=True, timeout=20)
                assert answer.returncode == 69
                assert "cannot lock" in answer.stderr
                assert answer.stdout == ""
        finally:
            subprocess.run(["umount", str(view)], check=True)


# what was left behind


@contextmanager
def stopped(directory: Path, runs: int) -> Iterator[DaemonProcess]:
    """A daemon that has followed an engine, which goes on, and was killed."""
    with followed(directory, [message(seq, stored(seq)) for seq in range(runs)]) as (engine, daemon):
        engine.publish_rest()
        wait_until(lambda: daemon.stream()["last_seq"] == runs - 1, "all is applied")
        daemon.kill()
        yield daemon


def refused(daemon: DaemonProcess) -> dict[str, object]:
    """Start it, which must fail with 65. Returns the last line of its log."""
    process = daemon.start(wait=False).process
    assert process is not None
    assert process.wait(30) == 65
    return logged(daemon, "backend_unusable")[-1]


def test_a_truncated_index_is_refused_and_rebuilt_from_the_engine(tmp_path: Path) -> None:
    index = tmp_path / "data" / files.INDEX_FILE
    with stopped(tmp_path, 100) as daemon:
        with index.open("r+b") as file:
            file.truncate(index.stat().st_size // 2)
        line = refused(daemon)
        assert line["problem"] == "corrupt"
        assert f"mv {index} {index}.corrupt" in str(line["detail"])
        verify = [sys.executable, "-m", "kvcensus.daemon.cli", "verify", "--json", "--data-dir", str(index.parent)]
        looked = subprocess.run(verify, capture_output=True, text=True, timeout=30)
        assert looked.returncode == 65
        *findings, summary = map(json.loads, looked.stdout.splitlines())
        assert summary["findings"] == len(findings) > 0

        index.rename(f"{index}.corrupt")
        daemon.start()
        wait_until(lambda: daemon.stream()["last_seq"] == 99, "all is replayed")
        assert daemon.copies() == {"w": held(*range(100))}
        looked = subprocess.run(verify, capture_output=True, text=True, timeout=30)
        assert looked.returncode == 0, looked.stdout
        assert json.loads(looked.stdout)["records"] == 100 * RUN


def test_a_truncated_index_is_moved_aside_where_that_is_configured(tmp_path: Path) -> None:
    index = tmp_path / "data" / files.INDEX_FILE
    with stopped(tmp_path, 100) as daemon:
        config = tmp_path / "kvcensus.toml"
        config.write_text(f'[index]\non_corrupt = "rebuild"\n{config.read_text()}')
        with index.open("r+b") as file:
            file.truncate(4096)
        daemon.start()
        wait_until(lambda: daemon.stream()["last_seq"] == 99, "all is replayed")
        assert daemon.copies() == {"w": held(*range(100))}
        (line,) = logged(daemon, "index_moved_aside")
        assert Path(str(line["to"])).stat().st_size == 4096


def test_damage_that_a_question_finds_ends_the_daemon_and_is_looked_for_at_the_next_start(tmp_path: Path) -> None:
    index = tmp_path / "data" / files.INDEX_FILE
    with stopped(tmp_path, 100) as daemon:
        env = lmdb.open(str(index), subdir=False, max_dbs=8, map_size=1 << 30, readonly=True)
        with env.begin() as txn:
            row = txn.get(
                b"\x08" + hashes(3)[0].to_bytes(8, "big") + b"\x00", db=env.open_db(b"blocks", txn=txn, create=False)
            )
        env.close()
        assert row is not None
        raw = index.read_bytes()
        assert raw.count(row) >= 1
        index.write_bytes(raw.replace(row, row[:-12] + b"\xff" * 12))

        daemon.start()
        status, body = daemon.request("POST", "/v1/locate", {"block_hash": hashes(3)[0].to_bytes(8, "big").hex()})
        assert status == 503
        assert "is damaged" in json.loads(body)["error"]["message"]
        assert daemon.process is not None
        assert daemon.process.wait(30) == 65
        assert logged(daemon, "backend_unusable")[-1]["problem"] == "corrupt"

        refused(daemon)
        assert logged(daemon, "index_suspected")


def test_an_end_by_a_fatal_signal_has_the_index_looked_at_before_it_is_used_again(tmp_path: Path) -> None:
    with stopped(tmp_path, 10) as daemon:
        daemon.start()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGBUS)
        daemon.process.wait(10)
        daemon.start()
        assert "Bus error" in str(logged(daemon, "index_suspected")[0]["reason"])
        assert daemon.copies() == {"w": held(*range(10))}


def test_an_unsynced_index_of_another_boot_is_discarded_and_replayed(tmp_path: Path) -> None:
    with stopped(tmp_path, 20) as daemon:
        boot = tmp_path / "data" / "boot.json"
        note = json.loads(boot.read_bytes())
        assert note == {"boot_id": ownership.boot_id(), "durability": Durability.PROCESS, "clean": False}
        boot.write_text(json.dumps(note | {"boot_id": "another"}))
        (tmp_path / "data" / files.INDEX_FILE).write_bytes(b"what the machine made of it")
        daemon.start()
        assert logged(daemon, "index_discarded")
        wait_until(lambda: daemon.stream()["last_seq"] == 19, "all is replayed")
        assert daemon.copies() == {"w": held(*range(20))}


def test_a_schema_of_the_future_is_refused_and_left_alone(tmp_path: Path) -> None:
    index = tmp_path / "data" / files.INDEX_FILE
    with stopped(tmp_path, 10) as daemon:
        env = lmdb.open(str(index), subdir=False, max_dbs=8, map_size=1 << 30)
        with env.begin(write=True) as txn:
            txn.put(b"schema", (99).to_bytes(4, "big"), db=env.open_db(b"meta", txn=txn))
        env.close()
        before = index.read_bytes()
        line = refused(daemon)
        assert line["problem"] == "format"
        assert "schema 99" in str(line["detail"])
        assert index.read_bytes() == before
