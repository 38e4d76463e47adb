"""The relay as a whole, without its process: a start that fails, a stop, a reload."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcensus.daemon.config import Config, load_config
from kvcensus.daemon.relay.service import RelayService
from kvcensus.daemon.service import Service


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
