"""What the service manager hears: sd_notify(3) and sd_watchdog_enabled(3)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.daemon.service_manager import ServiceManager, Watchdog

PERIOD_S = 60.0


@pytest.fixture
def manager_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        yield listening


def heard(listening: socket.socket) -> list[str]:
    return listening.recv(4096).decode().splitlines()


def test_a_status_is_one_line_whatever_others_said_in_it(manager_socket: socket.socket) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": manager_socket.getsockname()})
    manager.status("bus fleet: no such stream\nSTOPPING=1 /data/\udcff")
    assert heard(manager_socket) == ["STATUS=bus fleet: no such stream STOPPING=1 /data/\\udcff"]


def test_each_word_is_a_datagram_of_its_own(manager_socket: socket.socket) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": manager_socket.getsockname()})
    manager.ready()
    manager.status("workers: 2 fresh")
    manager.status("workers: 2 fresh")
    manager.alive()
    manager.extend(60)
    manager.stopping(within_s=12.5)
    assert [heard(manager_socket) for _ in range(5)] == [
        ["READY=1"],
        ["STATUS=workers: 2 fresh"],
        ["WATCHDOG=1"],
        ["EXTEND_TIMEOUT_USEC=60000000"],
        ["STOPPING=1", "EXTEND_TIMEOUT_USEC=12500000"],
    ]


def test_a_reload_is_told_with_its_time_in_one_datagram(manager_socket: socket.socket) -> None:
    ServiceManager({"NOTIFY_SOCKET": manager_socket.getsockname()}).reloading()
    reloading, at = heard(manager_socket)
    assert reloading == "RELOADING=1"
    assert int(at.removeprefix("MONOTONIC_USEC=")) > 0


def test_an_abstract_socket_is_named_with_an_at() -> None:
    name = f"kvcensus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(5)
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert heard(listening) == ["READY=1"]


def test_without_a_manager_or_after_its_end_nothing_happens(tmp_path: Path) -> None:
    assert not ServiceManager({}).listens
    ServiceManager({}).ready()
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_the_watchdog_is_fed_several_times_a_period_and_only_while_the_writer_goes_on() -> None:
    watchdog = Watchdog(PERIOD_S)
    assert watchdog.is_due(0, beat_s=0)
    assert not watchdog.is_due(PERIOD_S / 4 - 1, beat_s=PERIOD_S / 4 - 1)
    assert watchdog.is_due(PERIOD_S / 4, beat_s=0)
    assert not watchdog.is_due(PERIOD_S, beat_s=PERIOD_S / 2 - 1)
    assert watchdog.is_due(PERIOD_S, beat_s=PERIOD_S / 2)


@pytest.mark.parametrize(
    ("environ", "is_fed"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "1000000"}, True),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
    ],
)
def test_the_watchdog_is_ours_or_not(environ: dict[str, str], is_fed: bool) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": "/nowhere", **environ})
    assert manager.watchdog.is_due(0, beat_s=0) == is_fed
