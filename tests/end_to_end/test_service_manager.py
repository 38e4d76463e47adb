"""The real daemon and the real relay under a service manager, which listens on a datagram socket as systemd does."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES
from .daemon_process import DaemonProcess, wait_until
from .relay_process import RelayProcess

PERIOD_S = 2.0


class Manager:
    """Hears what the process says, one datagram after the other."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening

    def hears(self, true: Callable[[list[str]], bool], what: str, within_s: float = 30.0) -> list[str]:
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._listening], [], [], left)[0]:
                lines = self._listening.recv(65536).decode().splitlines()
                if true(lines):
                    return lines
        raise AssertionError(f"not heard: {what}")

    def hears_line(self, line: str) -> None:
        self.hears(lambda lines: line in lines, line)

    def hears_nothing_like(self, line: str, for_s: float) -> bool:
        try:
            self.hears(lambda lines: line in lines, line, for_s)
        except AssertionError:
            return True
        return False


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD_S * 1e6)))
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield Manager(listening)


def test_a_daemon_tells_its_whole_life(manager: Manager, tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    source = "[[sources]]\nname = 'gpu'\nendpoint = 'tcp://127.0.0.1:9'\n"
    config.write_text(f"[writer]\ndrain_deadline_ms = 60000\n{source}")
    with DaemonProcess(tmp_path, "--config", str(config)) as daemon:
        manager.hears_line("READY=1")
        (status,) = manager.hears(lambda lines: lines[0].startswith("STATUS="), "a status")
        assert status.startswith("STATUS=workers: 1 stale; 0 blocks"), status
        manager.hears_line("WATCHDOG=1")

        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        reloading = manager.hears(lambda lines: lines[0] == "RELOADING=1", "a reload begins")
        assert reloading[1].startswith("MONOTONIC_USEC=")
        manager.hears_line("READY=1")
        config.write_text("nonsense")
        daemon.process.send_signal(signal.SIGHUP)
        manager.hears_line("RELOADING=1")
        manager.hears_line("READY=1")

        assert daemon.terminate() == 0
        stopping = manager.hears(lambda lines: lines[0] == "STOPPING=1", "the end begins")
        assert stopping[1] == "EXTEND_TIMEOUT_USEC=90000000", "the drain, and half a minute"


def test_a_writer_that_is_stuck_lets_the_watchdog_bite(manager: Manager, tmp_path: Path) -> None:
    with ReplayedEngine(Recording(CAPTURES / "vllm-0.32.0-basic.jsonl.gz")) as engine:
        arguments = ("--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint, "--worker", "w")
        with DaemonProcess(tmp_path, *arguments) as daemon:
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            manager.hears_line("WATCHDOG=1")
            index = lmdb.open(str(tmp_path / "data" / INDEX_FILE), subdir=False, max_dbs=16)
            with index.begin(write=True):  # whoever else wants to write waits in the kernel
                engine.publish_rest()
                wait_until(lambda: manager.hears_nothing_like("WATCHDOG=1", PERIOD_S), "the watchdog is not fed")
                assert daemon.answers()
            index.close()
            manager.hears_line("WATCHDOG=1")


def test_a_relay_without_a_bus_is_started_and_alive(manager: Manager, tmp_path: Path) -> None:
    with (
        ReplayedEngine(Recording(CAPTURES / "vllm-0.32.0-basic.jsonl.gz")) as engine,
        RelayProcess(tmp_path / "relay", engine, "--nats", "nats://127.0.0.1:9") as relay,
    ):
        manager.hears_line("READY=1")
        manager.hears(lambda lines: lines[0].startswith("STATUS=1 streams; "), "a status")
        manager.hears_line("WATCHDOG=1")
        assert relay.process is not None
        relay.process.send_signal(signal.SIGHUP)
        manager.hears_line("RELOADING=1")
        manager.hears_line("READY=1")
        assert relay.terminate() == 0
        manager.hears_line("STOPPING=1")
