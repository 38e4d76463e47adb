"""What a start finds wrong with an index of any backend is in the log and in the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcensus.backends.model import Cursor
from kvcensus.backends.registry import open_backend, why_unusable
from tests.backends.building import blocks, store

from .daemon_process import DaemonProcess

UNFINISHED = b"\x07" * 5


def made(backend: str, directory: Path) -> DaemonProcess:
    """A daemon over an index that has a stream of a bus, which it does not drop."""
    index = open_backend(backend, directory / "data")
    for seq in range(3):
        cursor = Cursor("w", 1, seq, b"print", source="bus", worker_id="w")
        index.apply([store(*blocks(*range(seq, seq + 3)), worker="w")], [cursor])
    index.close()
    config = directory / "kvcensus.toml"
    config.write_text(
        f"[{backend}]\non_corrupt = 'rebuild'\n[[nats]]\nname = 'bus'\ntype = 'vllm'\n[nats.connection]\nservers = ['nats://127.0.0.1:1']"
    )
    return DaemonProcess(directory, "--config", str(config), backend=backend)


def logged(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in daemon.log() if line["event"] == event]


def test_an_unfinished_write_is_cut_and_told(tmp_path: Path) -> None:
    daemon = made("filesystem", tmp_path)
    (segment,) = (tmp_path / "data" / "journal").glob("journal-*")
    with segment.open("ab") as file:
        file.write(UNFINISHED)
    with daemon:
        (line,) = logged(daemon, "unfinished_write_cut")
        assert line["bytes"] == len(UNFINISHED)
        assert len(daemon.snapshot()) == 5
        assert daemon.metric("kvcensus_backend_began_anew") == 0


@pytest.mark.parametrize("backend", ["filesystem", "rocksdb"])
def test_a_damaged_index_is_moved_aside_and_told(backend: str, tmp_path: Path) -> None:
    if problem := why_unusable(backend):
        pytest.skip(problem)
    daemon = made(backend, tmp_path)
    damage(tmp_path / "data")
    with daemon:
        (line,) = logged(daemon, "index_moved_aside")
        assert Path(line["to"]).is_dir()
        assert "damaged" in line["reason"]
        assert daemon.snapshot() == []
        assert daemon.metric("kvcensus_backend_began_anew") == 1


def damage(data: Path) -> None:
    """Another byte in the middle of the file that has the records."""
    files = [*data.glob("journal/journal-*"), *data.glob("rocksdb/MANIFEST-*")]
    path = max(files, key=lambda one: one.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
