"""Starting, stopping, reloading: what signals do, and what exit codes say."""

from __future__ import annotations

import signal
from pathlib import Path

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES, load_capture
from .daemon_process import DaemonProcess, wait_until

BASIC = "vllm-0.32.0-basic"
EVICT = "vllm-0.32.0-evict"


def engine(name: str) -> ReplayedEngine:
    return ReplayedEngine(Recording(CAPTURES / f"{name}.jsonl.gz"))


def source(name: str, one: ReplayedEngine, more: str = "") -> str:
    endpoints = f'endpoint = "{one.endpoint}"\nreplay_endpoint = "{one.replay_endpoint}"'
    return f'[[sources]]\nname = "{name}"\n{endpoints}\n{more}\n'


def last_seq(name: str) -> int:
    return load_capture(name).stages[-1].messages[-1].seq


def held(daemon: DaemonProcess) -> set[str]:
    return {record["worker_id"] for record in daemon.snapshot()}


def test_sigterm_commits_what_was_received_and_exits_cleanly(tmp_path: Path) -> None:
    with engine(EVICT) as one:
        arguments = ("--engine", one.endpoint, "--replay-endpoint", one.replay_endpoint, "--worker", "w")
        with DaemonProcess(tmp_path, *arguments) as daemon:
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            one.publish_rest()
            wait_until(lambda: daemon.stream()["last_seq"] >= 0, "something is committed")
            assert daemon.terminate() == 0
            assert daemon.log()[-1]["event"] == "stopped"
            assert daemon.log()[-1]["drained"] is True
            daemon.start()
            wait_until(lambda: daemon.stream()["last_seq"] == last_seq(EVICT), "the rest is replayed")
            assert daemon.copies()["w/0"] == load_capture(EVICT).stages[-1].copies
            assert daemon.stream()["messages"] == len(load_capture(EVICT).messages)


def test_sighup_adds_changes_and_removes_sources_without_a_restart(tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    with engine(BASIC) as basic, engine(EVICT) as evict:
        config.write_text(source("basic", basic))
        with DaemonProcess(tmp_path, "--config", str(config)) as daemon:
            wait_until(lambda: daemon.streams()["basic"]["state"] == "live", "the first stream is live")
            basic.publish_rest()
            wait_until(lambda: daemon.streams()["basic"]["last_seq"] == last_seq(BASIC), "it is committed")

            config.write_text(source("basic", basic, "replay_timeout_ms = 1000") + source("evict", evict))
            assert daemon.process is not None
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "evict" in daemon.streams(), "the second stream is there")
            wait_until(lambda: daemon.streams()["evict"]["state"] == "live", "the second stream is live")
            evict.publish_rest()
            wait_until(lambda: daemon.streams()["evict"]["last_seq"] == last_seq(EVICT), "it is committed")
            wait_until(lambda: daemon.streams()["basic"]["state"] == "live", "the changed stream is live")
            assert daemon.streams()["basic"]["epoch"] == 1
            assert daemon.copies()["basic/0"] == load_capture(BASIC).stages[-1].copies

            config.write_text(source("evict", evict))
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "basic" not in daemon.streams(), "the first stream is gone")
            wait_until(lambda: held(daemon) == {"evict/0"}, "its blocks are gone")

            config.write_text("nonsense")
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: daemon.log()[-1]["event"] == "reload_refused", "a bad file is refused")
            assert daemon.streams().keys() == {"evict"}


def test_what_needs_a_restart_is_named_until_there_was_one(tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    with engine(BASIC) as one:
        config.write_text(source("basic", one))
        with DaemonProcess(tmp_path, "--config", str(config)) as daemon:
            assert daemon.process is not None

            def reloaded(text: str) -> list[str]:
                before = len(daemon.log())
                config.write_text(text + source("basic", one))
                daemon.process.send_signal(signal.SIGHUP)
                wait_until(
                    lambda: any(line["event"] == "reloaded" for line in daemon.log()[before:]), "it has reloaded"
                )
                return next(line["needs_restart"] for line in daemon.log()[before:] if line["event"] == "reloaded")

            assert reloaded("") == []
            changed = '[writer]\ncommit_max_ms = 7\n[log]\nlevel = "debug"\n[rocksdb]\nbackground_jobs = 3\n'
            assert reloaded(changed) == ["writer", "log", "rocksdb"]
            assert reloaded(changed) == ["writer", "log", "rocksdb"]
            assert reloaded("") == []
            assert reloaded('[relay]\nstream = "KV"\n') == []


def test_a_stream_that_is_no_longer_configured_leaves_nothing_behind_a_restart(tmp_path: Path) -> None:
    with engine(BASIC) as basic, engine(EVICT) as evict:
        config = tmp_path / "kvcensus.toml"
        config.write_text(source("basic", basic))
        with DaemonProcess(tmp_path, "--config", str(config)) as daemon:
            wait_until(lambda: daemon.streams()["basic"]["state"] == "live", "the stream is live")
            basic.publish_rest()
            wait_until(lambda: daemon.streams()["basic"]["last_seq"] == last_seq(BASIC), "it is committed")
            daemon.kill()
            config.write_text(source("evict", evict))
            daemon.start()
            assert held(daemon) == set()


def test_a_second_daemon_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "--engine", "tcp://127.0.0.1:9", "--worker", "w"):
        other = DaemonProcess(tmp_path, "--engine", "tcp://127.0.0.1:9", "--worker", "w").start(wait=False)
        assert other.process is not None
        assert other.process.wait(20) == 75
        assert "in use by process" in other.log_path.read_text()


def test_a_wrong_configuration_names_the_place(tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    config.write_text('[[sources]]\nendpoint = "tcp://127.0.0.1:5557"\ntopik = "kv"\n')
    daemon = DaemonProcess(tmp_path, "--config", str(config)).start(wait=False)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 78
    assert f"{config}:3: sources[0].topik" in daemon.log_path.read_text()
