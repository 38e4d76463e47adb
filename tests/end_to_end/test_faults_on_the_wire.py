"""What a broken or hostile publisher sends: named, counted, its good events applied, the daemon alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from .daemon_process import DaemonProcess, wait_until

HASH = 0x1122334455667788
STORED = {
    "type": "BlockStored",
    "block_hashes": [HASH],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 4,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}
encode = msgspec.msgpack.encode


def batch(*events: object) -> bytes:
    return encode([1.5, events, 0])


def stored(value: int, **fields: object) -> dict[str, object]:
    return {**STORED, "block_hashes": [value], **fields}


class Peer:
    """A publisher that sends whatever it is told to."""

    def __init__(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.XPUB)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"

    def send(self, seq: int, payload: bytes) -> None:
        self.socket.send_multipart([b"", seq.to_bytes(8, "big"), payload])


@pytest.fixture
def peer() -> Iterator[Peer]:
    one = Peer()
    yield one
    one.socket.close()


@pytest.fixture
def daemon(tmp_path: Path, peer: Peer) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, "--engine", peer.endpoint, "--worker", "w", "--model", "m") as one:
        assert peer.socket.poll(5000)
        peer.socket.recv()
        yield one


BAD_PAYLOADS: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "payload", ""),
    "truncated": (batch(STORED)[:-20], "payload", ""),
    "another shape": (encode({"a": 1}), "payload", ""),
    "2 GiB length header": (b"\x93\xcb" + bytes(8) + b"\xdd\x7f\xff\xff\xff", "payload", ""),
    "deep nesting": (b"\x93\xcb" + bytes(8) + b"\x91" * 100_000, "payload", ""),
    "unknown event": (batch({"type": "BlockFrobbed"}), "event_type", "events[0]"),
    "hash of a wrong type": (batch(stored(1, block_hashes=["x"])), "block_hash", "events[0].block_hashes"),
    "unknown medium": (batch(stored(1, medium="TAPE")), "medium", "events[0].medium"),
    "another rank": (encode([1.5, [STORED], 7]), "rank", "data_parallel_rank"),
}


@pytest.mark.parametrize("name", BAD_PAYLOADS)
def test_a_bad_payload_is_named_and_counted_and_the_stream_goes_on(
    daemon: DaemonProcess, peer: Peer, name: str
) -> None:
    payload, reason, field = BAD_PAYLOADS[name]
    peer.send(0, batch(stored(HASH)))
    peer.send(1, payload)
    peer.send(2, batch(stored(2)))
    wait_until(lambda: daemon.stream()["last_seq"] == 2, "the stream goes on")
    assert set(daemon.copies()["w/0"]) == {(HASH.to_bytes(8, "big"), 0), ((2).to_bytes(8, "big"), 0)}
    assert sum_of_rejections(daemon) == 1
    refused = [line for line in daemon.log() if line["event"] in ("message_refused", "event_refused")]
    assert len(refused) == 1
    assert (refused[0]["source"], refused[0]["seq"], refused[0]["epoch"]) == ("w", 1, 1)
    assert refused[0]["reason"] == reason
    assert field in refused[0]["field"]
    assert refused[0]["detail"]


def sum_of_rejections(daemon: DaemonProcess) -> float:
    _, body = daemon.request("GET", "/metrics", accept="text/plain")
    lines = [line for line in body.decode().splitlines() if line.startswith("kvcensus_stream_rejections_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_an_event_that_is_refused_does_not_cost_its_siblings(daemon: DaemonProcess, peer: Peer) -> None:
    peer.send(0, batch(stored(1), {"type": "BlockFrobbed"}, ["BlockStored"], stored(2, medium="TAPE"), stored(3)))
    wait_until(lambda: daemon.stream()["last_seq"] == 0, "the message is committed")
    assert {int.from_bytes(one, "big") for one, _ in daemon.copies()["w/0"]} == {1, 3}
    assert sum_of_rejections(daemon) == 3
    assert daemon.stream()["trust"] == "untrusted"
    assert "BlockFrobbed" in daemon.stream()["reason"]


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"", b""], [b"", b"", b"", b""], [b"", b"short", b"x"], [b"", bytes(8), b"x", b"y"]],
    ids=lambda frames: f"{len(frames)} frames",
)
def test_a_message_that_is_not_three_frames_is_counted(daemon: DaemonProcess, peer: Peer, frames: list[bytes]) -> None:
    peer.socket.send_multipart(frames)
    peer.send(0, batch(stored(1)))
    wait_until(lambda: daemon.stream()["last_seq"] == 0, "the stream goes on")
    assert daemon.metric("kvcensus_stream_malformed_messages_total", source="w") == 1


def test_a_message_over_the_size_limit_breaks_only_the_connection(tmp_path: Path, peer: Peer) -> None:
    config = tmp_path / "kvcensus.toml"
    config.write_text(f'[[sources]]\nname = "w"\nendpoint = "{peer.endpoint}"\nmax_message_bytes = 1000\n')
    with DaemonProcess(tmp_path, "--config", str(config)) as daemon:
        assert peer.socket.poll(5000)
        peer.socket.recv()
        peer.send(0, batch(stored(1)))
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "the first message is committed")
        peer.send(1, bytes(2000))
        wait_until(lambda: daemon.metric("kvcensus_stream_disconnects_total", source="w") >= 1, "it disconnects")
        wait_until(lambda: daemon.stream()["state"] == "live", "it connects again")
        keep_sending(peer, daemon, lambda: daemon.stream()["last_seq"] >= 2)
        assert daemon.stream()["trust"] == "untrusted"


def keep_sending(peer: Peer, daemon: DaemonProcess, done: Callable[[], bool]) -> None:
    seq = 2

    def step() -> bool:
        nonlocal seq
        peer.send(seq, batch(stored(seq)))
        seq += 1
        return done()

    wait_until(step, "messages arrive again")


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 64, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/match HTTP/1.1\r\nContent-Length: -5\r\n\r\n"]
)
def test_http_garbage_is_answered_or_cut_and_nothing_else(daemon: DaemonProcess, garbage: bytes) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as connection:
        connection.sendall(garbage)
        answer = connection.recv(65536)
    assert answer == b"" or answer.startswith(b"HTTP/1."), answer
    assert b"Traceback" not in answer
    assert daemon.get("/readyz")["ready"] is True
