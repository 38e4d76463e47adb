"""Every captured SGLang engine, through real sockets and the real daemon, against the engine's own radix tree.

SGLang's first message clears everything and leaves before anybody can have connected. The engines here have it in their
replay buffers only, as the captured ones had.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import RecordedMessage

from ..captures_reader import Message, Stage, capture_names, load_capture
from .daemon_process import DaemonProcess, wait_until

SMALL_BUFFER = "sglang-0.5.23-smallbuffer"
NAMES = [name for name in capture_names("sglang") if name != SMALL_BUFFER]


def recorded(message: Message) -> RecordedMessage:
    frames = (message.topic, message.seq.to_bytes(8, "big"), message.payload)
    return RecordedMessage(message.received_ns, frames)


def engine_of(name: str) -> ReplayedEngine:
    stages = load_capture(name).stages
    return ReplayedEngine([recorded(message) for stage in stages for message in stage.missed + stage.messages])


@pytest.fixture(scope="module", params=["memory", "lmdb"])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DaemonProcess, dict[str, ReplayedEngine]]]:
    """One daemon that follows every captured engine at once, and comes after their first message."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    engines = {name: engine_of(name).start() for name in NAMES}
    for engine in engines.values():
        engine.drop()
    config = directory / "kvcensus.toml"
    config.write_text(
        "".join(
            f'[[sources]]\nname = "{name}"\ntype = "sglang"\n'
            f'endpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"\n'
            for name, engine in engines.items()
        )
    )
    with DaemonProcess(directory, "--config", str(config), backend=request.param) as daemon:
        wait_until(lambda: all(s["last_seq"] == 0 for s in daemon.streams().values()), "the first clear is replayed")
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
    assert stream["worker_id"] == f"{name}/0"
    assert daemon.copies()[stream["worker_id"]] == stage.copies
    for probe in stage.probes:
        assert daemon.match(probe.block_hashes).get(stream["worker_id"], 0) == probe.prefix_blocks


@pytest.mark.parametrize("name", NAMES)
def test_the_index_is_the_engines_own_tree(fleet: tuple[DaemonProcess, dict[str, ReplayedEngine]], name: str) -> None:
    daemon, engines = fleet
    for epoch, stage in enumerate(load_capture(name).stages, start=1):
        assert [message.seq for message in stage.missed] == [0]
        if epoch > 1:
            engines[name].drop()
        engines[name].publish(len(stage.messages))
        assert_equals(daemon, name, stage, epoch)
        stream = daemon.streams()[name]
        assert stream["trust"] == "fresh"
        assert stream["messages"] == len(stage.missed) + len(stage.messages)


@pytest.mark.parametrize("backend", ["memory", "lmdb"])
def test_a_start_that_cannot_be_replayed_is_not_trusted(backend: str, tmp_path: Path) -> None:
    """The captured engine kept 20 messages, so its clear at the start was gone; from 1 on nothing is missing here."""
    (stage,) = load_capture(SMALL_BUFFER).stages
    assert stage.missed == ()
    with engine_of(SMALL_BUFFER) as engine:
        engine.publish(5)
        arguments = ["--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint]
        arguments += ["--engine-type", "sglang", "--worker", SMALL_BUFFER]
        with DaemonProcess(tmp_path, *arguments, backend=backend) as daemon:
            wait_until(lambda: daemon.stream()["last_seq"] == 5, "what was published before is replayed")
            engine.publish_rest()
            assert_equals(daemon, SMALL_BUFFER, stage, 1)
            stream = daemon.stream()
            assert stream["trust"] == "untrusted"
            assert stream["reason"] == "the engine's replay does not reach back to its start"


def test_an_old_release_is_refused_in_words(tmp_path: Path) -> None:
    """The form and the hashes of 0.5.1 to 0.5.5, whose pages say nothing of what is before them."""
    page = list(range(16))
    events = [["AllBlocksCleared"], ["BlockStored", [hash(tuple(page))], None, page, 16, None]]
    payload = msgspec.msgpack.encode([1.5, events, 0])
    with ReplayedEngine([RecordedMessage(0, (b"", bytes(8), payload))]) as engine:
        arguments = ["--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint]
        with DaemonProcess(tmp_path, *arguments, "--engine-type", "sglang", "--worker", "old") as daemon:
            wait_until(lambda: daemon.stream()["state"] == "live", "the stream is live")
            engine.publish()
            wait_until(lambda: daemon.stream()["last_seq"] == 0, "the message is committed")
            stream = daemon.stream()
            assert stream["trust"] == "untrusted"
            assert "SGLang before 0.5.6" in stream["reason"]
            assert daemon.snapshot() == []
            assert daemon.metric("kvcensus_stream_rejections_total", source="old", reason="release") == 1
