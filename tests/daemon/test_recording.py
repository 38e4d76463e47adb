"""What a recording keeps, what a killed recorder leaves, and what is said of a damaged file."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.daemon.recording import RecordedMessage, Recording, RecordingError, RecordingWriter

CAPTURES = Path(__file__).parents[1] / "captures"
NAMES = pytest.mark.parametrize("name", ["stream.jsonl", "stream.jsonl.gz"])


def message(seq: int, payload: bytes = b"payload") -> RecordedMessage:
    return RecordedMessage(received_ns=seq, frames=(b"kv", seq.to_bytes(8, "big"), payload))


def line(seq: int) -> bytes:
    return b'{"t":%d,"frames":["","AAAAAAAAAAA=","cGF5bG9hZA=="]}\n' % seq


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*.jsonl.gz")), ids=lambda path: path.name)
def test_every_captured_engine_is_a_recording(path: Path) -> None:
    messages = list(Recording(path))
    assert len(messages) == gzip.decompress(path.read_bytes()).count(b"\n")
    assert all(one.seq is not None and one.payload for one in messages)


@NAMES
@given(frames=st.lists(st.lists(st.binary(max_size=40), max_size=5).map(tuple), max_size=20))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, name: str, frames: list[tuple[bytes, ...]]
) -> None:
    path = tmp_path_factory.mktemp("recording") / name
    messages = [RecordedMessage(received_ns=at, frames=one) for at, one in enumerate(frames)]
    with RecordingWriter(path) as writer:
        for one in messages:
            writer.write(one)
    recording = Recording(path)
    assert list(recording) == messages
    assert list(recording) == messages, "a second iteration starts again"


def test_a_gzip_recording_is_one_that_gzip_reads(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl.gz"
    with RecordingWriter(path) as writer:
        writer.write(message(1))
        writer.flush()
        writer.write(message(2))
    assert gzip.decompress(path.read_bytes()).count(b"\n") == 2


def test_recordings_put_one_after_the_other_are_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl.gz"
    path.write_bytes(gzip.compress(line(1)) + gzip.compress(line(2)))
    assert [one.received_ns for one in Recording(path)] == [1, 2]


_KILLED = """
import os, signal, sys
from pathlib import Path
from kvcensus.daemon.recording import RecordedMessage, RecordingWriter
writer = RecordingWriter(Path(sys.argv[1]), flush_interval_s=1e9)
for at in range(3000):
    writer.write(RecordedMessage(received_ns=at, frames=(os.urandom(100),)))
writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@NAMES
def test_a_killed_recorder_leaves_all_up_to_its_last_flush(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    process = subprocess.run([sys.executable, "-c", _KILLED, path], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [one.received_ns for one in Recording(path)] == list(range(3000))


def test_messages_are_flushed_by_age(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl.gz"
    with RecordingWriter(path, flush_interval_s=0.0) as writer:
        writer.write(message(1))
        assert list(Recording(path)) == [message(1)]


def test_a_message_that_waits_is_flushed_when_due(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl"
    with RecordingWriter(path, flush_interval_s=0.05) as writer:
        writer.write(message(1))
        assert list(Recording(path)) == []
        os.sched_yield()
        while not path.stat().st_size:
            writer.flush_if_due()
        assert list(Recording(path)) == [message(1)]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl"
    path.write_text("precious")
    with pytest.raises(RecordingError, match="exists already"):
        RecordingWriter(path)
    assert path.read_text() == "precious"


def test_a_full_disk_is_a_recording_error(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "stream.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    writer.write(message(1))
    with pytest.raises(RecordingError, match="No space left"):
        writer.flush()
    with pytest.raises(RecordingError, match="No space left"):
        writer.close()


@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        (line(1) + b"nonsense\n", 2, "is no recorded message"),
        (line(1) + b'{"t": 1}\n', 2, "missing required field `frames`"),
        (line(1) + b'{"t": 1, "frames": ["!"]}\n', 2, "is no recorded message"),
        (line(1) + b"\n" + line(2), 2, "is no recorded message"),
        (line(1) + line(2) + line(3)[:20], 3, "the last line is cut off"),
        (line(1) + line(2) + b'{"t":1,"frames":["' + b"A" * 400 + b'"]}\n', 3, "is longer than 300 bytes"),
    ],
)
@NAMES
def test_a_bad_line_is_named_after_the_good_ones(
    tmp_path: Path, name: str, text: bytes, number: int, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    good: list[RecordedMessage] = []
    with pytest.raises(RecordingError) as refused:
        good.extend(Recording(path, max_line_bytes=300))
    assert str(refused.value).startswith(f"{path}:{number}: ")
    assert reason in str(refused.value)
    assert refused.value.line == number


def test_damaged_gzip_data_is_a_recording_error(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl.gz"
    path.write_bytes(b"no gzip at all")
    with pytest.raises(RecordingError, match="the gzip data is damaged"):
        list(Recording(path))


def test_a_file_that_is_not_there_is_a_recording_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="No such file"):
        list(Recording(tmp_path / "absent.jsonl"))


def test_a_compressed_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20)))
    tracemalloc.start()
    with pytest.raises(RecordingError, match="is longer than"):
        list(Recording(path, max_line_bytes=1 << 20))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_only_three_frames_with_an_eight_byte_number_have_a_sequence_number() -> None:
    assert message(7).seq == 7
    assert RecordedMessage(received_ns=0, frames=(b"", b"\x07", b"payload")).seq is None
    assert RecordedMessage(received_ns=0, frames=(b"", bytes(8), b"", b"")).seq is None
    assert RecordedMessage(received_ns=0, frames=()).payload == b""
