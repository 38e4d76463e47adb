"""A start that takes long asks for more time while it works, and not when it stands still."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import SUSPECT_FILE
from kvcensus.daemon.long_start import EXTENSION_S, LONGEST_S, StartTime, Work, long_start, work_so_far
from kvcensus.daemon.service_manager import ServiceManager
from tests.backends.building import blocks, store

ASKED = f"EXTEND_TIMEOUT_USEC={round(EXTENSION_S * 1e6)}"
WAIT_S = 60.0


class Listener:
    """The service manager's end: what it has heard so far."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self._socket.setblocking(False)
        self.heard: list[str] = []
        self.manager = ServiceManager({"NOTIFY_SOCKET": str(directory / "notify")})

    def count(self, start: str) -> int:
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return sum(line.startswith(start) for line in self.heard)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listening = Listener(tmp_path)
    yield listening
    listening.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline


def test_time_is_earned_by_a_processor_or_a_disk_at_work() -> None:
    start = StartTime(0, Work(3.0, 10))
    assert start.is_earned(5, Work(3.5, 10))
    assert not start.is_earned(10, Work(3.51, 10))
    assert start.is_earned(15, Work(3.52, 11))
    assert not start.is_earned(20, Work(3.53, 11))
    assert start.is_earned(25, Work(8.0, 11))


def test_there_is_an_end_for_one_that_works_for_ever() -> None:
    start = StartTime(100, Work(0, 0))
    assert start.is_earned(100 + LONGEST_S - 1, Work(LONGEST_S, 0))
    assert not start.is_earned(100 + LONGEST_S, Work(LONGEST_S + 1, 1))


def test_what_other_threads_do_is_seen() -> None:
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            pass

    before = work_so_far()
    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: work_so_far().processor_s > before.processor_s + 0.1)
    ended.set()
    thread.join()


def test_a_suspected_index_is_read_for_as_long_as_it_takes(listener: Listener, tmp_path: Path) -> None:
    index = LmdbBackend(tmp_path / "data")
    index.apply([store(*blocks(*range(start, start + 50)), worker="w") for start in range(0, 5000, 50)])
    index.close()

    def opened() -> bool:
        (tmp_path / "data" / SUSPECT_FILE).write_text("a note\n")
        LmdbBackend(tmp_path / "data").close()
        return listener.count(ASKED) > 1

    with long_start(listener.manager, every_s=0.05):
        until(opened)
    assert any(line.startswith("STATUS=starting for ") for line in listener.heard)


def test_one_that_stands_still_is_told_of_and_asks_for_nothing(listener: Listener) -> None:
    with long_start(listener.manager, every_s=0.01, work=lambda: Work(1.0, 1)):
        until(lambda: listener.count("STATUS=starting for ") > 1)
    assert listener.count(ASKED) == 0


def test_nothing_is_asked_for_once_it_has_started(listener: Listener) -> None:
    work = count()
    with long_start(listener.manager, every_s=0.01, work=lambda: Work(next(work), 0)):
        until(lambda: listener.count(ASKED) > 0)
    assert "start" not in {thread.name for thread in threading.enumerate()}
