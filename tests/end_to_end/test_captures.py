"""Every captured vLLM engine, through real sockets and the real daemon, against the engine's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.engine_sockets import ReplayFraming
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES, Stage, capture_names, load_capture
from ..valkey_servers import why_untested, with_server
from .daemon_process import DaemonProcess, wait_until

NAMES = capture_names("vllm")


def framing_of(name: str) -> ReplayFraming:
    return ReplayFraming.NEW if "0.32" in name else ReplayFraming.OLD


@pytest.fixture(scope="module", params=["memory", "lmdb", "filesystem", "rocksdb", "valkey", "holt"])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DaemonProcess, dict[str, ReplayedEngine]]]:
    """One daemon that follows every captured engine at once."""
    if missing := why_untested(request.param):
        pytest.skip(missing)
    directory: Path = tmp_path_factory.mktemp(request.param)
    engines = {
        name: ReplayedEngine(Recording(CAPTURES / f"{name}.jsonl.gz"), framing=framing_of(name)).start()
        for name in NAMES
    }
    config = directory / "kvcensus.toml"
    servers = with_server(request.param, {}).get("servers")
    table = f"[valkey]\nservers = {servers}\n" if servers else ""
    config.write_text(
        table
        + "".join(
            f'[[sources]]\nname = "{name}"\n'
            f'endpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"\n'
            f"count_copies = {'false' if 'fullreport' in name else 'true'}\n"
            for name, engine in engines.items()
        )
    )
    with DaemonProcess(directory, "--config", str(config), backend=request.param) as daemon:
        wait_until(lambda: all(s["state"] == "live" for s in daemon.streams().values()), "every stream is live")
        yield daemon, engines
    for engine in engines.values():
        engine.stop()


def assert_equals(daemon: DaemonProcess, name: str, stage: Stage, epoch: int) -> None:
    """The daemon's blocks and answers are the engine's."""
    last = stage.messages[-1].seq

    def arrived() -> bool:
        stream = daemon.streams()[name]
        return stream["last_seq"] == last and stream["epoch"] == epoch

    wait_until(arrived, f"message {last} of epoch {epoch} is committed")
    stream = daemon.streams()[name]
    held = daemon.copies()[stream["worker_id"]]
    counted = "fullreport" not in name
    assert held == (stage.copies if counted else dict.fromkeys(stage.copies, 1))
    for probe in stage.probes:
        assert daemon.match(probe.block_hashes).get(stream["worker_id"], 0) == probe.prefix_blocks
    assert stream["trust"] == "fresh"
    assert stream["messages"] == len(stage.messages)


@pytest.mark.parametrize("name", NAMES)
def test_the_index_is_the_engines_own_cache(fleet: tuple[DaemonProcess, dict[str, ReplayedEngine]], name: str) -> None:
    daemon, engines = fleet
    stages = load_capture(name).stages
    for epoch, stage in enumerate(stages, start=1):
        engines[name].publish(len(stage.messages))
        assert_equals(daemon, name, stage, epoch)
