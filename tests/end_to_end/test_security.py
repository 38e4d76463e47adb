"""The real daemon among strangers: keys on the wire, secrets that stay secret, files that stay ours, memory."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from ..daemon.certificates import authority, signed
from .daemon_process import DaemonProcess, wait_until

TOKEN = "0123456789abcdef-a-secret"
KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]
MIB = 1 << 20
encode = msgspec.msgpack.encode


def kvcensus(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [*KVCENSUS, *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


def make_keys(directory: Path, name: str) -> tuple[Path, Path]:
    assert kvcensus("keys", directory, "--name", name).returncode == 0
    return directory / f"{name}.key", directory / f"{name}.key_secret"


def stored(*hashes: int) -> bytes:
    event = {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": [1] * len(hashes),
        "block_size": 1,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return encode([time.time(), [event], None])


class Publisher:
    """A proxy in front of an engine: PUB, and a ROUTER that answers replays with all that was sent."""

    def __init__(self, secret_key_file: Path | None = None) -> None:
        self._context = zmq.Context()
        self.live, self.replay = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        for socket in (self.live, self.replay):
            socket.linger = 0
            if secret_key_file is not None:
                socket.curve_publickey, socket.curve_secretkey = zmq.auth.load_certificate(secret_key_file)
                socket.curve_server = True
        self.endpoint = f"tcp://127.0.0.1:{self.live.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay_endpoint = f"tcp://127.0.0.1:{self.replay.bind_to_random_port('tcp://127.0.0.1')}"
        self.sent: list[bytes] = []

    def send(self, payload: bytes) -> None:
        self.live.send_multipart([b"", len(self.sent).to_bytes(8, "big"), payload])
        self.sent.append(payload)

    def answer_replay(self) -> None:
        assert self.replay.poll(10_000), "nobody asked for a replay"
        peer, _, start = self.replay.recv_multipart()
        for seq in range(int.from_bytes(start, "big"), len(self.sent)):
            self.replay.send_multipart([peer, b"", b"", seq.to_bytes(8, "big"), self.sent[seq]])
        self.replay.send_multipart([peer, b"", b"", b"\xff" * 8, b""])

    @contextmanager
    def admitting_only(self, directory: Path) -> Iterator[None]:
        """Keys in `directory` only. It has to begin before anybody connects."""
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve(domain="*", location=str(directory))
        try:
            yield
        finally:
            authenticator.stop()

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def publishing(secret_key_file: Path | None = None) -> Iterator[Publisher]:
    publisher = Publisher(secret_key_file)
    try:
        yield publisher
    finally:
        publisher.close()


def source(publisher: Publisher, **settings: str | Path | int) -> str:
    lines = [
        f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in settings.items()
    ]
    return "\n".join(
        [
            "[[sources]]",
            'name = "w"',
            f'endpoint = "{publisher.endpoint}"',
            f'replay_endpoint = "{publisher.replay_endpoint}"',
            "reconnect_max_ms = 200",
            *lines,
            "",
        ]
    )


def configured(directory: Path, text: str) -> DaemonProcess:
    file = directory / "kvcensus.toml"
    file.write_text(text)
    return DaemonProcess(directory, "--config", str(file))


# CURVE


def test_a_stream_behind_curve_is_followed_and_replayed(tmp_path: Path) -> None:
    server, server_secret = make_keys(tmp_path / "server", "proxy")
    _, own = make_keys(tmp_path / "own", "kvcensus")
    with publishing(server_secret) as publisher:
        publisher.sent.append(stored(1))
        settings = source(publisher, curve_server_key_file=server, curve_secret_key_file=own)
        with configured(tmp_path, settings) as daemon:
            assert publisher.live.poll(10_000)
            publisher.answer_replay()
            publisher.send(stored(2))
            wait_until(lambda: daemon.stream()["last_seq"] == 1, "both messages are applied")
            assert {block for block, _ in daemon.copies()["w"]} == {(1).to_bytes(8, "big"), (2).to_bytes(8, "big")}
            assert daemon.metric("kvcensus_stream_handshake_failures_total", source="w") == 0


def test_a_server_with_another_key_is_not_followed_and_said_so(tmp_path: Path) -> None:
    _, server_secret = make_keys(tmp_path / "server", "proxy")
    other, own = make_keys(tmp_path / "own", "kvcensus")
    with publishing(server_secret) as publisher:
        refused(tmp_path, publisher, source(publisher, curve_server_key_file=other, curve_secret_key_file=own))


def test_a_server_without_curve_is_not_followed_and_said_so(tmp_path: Path) -> None:
    server, own = make_keys(tmp_path / "own", "kvcensus")
    with publishing() as publisher:
        refused(tmp_path, publisher, source(publisher, curve_server_key_file=server, curve_secret_key_file=own))


def test_without_keys_a_server_with_curve_is_not_followed_and_said_so(tmp_path: Path) -> None:
    _, server_secret = make_keys(tmp_path / "server", "proxy")
    with publishing(server_secret) as publisher:
        refused(tmp_path, publisher, source(publisher))


def test_a_key_that_the_server_does_not_admit_is_said_so(tmp_path: Path) -> None:
    server, server_secret = make_keys(tmp_path / "server", "proxy")
    _, own = make_keys(tmp_path / "own", "kvcensus")
    admitted = tmp_path / "admitted"
    admitted.mkdir()
    make_keys(admitted, "somebody-else")
    with publishing(server_secret) as publisher, publisher.admitting_only(admitted):
        refused(tmp_path, publisher, source(publisher, curve_server_key_file=server, curve_secret_key_file=own))


def refused(directory: Path, publisher: Publisher, settings: str) -> None:
    with configured(directory, settings) as daemon:
        wait_until(lambda: daemon.metric("kvcensus_stream_handshake_failures_total", source="w") >= 2, "it fails twice")
        publisher.send(stored(1))
        time.sleep(0.3)
        stream = daemon.stream()
        assert stream["state"] in ("connecting", "disconnected")
        assert (stream["trust"] != "fresh", stream["last_seq"]) == (True, -1)
        lines = [line for line in daemon.log() if line["event"] == "handshake_failed"]
        assert lines
        assert lines[0]["endpoint"] == publisher.endpoint


@pytest.mark.parametrize(
    ("server", "own", "at", "reason"),
    [
        ("nowhere", "good", "curve_server_key_file", "nowhere: No such file"),
        ("good", "nowhere", "curve_secret_key_file", "nowhere: No such file"),
        ("text", "good", "curve_server_key_file", "text: has no line public-key"),
        ("good", "public", "curve_secret_key_file", "public: has no lines"),
        ("good", None, "curve_secret_key_file", "is needed"),
        (None, "good", "curve_server_key_file", "is needed"),
    ],
)
def test_keys_that_cannot_be_used_are_named(
    tmp_path: Path, server: str | None, own: str | None, at: str, reason: str
) -> None:
    make_keys(tmp_path, "k")
    (tmp_path / "k.key").rename(tmp_path / "public")
    (tmp_path / "k.key_secret").rename(tmp_path / "good")
    (tmp_path / "text").write_text("nothing\n")
    lines = ["[[sources]]", 'endpoint = "tcp://a:1"']
    lines += [f'curve_server_key_file = "{tmp_path / server}"'] if server else []
    lines += [f'curve_secret_key_file = "{tmp_path / own}"'] if own else []
    config = tmp_path / "c.toml"
    config.write_text("\n".join(lines))
    ended = kvcensus("check", "--config", config)
    assert ended.returncode == 78
    assert f"sources[0].{at}: " in ended.stderr
    assert reason in ended.stderr
    secret_key = (tmp_path / "good").read_text().partition('secret-key = "')[2][:40]
    assert secret_key not in ended.stdout + ended.stderr


def test_keys_are_made_for_their_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    public, secret = make_keys(tmp_path / "new", "a")
    assert mode(tmp_path / "new") == 0o700
    assert mode(secret) == 0o600
    assert zmq.auth.load_certificate(public) == (zmq.auth.load_certificate(secret)[0], None)
    before = secret.read_bytes()
    ended = kvcensus("keys", tmp_path / "new", "--name", "a")
    assert ended.returncode == 74
    assert "exists already" in ended.stderr
    assert secret.read_bytes() == before


# Secrets and files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_no_secret_is_ever_told(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    server = signed(tmp_path, "server", ca)
    token_file = tmp_path / "tokens"
    token_file.write_text(f"{TOKEN}\n")
    proxy, proxy_secret = make_keys(tmp_path / "server", "proxy")
    _, own = make_keys(tmp_path / "own", "kvcensus")
    http = f'[http]\ntoken_file = "{token_file}"\ntls_certificate = "{server.certificate}"\ntls_key = "{server.key}"\n'
    with publishing(proxy_secret) as publisher:
        settings = source(publisher, curve_server_key_file=proxy, curve_secret_key_file=own)
        daemon = configured(tmp_path, f'{http}[log]\nlevel = "debug"\n{settings}')
        checked = [kvcensus("check", "--config", tmp_path / "kvcensus.toml", *flags) for flags in ((), ("--json",))]
        address = f"https://127.0.0.1:{daemon.port}"
        ours = ("--http", address, "--tls-ca", ca.certificate, "--token-file", token_file)
        try:
            daemon.start(wait=False)
            wait_until(lambda: kvcensus("query", "streams", *ours).returncode == 0, "the daemon answers")
            told = [kvcensus("query", what, "--json", *ours) for what in ("streams", "workers")]
            wrong = tmp_path / "wrong"
            wrong.write_text(f"{TOKEN}x\n")
            strangers = [
                kvcensus("query", "streams", "--http", address, "--tls-ca", ca.certificate),
                kvcensus("query", "streams", "--http", address, "--tls-ca", ca.certificate, "--token-file", wrong),
                kvcensus("query", "streams", "--http", address, "--token-file", token_file),
            ]
            assert [one.returncode for one in strangers] == [1, 1, 69]
            assert "bearer token" in strangers[0].stderr
        finally:
            daemon.terminate()
    said = "".join(one.stdout + one.stderr for one in checked + told + strangers) + daemon.log_path.read_text()
    assert "token_refused" in said
    assert "can be read by others" in said
    secrets = {TOKEN, *(str(key, "ascii") for key in zmq.auth.load_certificate(own) if key)}
    secrets |= set(server.key.read_text().splitlines()[1:-1])
    assert [one for one in secrets if one in said] == []


def test_a_token_in_a_broken_request_is_not_logged(tmp_path: Path) -> None:
    with publishing() as publisher, configured(tmp_path, f'[log]\nlevel = "debug"\n{source(publisher)}') as daemon:
        import socket

        for broken in (f"Authorization: Bearer {TOKEN}\x00", f"Auth orization: {TOKEN}", f"{TOKEN}"):
            with socket.create_connection(("127.0.0.1", daemon.port)) as connection:
                connection.sendall(f"GET / HTTP/1.1\r\nHost: a\r\n{broken}\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.0 400")
        assert "Traceback" not in daemon.log_path.read_text()
        assert TOKEN not in daemon.log_path.read_text()


def test_files_are_ours_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with publishing() as publisher, configured(tmp_path, source(publisher)) as daemon:
            publisher.answer_replay()
            publisher.send(stored(1))
            publisher.send(b"no msgpack")
            wait_until(lambda: daemon.stream()["last_seq"] == 1, "both are applied")
            daemon.snapshot()
            daemon.terminate()
    finally:
        os.umask(before)
    data = tmp_path / "data"
    assert mode(data) == 0o700
    found = {path.name: mode(path) for path in data.rglob("*") if path.is_file()}
    assert {"index.mdb", "index.mdb-lock", "owner.lock", "boot.json"} <= found.keys()
    assert any("quarantine" in name for name in found)
    assert {name: bits for name, bits in found.items() if bits & 0o077} == {}


# Memory


def rss_bytes(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def answered(daemon: DaemonProcess) -> int | None:
    """The last sequence number, None while the daemon is too busy to say."""
    try:
        return int(daemon.stream()["last_seq"])
    except TimeoutError:
        return None


MESSAGE_BYTES = 8 * MIB
HEADER = b"\x93\xcb" + bytes(8)
HOSTILE = {
    "array of 4 billion events": HEADER + b"\xdd\xff\xff\xff\xff" + b"\xc0" * 1000,
    "event of 4 billion fields": HEADER + b"\x91\xdf\xff\xff\xff\xff",
    "bytes of 4 GiB": HEADER + b"\x91\xc6\xff\xff\xff\xff" + b"x" * 1000,
    "nested arrays": HEADER + b"\x91" * (MESSAGE_BYTES - 10),
    "nested maps": HEADER + b"\x91" + b"\x81\xa1a" * ((MESSAGE_BYTES - 11) // 3),
    "as many events as fit": HEADER
    + b"\xdd"
    + (MESSAGE_BYTES - 20).to_bytes(4, "big")
    + b"\xc0" * (MESSAGE_BYTES - 20),
    "as many hashes as fit": encode([1.5, [["BlockRemoved", [7] * (MESSAGE_BYTES - 100)]], None])[:MESSAGE_BYTES],
}


def test_hostile_payloads_do_not_exhaust_memory(tmp_path: Path) -> None:
    with publishing() as publisher:
        settings = source(publisher, max_message_bytes=MESSAGE_BYTES)
        with configured(tmp_path, settings) as daemon:
            publisher.answer_replay()
            before = rss_bytes(daemon)
            grown = {}
            for what, payload in HOSTILE.items():
                assert len(payload) <= MESSAGE_BYTES
                publisher.send(payload)
                seq = len(publisher.sent) - 1
                wait_until(lambda seq=seq: answered(daemon) == seq, what)  # type: ignore[misc]
                grown[what] = (rss_bytes(daemon) - before) >> 20
            publisher.send(stored(1))
            wait_until(lambda: "w" in daemon.copies(), "a good message is applied")

            assert rss_bytes(daemon) - before < 20 * MESSAGE_BYTES, grown


def test_the_largest_questions_do_not_exhaust_memory(tmp_path: Path) -> None:
    with publishing() as publisher, configured(tmp_path, source(publisher)) as daemon:
        publisher.answer_replay()
        publisher.send(stored(*range(20_000)))
        wait_until(lambda: daemon.stream()["last_seq"] == 0, "it is applied")
        hashes = [number.to_bytes(8, "big").hex() for number in range(16_384)]
        daemon.post("/v1/match", {"block_hashes": hashes})
        before = rss_bytes(daemon)
        for _ in range(30):
            assert daemon.post("/v1/match", {"block_hashes": hashes})["workers"][0]["blocks"] == 16_384
        assert daemon.request("POST", "/v1/match", {"block_hashes": [*hashes, "00"]})[0] == 400
        assert daemon.request("POST", "/v1/match", {"block_hashes": ["00" * 240] * 16_384})[0] in (200, 413)
        assert rss_bytes(daemon) - before < 64 * MIB
