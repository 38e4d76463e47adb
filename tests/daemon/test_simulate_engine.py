"""`kvcensus simulate` and its sockets: live messages, replays, restarts, and the truth over HTTP."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

import pytest
import zmq

from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine
from kvcensus.daemon.simulate.rank import RankOptions
from kvcensus.daemon.simulate.truth import shown

END = b"\xff" * 8
RANK = RankOptions(cache=CacheOptions(blocks=96))


def replayed(endpoint: str, start: bytes) -> list[list[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        dealer.send_multipart([b"", start])
        got = []
        while dealer.poll(2000):
            got.append(dealer.recv_multipart())
            if got[-1][-2] == END:
                return got
        raise AssertionError(f"no end marker after {len(got)} messages")


@pytest.mark.parametrize(("form", "frames"), [("vllm-0.22", 3), ("vllm-0.32", 4)])
def test_the_ring_answers_from_a_number_of_any_width(form: str, frames: int) -> None:
    options = EngineOptions("e", 0, rank=RankOptions(form=form, cache=CacheOptions(blocks=96)), buffer_steps=10)
    with SimulatedEngine(options) as engine:
        (rank,) = engine.ranks
        rank.publish(15)
        for start, first in ((b"\x00", 5), (bytes(8), 5), (b"\x0c", 12), (b"\x00\x0d", 13), (b"\x63", 15)):
            *messages, end = replayed(rank.sockets.replay_endpoint, start)
            assert [int.from_bytes(one[-2], "big") for one in messages] == list(range(first, 15))
            assert {len(one) for one in (*messages, end)} == {frames}


def test_ranks_are_at_consecutive_ports_and_do_different_things() -> None:
    with SimulatedEngine(EngineOptions("e", 0, ranks=3, rank=RANK)) as engine:
        ports = [int(one.sockets.endpoint.rpartition(":")[2]) for one in engine.ranks]
        replay_ports = [int(one.sockets.replay_endpoint.rpartition(":")[2]) for one in engine.ranks]
        assert ports == [engine.base_port + rank for rank in range(3)]
        assert replay_ports == [engine.replay_port + rank for rank in range(3)]
        assert [one.worker_id for one in engine.ranks] == ["e/0", "e/1", "e/2"]
        payloads = {one.publish(1)[0].payload[10:] for one in engine.ranks}
        assert len(payloads) == 3


def test_a_restart_loses_the_ring_and_the_subscribers_come_back() -> None:
    with SimulatedEngine(EngineOptions("e", 0, rank=RANK)) as engine, zmq.Context() as context:
        (rank,) = engine.ranks
        with context.socket(zmq.SUB) as subscriber:
            subscriber.subscribe(b"")
            subscriber.reconnect_ivl = 20
            subscriber.connect(rank.sockets.endpoint)
            assert rank.sockets.wait_subscribers(1, 5)
            rank.publish(5)
            assert [subscriber.recv_multipart()[1][-1] for _ in range(5)] == list(range(5))
            rank.restart()
            assert rank.truth().life == 2
            assert len(replayed(rank.sockets.replay_endpoint, b"\x00")) == 1
            subscriber.poll(300)  # libzmq sends the subscription anew only while its socket is used
            assert rank.sockets.wait_subscribers(1, 5)
            rank.publish(1)
            assert subscriber.recv_multipart()[1] == bytes(8)


@contextmanager
def simulated(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "simulate", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def test_the_command_prints_where_its_engines_are_and_what_they_hold() -> None:
    arguments = "--engines 2 --ranks 2 --blocks 128 --messages 30 --rate 0 --seed 3 --truth 0"
    with simulated(*arguments.split()) as (process, printed):
        names = [(engine["name"], [one["worker_id"] for one in engine["ranks"]]) for engine in printed["engines"]]
        assert names == [("sim-0", ["sim-0/0", "sim-0/1"]), ("sim-1", ["sim-1/0", "sim-1/1"])]
        assert process.stderr is not None
        assert process.stderr.readline() == "published 120 messages\n"
        with urlopen(printed["truth"]) as answer:
            truth = json.load(answer)
        assert {one["last_seq"] for one in truth.values()} == {29}
        options = RankOptions(cache=CacheOptions(blocks=128))
        with SimulatedEngine(EngineOptions("sim-0", 3, ranks=2, rank=options)) as same:
            for one in same.ranks:
                one.publish(30)
                assert truth[one.worker_id] == shown(one.truth())
        replay = printed["engines"][1]["ranks"][1]["replay_endpoint"]
        assert len(replayed(replay, b"\x00")) == 31
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_the_command_refuses_byte_hashes_where_the_release_had_none() -> None:
    command = [
        sys.executable,
        "-m",
        "kvcensus.daemon.cli",
        "simulate",
        "--format",
        "sglang-0.5.20",
        "--hashes",
        "sha256",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert "integer hashes only" in ended.stderr
