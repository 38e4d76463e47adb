"""A daemon that joins when the beginning of a worker is gone, and how it comes to believe that worker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine

from .daemon_process import DaemonProcess, wait_until

RING = 4


def daemon_of(engine: SimulatedEngine, directory: Path) -> DaemonProcess:
    directory.mkdir()
    sockets = engine.ranks[0].sockets
    words = ("--engine", sockets.endpoint, "--replay-endpoint", sockets.replay_endpoint, "--worker", engine.name)
    return DaemonProcess(directory, *words)


def publish(engine: SimulatedEngine, daemon: DaemonProcess, messages: int) -> None:
    """One at a time: a daemon that is slow must not lose what the short ring no longer has."""
    for _ in range(messages):
        (message,) = engine.ranks[0].publish()
        wait_until(lambda seq=message.seq: daemon.stream()["last_seq"] == seq, "it is committed")  # type: ignore[misc]


def back_up(daemon: DaemonProcess, to: Path) -> None:
    words = ("backend", "backup", f"lmdb:{daemon.directory / 'data'}", str(to))
    subprocess.run([sys.executable, "-m", "kvcensus.daemon.cli", *words], check=True)


def test_it_does_not_believe_the_worker_until_it_begins_with_the_index_of_one_that_was_there(tmp_path: Path) -> None:
    with (
        SimulatedEngine(EngineOptions("w", 7, buffer_steps=RING)) as engine,
        daemon_of(engine, tmp_path / "early") as early,
    ):
        wait_until(lambda: early.stream()["state"] == "live", "it follows from the beginning")
        publish(engine, early, 3 * RING)
        with daemon_of(engine, tmp_path / "late") as late:
            wait_until(lambda: late.stream()["trust"] == "untrusted", "the beginning is missed")
            assert late.stream()["reason"] == "the engine's replay does not reach back to its start"
            publish(engine, late, RING)
            assert late.stream()["trust"] == "untrusted"

            assert late.terminate() == 0
            shutil.rmtree(late.directory / "data")
            back_up(early, late.directory / "data")
            publish(engine, early, 1)
            late.start()
            wait_until(lambda: late.stream()["trust"] == "fresh", "it goes on from the backup")
            wait_until(lambda: late.stream()["last_seq"] == early.stream()["last_seq"], "it has the rest")
            assert late.copies() == early.copies()
