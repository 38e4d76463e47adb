"""The quarantine on real files: what is kept, within which bounds, and what happens when it cannot be written."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ApplyResult, Cursor, Operation
from kvcensus.daemon import quarantine
from kvcensus.daemon.config import Config, InvalidValue, QuarantineConfig
from kvcensus.daemon.counters import DropCause
from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.frame_queue import Burst, FrameQueue
from kvcensus.daemon.printable import printable
from kvcensus.daemon.quarantine import (
    QUARANTINE_FILE,
    WHOLE_PAYLOAD,
    KeptEntries,
    Quarantine,
    QuarantineError,
    QuarantineLimits,
)
from kvcensus.daemon.service import Service
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, NewEpoch
from kvcensus.daemon.writer import Writer, WriterOptions
from kvcensus.translators.translation import Rejection, RejectReason, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

MIB = 1 << 20
LIMITS = QuarantineLimits(max_bytes=64 * MIB, max_age_hours=168, max_payload_bytes=MIB)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def opened(directory: Path) -> Iterator[Callable[..., Quarantine]]:
    made: list[Quarantine] = []

    def open_(**limits: int) -> Quarantine:
        made.append(Quarantine(directory, msgspec.structs.replace(LIMITS, **limits)))
        return made[-1]

    yield open_
    for one in made:
        one.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clocks on by so many seconds."""
    ahead = [0.0]
    monotonic, wall = time.monotonic, time.time_ns

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    monkeypatch.setattr(quarantine.time, "monotonic", lambda: monotonic() + ahead[0])
    monkeypatch.setattr(quarantine.time, "time_ns", lambda: wall() + int(ahead[0] * 1e9))
    return forward


def followed(name: str = "w", rank: int | None = None) -> FollowedStream:
    return FollowedStream(
        source=name,
        stream=name if rank is None else f"{name}/{rank}",
        rank=rank,
        endpoint="",
        limits=StreamLimits(replay=False),
        translator=VllmTranslator(TranslatorOptions(name)),
        cursor=None,
    )


STREAM = followed()


def refuse(
    into: Quarantine, seq: int, raw: bytes = b"raw", event: int | None = 0, *, epoch: int = 1, detail: str = "odd"
) -> None:
    rejection = Rejection(RejectReason.MEDIUM, detail, "events[0].medium", event, raw)
    into.add(STREAM, 0, epoch, seq, b"payload" if event is not None else raw, rejection)


def numbers(directory: Path) -> list[int]:
    return [entry.seq for entry in KeptEntries(directory).listed()]


def test_an_entry_says_everything(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    before_ms = time.time_ns() // 1_000_000
    refuse(kept, 7, b"\x00event", 3, epoch=2)
    refuse(kept, 8, b"\xffpayload", None, epoch=2)
    kept.flush()

    event, payload = KeptEntries(directory).whole([1, 2])
    assert before_ms <= event.at_ms <= time.time_ns() // 1_000_000
    assert (event.source, event.stream, event.engine, event.rank) == ("w", "w", "vllm", 0)
    assert (event.epoch, event.seq, event.event) == (2, 7, 3)
    assert (event.reason, event.field, event.detail) == ("medium", "events[0].medium", "odd")
    assert (event.raw, event.raw_bytes, event.cut) == (b"\x00event", 6, False)
    assert (payload.seq, payload.event, payload.raw) == (8, WHOLE_PAYLOAD, b"\xffpayload")
    assert [entry.raw for entry in KeptEntries(directory).listed()] == [b"", b""]
    assert (kept.counters.entries, kept.counters.added) == (2, 2)
    assert kept.counters.bytes == event.cost + payload.cost


def test_a_rejection_of_a_whole_payload_keeps_the_payload(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    kept.add(STREAM, None, 1, 5, b"the payload", Rejection(RejectReason.PAYLOAD, "no time", "ts"))
    kept.flush()
    assert [entry.raw for entry in KeptEntries(directory).whole([1])] == [b"the payload"]


def test_the_rank_is_that_of_the_stream(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    kept.add(followed("w", 3), None, 1, 5, b"", Rejection(RejectReason.PAYLOAD, "bad"))
    kept.flush()
    (entry,) = KeptEntries(directory).listed()
    assert (entry.stream, entry.rank) == ("w/3", 3)


def test_nothing_is_made_before_there_is_something_to_keep(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    kept.flush()
    assert not directory.exists()
    refuse(kept, 1)
    assert not directory.exists()
    kept.flush()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.glob(f"{QUARANTINE_FILE}*")} == {0o600}


def test_the_same_again_is_the_same_entry(directory: Path, opened: Callable[..., Quarantine]) -> None:
    first = opened()
    refuse(first, 1)
    refuse(first, 2)
    first.flush()
    before = KeptEntries(directory).listed()
    first.close()

    second = opened()
    for seq in (1, 2, 1):
        refuse(second, seq)
    second.flush()
    assert KeptEntries(directory).listed() == before
    assert (second.counters.entries, second.counters.added) == (2, 0)


def test_another_frame_at_the_same_place_never_replaces_one(directory: Path, opened: Callable[..., Quarantine]) -> None:
    """Epochs count from 1 again when the index is gone, and always with the memory backend."""
    kept = opened()
    refuse(kept, 1, b"of one life")
    refuse(kept, 1, b"of another life")
    kept.flush()
    assert [entry.raw for entry in KeptEntries(directory).whole([1, 2])] == [b"of one life", b"of another life"]


def test_numbers_of_a_hostile_publisher(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    for seq in (0, (1 << 63) - 1, 1 << 63, (1 << 64) - 2):
        refuse(kept, seq)
    kept.flush()
    assert numbers(directory) == [0, (1 << 63) - 1, 1 << 63, (1 << 64) - 2]


@given(some.text(some.characters()))
def test_a_peers_words_can_be_stored_and_printed(words: str) -> None:
    shown = printable(words)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    if words.isprintable() and len(words) < 1000:
        assert shown == words


def test_words_that_are_no_utf_8_do_not_stop_it(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened()
    refuse(kept, 1, detail="\ud800\x1b[2J" + "x" * 100_000)
    kept.flush()
    (entry,) = KeptEntries(directory).listed()
    assert entry.detail.startswith("\\ud800\\x1b[2Jxxx")
    assert len(entry.detail) < 1100


def test_the_oldest_go_first_when_it_is_full(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened(max_bytes=100_000)
    for seq in range(200):
        refuse(kept, seq, seq.to_bytes(2, "big") * 5000)
        kept.flush()
        assert kept.counters.bytes <= 100_000
    assert numbers(directory) == list(range(191, 200))
    assert kept.counters.entries == 9
    assert kept.counters.dropped == {DropCause.SIZE: 191, DropCause.AGE: 0, DropCause.UNWRITTEN: 0}
    kept.close()
    assert (directory / QUARANTINE_FILE).stat().st_size < 200_000


def test_one_batch_larger_than_the_limit_is_cut_down_before_it_is_written(
    directory: Path, opened: Callable[..., Quarantine]
) -> None:
    kept = opened(max_bytes=100_000)
    for seq in range(1000):
        refuse(kept, seq, bytes(10_000))
    kept.flush()
    assert numbers(directory) == list(range(991, 1000))
    assert kept.counters.added + kept.counters.dropped[DropCause.SIZE] == 1000


def test_a_flood_of_empty_frames_is_bounded(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened(max_bytes=100_000)
    for seq in range(1000):
        refuse(kept, seq, b"", None)
    kept.flush()
    assert 100 < len(numbers(directory)) < 200


def test_a_large_frame_is_cut_and_marked(directory: Path, opened: Callable[..., Quarantine]) -> None:
    kept = opened(max_payload_bytes=1000)
    refuse(kept, 1, bytes(1000))
    refuse(kept, 2, bytes(1001))
    kept.flush()
    whole, cut = KeptEntries(directory).listed()
    assert (whole.raw_bytes, whole.kept_bytes, whole.cut) == (1000, 1000, False)
    assert (cut.raw_bytes, cut.kept_bytes, cut.cut) == (1001, 1000, True)


def test_old_entries_go_even_when_nothing_comes(
    directory: Path, opened: Callable[..., Quarantine], now: Callable[[float], None]
) -> None:
    kept = opened(max_age_hours=1)
    refuse(kept, 1)
    kept.flush()
    now(1800)
    refuse(kept, 2)
    kept.flush()
    now(1790)
    kept.flush()
    assert numbers(directory) == [1, 2]
    now(20)
    kept.flush()
    assert numbers(directory) == [2]
    assert (kept.counters.entries, kept.counters.dropped[DropCause.AGE]) == (1, 1)


def test_what_another_process_drops_is_seen(
    directory: Path, opened: Callable[..., Quarantine], now: Callable[[float], None]
) -> None:
    kept = opened()
    for seq in range(3):
        refuse(kept, seq)
    kept.flush()
    assert KeptEntries(directory).drop([1, 2, 99]) == [1, 2]
    now(11)
    kept.flush()
    assert kept.counters.entries == 1
    refuse(kept, 0)
    kept.flush()
    assert [entry.id for entry in KeptEntries(directory).listed()] == [3, 4]


def test_the_figures_are_there_after_a_restart(opened: Callable[..., Quarantine]) -> None:
    first = opened()
    refuse(first, 1)
    first.flush()
    first.close()
    second = opened()
    assert (second.counters.entries, second.counters.bytes) == (1, first.counters.bytes)
    assert second.counters.added == 0


@pytest.mark.parametrize("gone", ["the file", "the directory", "the file, for another"])
def test_a_file_that_was_taken_away_is_made_anew(
    directory: Path, opened: Callable[..., Quarantine], now: Callable[[float], None], gone: str
) -> None:
    kept = opened()
    refuse(kept, 1)
    kept.flush()
    if gone == "the directory":
        shutil.rmtree(directory)
    elif gone == "the file":
        (directory / QUARANTINE_FILE).unlink()
    else:
        (directory / QUARANTINE_FILE).rename(directory / "looked-at-later.sqlite")
        other = Quarantine(directory, LIMITS)
        refuse(other, 2)
        other.close()
    if gone == "the file":
        now(11)
        kept.flush()
        assert kept.counters.entries == 0
    refuse(kept, 3)
    kept.flush()
    assert numbers(directory) == ([2, 3] if gone.endswith("another") else [3])
    assert (kept.counters.entries, kept.counters.errors) == (len(numbers(directory)), 0)


@pytest.fixture
def lock(directory: Path, opened: Callable[..., Quarantine]) -> Iterator[sqlite3.Connection]:
    """Another process that writes and does not end."""
    first = opened()
    refuse(first, 0)
    first.close()
    with sqlite3.connect(directory / QUARANTINE_FILE, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
    other.close()


def test_a_locked_file_costs_little_and_what_waits_is_written_later(
    directory: Path, opened: Callable[..., Quarantine], lock: sqlite3.Connection, now: Callable[[float], None]
) -> None:
    kept = opened()
    errors = kept.counters.errors
    refuse(kept, 1)
    now(11)
    started = time.perf_counter()
    for _ in range(100):
        kept.flush()
    assert time.perf_counter() - started < 1
    assert kept.counters.errors == errors + 1
    lock.execute("ROLLBACK")
    now(2)
    refuse(kept, 2)
    kept.flush()
    assert numbers(directory) == [0, 1, 2]
    assert kept.counters.added == 2
    assert sum(kept.counters.dropped.values()) == 0


def test_what_waits_is_bounded_too(opened: Callable[..., Quarantine], lock: sqlite3.Connection) -> None:
    kept = opened(max_bytes=100_000)
    for seq in range(1000):
        refuse(kept, seq, bytes(10_000))
        kept.flush()
    assert kept.counters.dropped[DropCause.SIZE] == 991
    kept.close()
    assert kept.counters.dropped[DropCause.UNWRITTEN] == 9
    assert kept.counters.added == 0


def test_a_failure_is_said_once_a_minute(
    opened: Callable[..., Quarantine],
    lock: sqlite3.Connection,
    now: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[int] = []
    monkeypatch.setattr(quarantine.log, "warning", lambda event, **facts: said.append(facts["not_logged"]))
    kept = opened()
    refuse(kept, 1)
    for _ in range(31):
        now(2)
        kept.flush()
    first, second = said
    assert first == 0
    assert 0 < second < 30


def test_a_directory_that_cannot_be_made(opened: Callable[..., Quarantine]) -> None:
    kept = Quarantine(Path("/proc/nothing/here"), LIMITS)
    refuse(kept, 1)
    kept.flush()
    assert (kept.counters.errors, kept.counters.entries) == (1, 0)
    kept.close()
    assert kept.counters.dropped[DropCause.UNWRITTEN] == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.daemon.test_quarantine import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
kept = Quarantine(Path(sys.argv[1]), LIMITS)
refuse(kept, 1, bytes(1000)); kept.flush()
assert kept.counters.errors == 0
refuse(kept, 2, bytes(900_000)); kept.flush()
assert kept.counters.errors == 1, kept.counters.errors
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
time.sleep(1.1)
kept.flush()
assert kept.counters.entries == 2
"""


def test_a_write_that_is_cut_short_leaves_what_was_there(directory: Path) -> None:
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", FULL_DISK, directory], cwd=root, check=True, timeout=60)
    assert numbers(directory) == [1, 2]


READ_ONLY = """
import os, sys
import urllib.parse  # Path.as_uri imports it later, from where another user may not read
from pathlib import Path
from kvcensus.daemon.quarantine import *
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
directory = Path(sys.argv[1])
print([entry.seq for entry in KeptEntries(directory).listed()])
LIMITS = QuarantineLimits(1 << 26, 168, 1 << 20)
kept = Quarantine(directory, LIMITS)
print(kept.counters.errors, Quarantine(directory / "shut", LIMITS).counters.errors)
try:
    KeptEntries(directory).drop([1])
except QuarantineError as error:
    print(error)
"""


def test_a_read_only_directory_can_be_read_and_is_an_error_to_write(opened: Callable[..., Quarantine]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        kept = Quarantine(directory, LIMITS)
        refuse(kept, 1)
        kept.close()
        (directory / QUARANTINE_FILE).chmod(0o444)
        (directory / "shut").mkdir(mode=0)
        directory.chmod(0o555)
        said = subprocess.run(
            [sys.executable, "-c", READ_ONLY, name], capture_output=True, text=True, check=True, timeout=60
        ).stdout.splitlines()
        directory.chmod(0o755)
    assert said[:2] == ["[1]", "1 1"]
    assert said[2].startswith(f"{directory}/{QUARANTINE_FILE}: ")
    assert "readonly" in said[2]


def test_a_file_of_another_schema_is_left_as_it_is(directory: Path, opened: Callable[..., Quarantine]) -> None:
    directory.mkdir()
    path = directory / QUARANTINE_FILE
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 2")
        other.execute("CREATE TABLE precious (thing)")
    other.close()
    kept = opened()
    refuse(kept, 1)
    kept.flush()
    assert kept.counters.errors >= 1
    with pytest.raises(QuarantineError, match="has schema 2, this version knows schema 1"):
        KeptEntries(directory).listed()
    with sqlite3.connect(path) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["precious"]
    other.close()


def test_a_file_that_is_no_database_is_named(directory: Path, opened: Callable[..., Quarantine]) -> None:
    directory.mkdir()
    (directory / QUARANTINE_FILE).write_bytes(b"nonsense" * 1000)
    kept = opened()
    assert kept.counters.errors == 1
    with pytest.raises(QuarantineError, match=r"quarantine\.sqlite: file is not a database"):
        KeptEntries(directory).listed()


def test_a_directory_without_quarantine_has_no_entries(tmp_path: Path) -> None:
    assert KeptEntries(tmp_path).listed() == []
    assert list(KeptEntries(tmp_path).whole([1])) == []
    assert KeptEntries(tmp_path).drop([1]) == []
    assert os.listdir(tmp_path) == []
    with pytest.raises(QuarantineError, match="there is no data directory here"):
        KeptEntries(tmp_path / "none")


class Asking(MemoryBackend):
    """Notes which entries are in the quarantine when a batch comes to be applied."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self.kept: list[int] = []

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        self.kept = numbers(self._directory)
        return super().apply(operations, cursors)


def test_a_batch_is_in_the_quarantine_before_it_is_in_the_index(
    directory: Path, opened: Callable[..., Quarantine]
) -> None:
    directory.mkdir()
    backend, queue, stream = Asking(directory), FrameQueue(100, MIB), followed()
    payloads = [msgspec.msgpack.encode([1.5, [["BlockFrobbed"]]]), b"nonsense"]
    queue.put(Burst([(stream, NewEpoch(1, "first")), (stream, Apply(0, payloads))]))
    queue.close()
    writer = Writer(backend, queue, WriterOptions(), opened())
    writer.start()
    writer.join(10)
    assert writer.error is None
    assert backend.cursors()["w"].seq == 1
    assert backend.kept == [0, 1]


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"max_bytes": MIB - 1}, "max_bytes"),
        ({"max_bytes": MIB}, "max_payload_bytes"),
        ({"max_payload_bytes": 33 * MIB}, "max_payload_bytes"),
    ],
)
def test_limits_leave_room_for_a_frame(limits: dict[str, int], key: str) -> None:
    with pytest.raises(InvalidValue) as error:
        QuarantineConfig(**limits)
    assert error.value.key == key


def test_a_limit_of_nothing_keeps_nothing(directory: Path) -> None:
    limits = QuarantineConfig(max_bytes=0)
    service = Service(Config(data_dir=str(directory), backend="memory", quarantine=limits))
    assert service.quarantine_counters.entries == 0
    assert not directory.exists()
