"""Each check of `kvcensus doctor` with facts that make it fail, and with some that do not."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.doctor import directory as of_directory
from kvcensus.daemon.doctor import index as of_index
from kvcensus.daemon.doctor import machine as of_machine
from kvcensus.daemon.doctor import running as of_running
from kvcensus.daemon.doctor.facts import (
    Directory,
    Finding,
    Index,
    Library,
    Machine,
    Reader,
    Running,
    Settings,
    Verdict,
)
from kvcensus.daemon.doctor.gather import holder_of, mount_of
from kvcensus.daemon.doctor.gather_index import readers_of
from kvcensus.daemon.http.bodies import StreamReport, StreamsAnswer
from kvcensus.daemon.probe.findings import ProbeFindings, StreamFinding
from kvcensus.daemon.status import Readiness, StreamState, Trust

from .served import bus_status, status

GIB = 1 << 30
NOW = 1_800_000_000.0
MACHINE = Machine(
    file_system="ext4",
    mount="/var",
    free=100 * GIB,
    open_files=65_536,
    clock_synchronised=True,
    now_s=NOW,
    memory_limit=8 * GIB,
    python=(3, 12),
    libraries=(Library("lmdb", "3.0.1", ">=3.0,<4"),),
)
SETTINGS = Settings(queue_max_bytes=GIB // 4, max_connections=512, streams=8, map_size=1 << 40)
DIRECTORY = Directory("/var/data", exists=True, writable=True, uid=7, our_uid=7, owner_pid=42)
INDEX = Index(exists=True, file=GIB, has_lock_file=True, opened=True, live=GIB // 2, durability="process")
STREAM = StreamReport(**msgspec.structs.asdict(status("gpu")), age_ms=1, lag_s=0.1, gaps=0, unrecovered_messages=0)
RUNNING = Running(
    "127.0.0.1:9480",
    version="1",
    our_version="1",
    readiness=Readiness(True, []),
    streams=StreamsAnswer([STREAM], [bus_status()]),
)
NONE_RUNS = Running("127.0.0.1:9480", "Connection refused")


def changed(facts: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(facts, **changes)


def every(
    machine: Machine = MACHINE,
    directory: Directory = DIRECTORY,
    index: Index = INDEX,
    settings: Settings = SETTINGS,
    running: Running = RUNNING,
) -> list[Finding]:
    return [
        *of_machine.machine_findings(machine, settings, index.file, directory.newest_s),
        *of_directory.directory_findings(directory),
        *of_index.index_findings(index, directory, settings, running),
        *of_running.daemon_findings(running, directory),
        *of_running.followed(running),
    ]


def wrong(**facts: Any) -> list[tuple[str, Verdict]]:
    """The checks that are not ok; each of them has advice."""
    found = [one for one in every(**facts) if one.verdict is not Verdict.OK]
    assert all(one.says and one.advice for one in found)
    return [(one.check, one.verdict) for one in found]


def test_a_healthy_daemon_has_nothing_to_be_told() -> None:
    assert wrong() == []
    assert of_running.worst(every()) is Verdict.OK


def test_a_directory_that_is_not_there_yet_is_no_problem() -> None:
    directory = Directory("/var/data", writable=True, our_uid=7)
    assert wrong(directory=directory, index=Index(), running=NONE_RUNS) == []


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"file_system": "nfs4"}, "file system", Verdict.PROBLEM),
        ({"read_only": True}, "file system", Verdict.PROBLEM),
        ({"file_system": "tmpfs"}, "file system", Verdict.WARNING),
        ({"file_system": "overlay"}, "file system", Verdict.WARNING),
        ({"file_system": None}, "file system", Verdict.WARNING),
        ({"free": GIB // 100}, "disk", Verdict.PROBLEM),
        ({"free": GIB // 2}, "disk", Verdict.WARNING),
        ({"free": None}, "disk", Verdict.WARNING),
        ({"open_files": 256}, "open files", Verdict.PROBLEM),
        ({"address_space": GIB}, "address space", Verdict.PROBLEM),
        ({"memory_limit": GIB // 8}, "memory", Verdict.WARNING),
        ({"memory_available": GIB // 8}, "memory", Verdict.WARNING),
        ({"now_s": 0.0}, "clock", Verdict.PROBLEM),
        ({"clock_synchronised": False}, "clock", Verdict.WARNING),
        ({"python": (3, 10)}, "python", Verdict.WARNING),
        ({"libraries": (Library("lmdb", "2.2.1", ">=3.0,<4"),)}, "libraries", Verdict.PROBLEM),
        ({"libraries": (Library("lmdb", None, ">=3.0,<4"),)}, "libraries", Verdict.PROBLEM),
    ],
)
def test_the_machine(changes: dict[str, Any], check: str, verdict: Verdict) -> None:
    assert wrong(machine=changed(MACHINE, **changes)) == [(check, verdict)]


def test_room_for_a_copy_of_the_index_is_wanted() -> None:
    assert wrong(index=changed(INDEX, file=200 * GIB)) == [("disk", Verdict.WARNING)]


def test_only_lmdb_needs_the_address_space() -> None:
    machine = changed(MACHINE, address_space=GIB)
    assert of_machine.address_space(machine, changed(SETTINGS, backend="memory")).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("3.0", ">=3.0,<4", True),
        ("4.0.0", ">=3.0,<4", False),
        ("0.20.0", ">=0.20,<1", True),
        ("1.0.0rc1", ">=0.20,<1", False),
        ("2.1", "==2.1", True),
        ("2.2", "==2.1", False),
        ("2.2", "", True),
    ],
)
def test_a_version_is_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert of_machine.fits(Library("x", version, wanted)) is fits


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"writable": False}, "data directory", Verdict.PROBLEM),
        ({"exists": False, "writable": False}, "data directory", Verdict.PROBLEM),
        ({"our_uid": 0}, "data directory", Verdict.WARNING),
        ({"mode": 0o750}, "mode", Verdict.WARNING),
        ({"mode": 0o777}, "mode", Verdict.PROBLEM),
        ({"of_others": ("index.mdb",)}, "files", Verdict.PROBLEM),
        ({"leftovers": (("index.mdb.corrupt", GIB),)}, "leftovers", Verdict.WARNING),
        ({"newest_s": NOW + 3600}, "clock", Verdict.WARNING),
    ],
)
def test_the_directory(changes: dict[str, Any], check: str, verdict: Verdict) -> None:
    assert wrong(directory=changed(DIRECTORY, **changes)) == [(check, verdict)]


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"problem": "format", "detail": "schema 9"}, "file", Verdict.PROBLEM),
        ({"problem": "corrupt", "detail": "damaged"}, "file", Verdict.PROBLEM),
        ({"problem": "pid_clash", "detail": "two processes are one"}, "file", Verdict.PROBLEM),
        ({"live": 600 * GIB}, "map", Verdict.WARNING),
        ({"live": 1000 * GIB}, "map", Verdict.PROBLEM),
        ({"has_lock_file": False}, "lock file", Verdict.PROBLEM),
        ({"readers": (Reader(9, 5_000, True),)}, "readers", Verdict.WARNING),
        ({"readers": (Reader(9, 0, False),)}, "readers", Verdict.WARNING),
        ({"machine_crashed": True}, "durability", Verdict.WARNING),
        ({"suspect": "Fatal Python error: Bus error\nmore"}, "last end", Verdict.WARNING),
    ],
)
def test_the_index(changes: dict[str, Any], check: str, verdict: Verdict) -> None:
    assert wrong(index=changed(INDEX, **changes)) == [(check, verdict)]


def test_a_daemon_in_another_pid_namespace() -> None:
    (found,) = [one for one in every(directory=changed(DIRECTORY, owner_pid=None)) if one.verdict is not Verdict.OK]
    assert (found.check, found.verdict) == ("owner", Verdict.WARNING)
    assert "shareProcessNamespace" in found.advice
    elsewhere = changed(RUNNING, loopback=False)
    assert wrong(directory=changed(DIRECTORY, owner_pid=None), running=elsewhere) == []


def test_a_daemon_that_runs_and_does_not_answer() -> None:
    assert wrong(running=NONE_RUNS) == [("owner", Verdict.WARNING), ("http", Verdict.PROBLEM)]
    assert wrong(running=Running("", "http.listen is empty")) == []


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"version": "2"}, "version", Verdict.WARNING),
        ({"readiness": Readiness(False, ["nothing can be written: full"])}, "ready", Verdict.PROBLEM),
        ({"readiness": Readiness(True, ["bus fleet: lost"])}, "ready", Verdict.WARNING),
        ({"streams": StreamsAnswer([changed(STREAM, state=StreamState.CONNECTING)])}, "gpu", Verdict.PROBLEM),
        ({"streams": StreamsAnswer([changed(STREAM, trust=Trust.UNTRUSTED, reason="lost")])}, "gpu", Verdict.WARNING),
        ({"streams": StreamsAnswer([], [bus_status(problem="no server")])}, "fleet", Verdict.PROBLEM),
    ],
)
def test_a_running_daemon(changes: dict[str, Any], check: str, verdict: Verdict) -> None:
    assert wrong(running=changed(RUNNING, **changes)) == [(check, verdict)]


def test_a_probe_finds_problems_and_warnings() -> None:
    gone = StreamFinding("a", "vllm", "tcp://a:1", False, problem="nothing listens at tcp://a:1")
    odd = StreamFinding("b", "vllm", "tcp://b:1", False, reached=True, warnings=["the clocks differ"])
    found = of_running.probed(ProbeFindings(1, False, [gone, odd], []))
    assert [(one.check, one.verdict) for one in found] == [("a", Verdict.PROBLEM), ("b", Verdict.WARNING)]
    fine = StreamFinding("b", "vllm", "tcp://b:1", False, reached=True)
    assert [one.verdict for one in of_running.probed(ProbeFindings(1, True, [fine], []))] == [Verdict.OK]


def test_a_thousand_unreachable_engines_are_not_a_thousand_lines() -> None:
    streams = [changed(STREAM, stream=f"gpu-{number}", state=StreamState.CONNECTING) for number in range(1000)]
    found = of_running.followed(changed(RUNNING, streams=StreamsAnswer(streams)))
    assert len(found) == of_running.MOST_SHOWN + 1
    assert found[-1].says == "980 more like these"


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:40 / /var rw - tmpfs tmpfs rw
24 23 0:41 / /var/my\\040data ro,nosuid - nfs4 server:/x rw
25 22 0:42 / /variety rw - xfs /dev/x rw
"""


def test_the_mount_of_a_path_is_the_nearest_one() -> None:
    assert mount_of("/home", MOUNTS) == ("ext4", "/", False)
    assert mount_of("/var/lib", MOUNTS) == ("tmpfs", "/var", False)
    assert mount_of("/var/my data/x", MOUNTS) == ("nfs4", "/var/my data", True)
    assert mount_of("/x", "nonsense") is None


def test_the_holder_of_a_lock_is_found_by_inode_and_device() -> None:
    locks = "1: POSIX  ADVISORY  WRITE 5 fe:00:77 0 EOF\n2: FLOCK  ADVISORY  WRITE 6 fe:00:77 0 EOF\n"
    assert holder_of(77, os.makedev(0xFE, 0), locks) == 6
    assert holder_of(78, os.makedev(0xFE, 0), locks) is None
    assert holder_of(77, os.makedev(0xFD, 0), locks) is None


def test_the_table_of_readers_is_read_without_ourselves() -> None:
    table = f"    pid     thread     txnid\n  {os.getpid()} 7f00 90\n  {os.getppid()} 7f01 90\n  4194399 7f02 -\n"
    parent, dead = readers_of(table, 100)
    assert (parent.lag, parent.alive) == (10, True)
    assert (dead.lag, dead.alive) == (None, False)
    assert readers_of("(no reader locks)\n", 100) == []
