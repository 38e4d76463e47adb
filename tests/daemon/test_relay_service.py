"""The relay as a whole, without its process: a start that fails, a stop, a reload."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcensus.backends.errors import BackendFull
from kvcensus.daemon.config import Config, load_config
from kvcensus.daemon.relay.convention import Address
from kvcensus.daemon.relay.record import Position, Record
from kvcensus.daemon.relay.service import RelayService
from kvcensus.daemon.service import Service
from kvcensus.daemon.streams.delivery import Control


def configured(directory: Path) -> Config:
    file = directory / "relay.toml"
    file.write_text(
        f'data_dir = "{directory}/data"\n[relay]\nstream = "KV"\nspool_dir = "{directory}/spool"\n'
        '[relay.connection]\nservers = ["nats://127.0.0.1:1"]\n'
        '[[sources]]\nname = "w"\nendpoint = "tcp://127.0.0.1:1"\n'
    )
    return load_config(file, {})


def test_a_start_that_fails_midway_says_why_and_gives_the_spool_back(tmp_path: Path) -> None:
    config = configured(tmp_path)
    relay = RelayService(config)
    relay.publisher.start()
    try:
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            relay.start()
    finally:
        relay.stop(1.0)
    RelayService(config).stop(1.0)


def test_a_daemon_whose_start_fails_gives_its_index_back(tmp_path: Path) -> None:
    config = configured(tmp_path)
    Service(config).stop(1.0)
    Service(config).stop(1.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_a_full_disk_does_not_make_the_end_a_failure(tmp_path: Path) -> None:
    disk = tmp_path / "spool"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        relay = RelayService(configured(tmp_path))
        for first in range(0, 400, 20):
            records = [
                Record(Address("w", None), 1, seq, Control.NONE, 1, bytes(3000)) for seq in range(first, first + 20)
            ]
            relay.spool.commit(records, [])
        relay.publisher._window.through = 1
        relay.publisher._published["w"] = Position(1, 0)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(BackendFull):
            relay.spool.commit([], [], 1, [("w", Position(1, 0))])
        assert not relay.stop(1.0)
        (disk / "ballast").unlink()
        again = RelayService(configured(tmp_path))
        assert again.spool.waiting == 400
        again.stop(1.0)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
