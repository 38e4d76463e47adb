"""`kvcensus check --probe` against engines over real sockets: what is there, what is not, and why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import zmq
from click.testing import CliRunner

from kvcensus.daemon.bench.processes import free_port
from kvcensus.daemon.cli import main

from ..dynamo_captures import messages_of
from .daemon_process import DaemonProcess, wait_until
from .probing import Meanwhile, engine_of, probe, probed, publishing, repeating, source

NOBODY = "tcp://127.0.0.1:1"


def test_an_engine_at_work(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.32.0-lora", 30)
    exit_code, findings = probed(tmp_path, source(engine), publishing(engine, 20))
    engine.stop()
    assert exit_code == 0
    assert findings["reached"] is True
    (found,) = findings["streams"]
    assert (found["reached"], found["messages"], found["frames"], found["topics"]) == (True, 20, [3], [""])
    assert found["numbers"] == {"first": 30, "last": 49, "missing": 0, "backwards": 0}
    assert found["payloads"]["releases"] == {"vllm": [["0.26.0", ""]]}
    assert found["payloads"]["form"] == ["maps"]
    assert found["payloads"]["adapters"] == ["adapter-a", "adapter-b"]
    assert found["payloads"]["hashes"] == ["integers, unsigned"]
    assert found["payloads"]["block_sizes"] == [32]
    assert 0 <= found["payloads"]["behind_ms"] < 500
    assert found["replay"]["topic"] is True
    assert (found["replay"]["oldest"], found["replay"]["newest"]) == (0, 49)
    assert found["warnings"] == []


def test_an_engine_at_work_is_asked_for_its_messages_only_twice(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.32.0-basic", 50)
    probed(tmp_path, source(engine), publishing(engine, 5))
    assert engine.replay_requests == 2
    engine.stop()


def test_an_idle_engine_is_known_by_its_replay_socket(tmp_path: Path) -> None:
    engine = engine_of("sglang-0.5.23-evict", 100, buffer_steps=20)
    found = probed(tmp_path, source(engine, type="sglang")).stream
    engine.stop()
    assert found["messages"] == 0
    assert found["payloads"]["releases"] == {"sglang": [["0.5.22", ""]]}
    assert found["payloads"]["behind_ms"] is None
    assert (found["replay"]["oldest"], found["replay"]["newest"]) == (81, 100)


def test_an_engine_that_published_nothing_yet(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.12.0-basic")
    exit_code, printed = probe(tmp_path, source(engine), arguments=())
    engine.stop()
    assert exit_code == 0
    assert "without the topic; it has no messages: the engine published nothing yet" in printed


def test_an_idle_engine_without_a_replay_socket_says_nothing(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.12.0-basic", 10, replay_bind="")
    exit_code, printed = probe(tmp_path, source(engine), arguments=())
    engine.stop()
    assert exit_code == 0
    assert "none in 1 s: an idle engine publishes nothing" in printed
    assert printed.endswith("1 of 1 reached\n")


def test_each_rank_is_a_block_and_one_that_is_missing_ends_with_69(tmp_path: Path) -> None:
    port = free_port()
    first = engine_of("vllm-0.32.0-basic", live=f"tcp://127.0.0.1:{port}", replay_bind="")
    exit_code, findings = probed(tmp_path, source(first, ranks=2))
    first.stop()
    assert exit_code == 69
    assert [one["stream"] for one in findings["streams"]] == ["gpu-7/0", "gpu-7/1"]
    assert [one["reached"] for one in findings["streams"]] == [True, False]
    assert findings["streams"][1]["problem"] == f"nothing listens at tcp://127.0.0.1:{port + 1}"


def test_a_replay_socket_that_is_mute(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.32.0-basic", 10)
    engine.mute()
    exit_code, findings = probed(tmp_path, source(engine), publishing(engine, 3))
    engine.stop()
    assert exit_code == 69
    (found,) = findings["streams"]
    assert found["messages"] == 3
    assert found["replay"]["reached"] is False
    assert "takes requests and answers none within 2.5 s: a busy engine" in found["replay"]["problem"]
    assert "replay_timeout_ms" in found["replay"]["problem"]


def test_endpoints_that_were_mixed_up(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.32.0-basic", 10)
    exit_code, findings = probed(
        tmp_path, source(engine, endpoint=engine.replay_endpoint, replay_endpoint=engine.endpoint)
    )
    engine.stop()
    assert exit_code == 69
    (found,) = findings["streams"]
    assert "another kind of ZMQ socket and no publisher: is it the replay endpoint?" in found["problem"]
    assert "another kind of ZMQ socket and replays nothing: is it the live endpoint?" in found["replay"]["problem"]


def test_what_does_not_speak_zmq(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        exit_code, findings = probed(tmp_path, f"[[sources]]\nendpoint = '{endpoint}'\n")
    assert exit_code == 69
    assert findings["streams"][0]["problem"] == f"something takes connections at {endpoint} and does not speak ZMQ"


def test_a_host_without_an_address_and_a_socket_without_a_file(tmp_path: Path) -> None:
    toml = "[[sources]]\nendpoint = 'tcp://nobody.invalid:1'\n[[sources]]\nendpoint = 'ipc:///nobody/here'\n"
    exit_code, findings = probed(tmp_path, toml)
    assert exit_code == 69
    host, file = (one["problem"] for one in findings["streams"])
    assert "the name of the host cannot be resolved" in host
    assert "there is no such socket" in file


def test_an_engine_that_connects(tmp_path: Path) -> None:
    port = free_port()
    engine = engine_of("vllm-0.32.0-basic", live=f"tcp://127.0.0.1:{port}", live_binds=False, replay_bind="")
    exit_code, findings = probed(tmp_path, source(engine, bind=True), publishing(engine, 4))
    engine.stop()
    (found,) = findings["streams"]
    assert (exit_code, found["reached"], found["publishers"], found["messages"]) == (0, True, 1, 4)


def test_nobody_connects_and_an_address_that_is_taken(tmp_path: Path) -> None:
    toml = f"[[sources]]\nendpoint = 'tcp://127.0.0.1:{free_port()}'\nbind = true\n"
    exit_code, findings = probed(tmp_path, toml)
    assert exit_code == 69
    assert "nobody connected to" in findings["streams"][0]["problem"]
    with DaemonProcess(tmp_path, "--config", str(tmp_path / "probed.toml")):
        exit_code, findings = probed(tmp_path, toml)
    assert exit_code == 69
    assert findings["streams"][0]["problem"].endswith("is taken: a daemon that runs with this configuration has it")


def published_frames(name: str) -> tuple[str, Meanwhile, Callable[[], object]]:
    """An endpoint that publishes captured frames: how to publish all of them, and how to end it."""
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")

    def publish(ended: threading.Event) -> None:
        if publisher.poll(20_000):
            publisher.recv()
            for one in messages_of(name):
                publisher.send_multipart(one.frames)

    return f"tcp://127.0.0.1:{port}", publish, lambda: context.destroy(linger=0)


def test_dynamo_over_zmq(tmp_path: Path) -> None:
    endpoint, publish, end = published_frames("dynamo-1.6.1-zmq")
    toml = f"[[sources]]\nname = 'dynamo'\ntype = 'dynamo'\nendpoint = '{endpoint}'\n"
    exit_code, findings = probed(tmp_path, toml, publish)
    end()
    assert exit_code == 0
    (bus,) = findings["buses"]
    assert bus["messages"] == len(messages_of("dynamo-1.6.1-zmq"))
    assert bus["formats"] == ["msgpack, many events each in an envelope"]
    assert bus["releases"] == {"dynamo": [["1.5", ""]]}
    assert bus["publishers"] >= 1
    assert len(bus["workers"]) >= 2
    assert bus["refused_messages"] == 0


def test_dynamo_that_is_not_there(tmp_path: Path) -> None:
    exit_code, findings = probed(tmp_path, f"[[sources]]\ntype = 'dynamo'\nendpoint = '{NOBODY}'\n")
    assert exit_code == 69
    assert findings["buses"][0]["problem"] == f"nothing listens at {NOBODY}"


def test_the_daemon_beside_it_misses_nothing(tmp_path: Path) -> None:
    engine = engine_of("vllm-0.32.0-evict", 40)
    toml = source(engine)
    (tmp_path / "kvcensus.toml").write_text(toml)
    with DaemonProcess(tmp_path, "--config", str(tmp_path / "kvcensus.toml")) as daemon:
        engine.wait_subscribers()
        assert probed(tmp_path, toml, repeating(lambda: engine.publish(2))).stream["messages"] > 0
        engine.publish(1)
        last = engine.published_count - 1
        wait_until(lambda: daemon.stream()["last_seq"] == last, "the daemon is there")
        assert daemon.stream()["epoch"] == 1
    engine.stop()


def test_seconds_go_with_a_probe(tmp_path: Path) -> None:
    config = tmp_path / "kvcensus.toml"
    config.write_text("")
    ended = CliRunner().invoke(main, ["check", "--config", str(config), "--probe-s", "3"])
    assert ended.exit_code == 2
    assert "--probe-s goes with --probe" in ended.output
    assert probe(tmp_path, "", arguments=())[1].endswith("nothing to look at\n")
