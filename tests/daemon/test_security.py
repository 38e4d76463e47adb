"""Who is let in, in what time, and how many at once: tokens, TLS, slow clients, connections."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.config import Config, HttpConfig, InvalidValue, SourceConfig
from kvcensus.daemon.counters import HttpRefusal
from kvcensus.daemon.credentials import read_tokens
from kvcensus.daemon.http import security

from .certificates import Signed, authority, signed
from .served import Client, View, chain, name, serving, status

TOKEN = "5d41402abc4b2a76b9719d911017c592"
OTHER = "another-token-for-the-rotation=="
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def secret(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def view() -> View:
    backend = MemoryBackend()
    backend.apply([chain(0, 3)])
    return View(backend, [status("w")])


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return secret(tmp_path / "tokens", f"# ours\n{TOKEN}\n\n{OTHER}\n")


@pytest.fixture
def guarded(view: View, token_file: str) -> Iterator[Client]:
    with serving(view, HttpConfig(token_file=token_file)) as client:
        yield client


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Tokens


@pytest.mark.parametrize(
    "target", ["/v1/daemon", "/v1/workers", "/v1/snapshot", "/metrics", "/openapi.json", "/nowhere", "//"]
)
def test_nothing_is_told_without_a_token(guarded: Client, target: str) -> None:
    answer = guarded.get(target)
    assert answer.error == (401, "unauthorized", None)
    assert answer.headers["www-authenticate"] == 'Bearer realm="kvcensus"'
    assert guarded.get(target, **BEARER).status in (200, 404)


def test_probes_and_the_page_that_has_no_data_need_no_token(guarded: Client) -> None:
    assert guarded.get("/").status == 200
    assert guarded.get("/livez").status == 200
    assert guarded.get("/readyz").status == 200
    assert guarded.get("/livez/").status == 401


@pytest.mark.parametrize(
    "given",
    [
        "", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
        f"Bearer x{TOKEN}", f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN} {TOKEN}", "Bearer # ours", "Bearer \xe9\xff",
        "Bearer " + "a" * 5000,
    ],
)  # fmt: skip
def test_what_is_not_the_token_is_refused(guarded: Client, given: str) -> None:
    answer = guarded.get("/v1/workers", Authorization=given)
    assert answer.error == (401, "unauthorized", None)
    assert ('error="invalid_token"' in answer.headers["www-authenticate"]) == given.startswith("Bearer")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_token_of_the_file_lets_in(guarded: Client, scheme: str) -> None:
    for token in (TOKEN, OTHER):
        assert guarded.get("/v1/workers", Authorization=f"{scheme} {token}").status == 200


def test_a_refused_body_is_not_waited_for(guarded: Client, view: View) -> None:
    with guarded.socket() as connection:
        connection.sendall(b"POST /v1/match HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    assert view.http_counters.refused[HttpRefusal.TOKEN] == 1


def test_metrics_may_be_left_open(view: View, token_file: str) -> None:
    with serving(view, HttpConfig(token_file=token_file, metrics_need_token=False)) as client:
        assert client.get("/metrics").status == 200
        assert client.get("/v1/workers").status == 401


def test_tokens_are_exchanged_while_it_runs(guarded: Client, token_file: str) -> None:
    secret(Path(token_file), "a-new-token\n")
    wait_until(lambda: guarded.get("/metrics", Authorization="Bearer a-new-token").status == 200)
    assert guarded.get("/metrics", **BEARER).status == 401

    secret(Path(token_file), "")
    time.sleep(1.5)
    assert guarded.get("/metrics", Authorization="Bearer a-new-token").status == 200
    assert guarded.get("/metrics").status == 401


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no token"),
        ("\n# only a comment\n", "has no token"),
        ("good\nnot good\n", "line 2 is no bearer token"),
        ("é\n", "line 1 is no bearer token"),
        ("a" * (1 << 20) + "a", "is larger than"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_named_and_not_quoted(tmp_path: Path, text: str, reason: str) -> None:
    path = secret(tmp_path / "tokens", text)
    with pytest.raises(InvalidValue) as error:
        HttpConfig(token_file=path)
    assert error.value.key == "token_file"
    assert error.value.reason.startswith(f"{path}: {reason}")
    assert "not good" not in error.value.reason


@pytest.mark.parametrize("key", ["token_file", "tls_certificate", "tls_key", "tls_client_ca"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, key: str) -> None:
    pair = authority(tmp_path)
    files = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    with pytest.raises(InvalidValue) as error:
        HttpConfig(**{**files, key: str(tmp_path / "nowhere")})
    assert error.value.key == key
    assert "nowhere: No such file or directory" in error.value.reason


def test_tokens_do_not_show(token_file: str) -> None:
    assert TOKEN not in repr(read_tokens(token_file))
    assert TOKEN not in repr(vars(read_tokens(token_file)))


# What is open


def test_files_that_others_can_read_get_a_warning(tmp_path: Path, token_file: str) -> None:
    assert HttpConfig(token_file=token_file).warnings() == []
    os.chmod(token_file, 0o640)
    (warning,) = HttpConfig(token_file=token_file).warnings()
    assert token_file in warning


@pytest.mark.parametrize(
    ("listen", "open_to_others"),
    [
        ("127.0.0.1:1", False), ("127.1.2.3:1", False), ("localhost:1", False), ("[::1]:1", False), ("", False),
        ("0.0.0.0:1", True), ("[::]:1", True), ("10.0.0.1:1", True), ("engine:1", True),
    ],
)  # fmt: skip
def test_listening_for_others_without_a_token_or_tls_gets_a_warning(
    tmp_path: Path, token_file: str, listen: str, open_to_others: bool
) -> None:
    pair = authority(tmp_path)
    tls = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    engine = SourceConfig(endpoint="tcp://engine:5557")
    assert len(Config(http=HttpConfig(listen=listen), sources=(engine,)).warnings()) == 2 * open_to_others
    assert len(HttpConfig(listen=listen, token_file=token_file).warnings()) == open_to_others
    assert len(HttpConfig(listen=listen, **tls).warnings()) == open_to_others
    assert HttpConfig(listen=listen, token_file=token_file, **tls).warnings() == []


# TLS


def trusting(ca: Signed, own: Signed | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca.certificate)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


def ask(client: Client, context: ssl.SSLContext) -> bytes:
    with client.socket() as plain, context.wrap_socket(plain, server_hostname=client.host) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(4096), b""))


def subject(client: Client, context: ssl.SSLContext) -> str:
    with client.socket() as plain, context.wrap_socket(plain, server_hostname=client.host) as connection:
        return str(connection.getpeercert())


def with_tls(pair: Signed, **more: str) -> HttpConfig:
    return HttpConfig(tls_certificate=str(pair.certificate), tls_key=str(pair.key), **more)


def test_tls_answers_and_plain_http_does_not(view: View, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    with serving(view, with_tls(signed(tmp_path, "server", ca))) as client:
        assert ask(client, trusting(ca)).startswith(b"HTTP/1.1 200")
        with client.socket() as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200" not in plain.recv(100)


def test_old_versions_of_tls_are_refused(view: View, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    old = trusting(ca)
    with warnings.catch_warnings(action="ignore"):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with serving(view, with_tls(signed(tmp_path, "server", ca))) as client, pytest.raises(ssl.SSLError):
        ask(client, old)


def test_clients_without_a_certificate_are_not_let_in(view: View, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    stranger = signed(other, "stranger", authority(other))
    with serving(view, with_tls(signed(tmp_path, "server", ca), tls_client_ca=str(ca.certificate))) as client:
        assert ask(client, trusting(ca, signed(tmp_path, "friend", ca))).startswith(b"HTTP/1.1 200")
        for context in (trusting(ca), trusting(ca, stranger)):
            with suppress(ssl.SSLError, ConnectionError):
                assert ask(client, context) == b""


def test_a_certificate_is_exchanged_while_it_runs(view: View, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    server = signed(tmp_path, "server", ca)
    with serving(view, with_tls(server)) as client:
        assert "server" in subject(client, trusting(ca))
        newer = signed(tmp_path, "renewed", ca)
        newer.key.replace(server.key)
        newer.certificate.replace(server.certificate)
        wait_until(lambda: "renewed" in subject(client, trusting(ca)))


def test_a_renewed_certificate_is_taken_up_while_the_tokens_cannot_be_read(view: View, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    server = signed(tmp_path, "server", ca)
    tokens = secret(tmp_path / "tokens", f"{TOKEN}\n")
    with serving(view, with_tls(server, token_file=tokens)) as client:
        newer = signed(tmp_path, "renewed", ca)
        secret(Path(tokens), "")
        newer.key.replace(server.key)
        newer.certificate.replace(server.certificate)
        wait_until(lambda: "renewed" in subject(client, trusting(ca)))


def session_of(client: Client, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
    """The session of a client that was let in, None for one that was not."""
    with (
        suppress(ssl.SSLError, ConnectionError),
        client.socket() as plain,
        context.wrap_socket(plain, server_hostname=client.host, session=session) as connection,
    ):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        found = connection.session if connection.recv(12) == b"HTTP/1.1 200" else None
        while connection.recv(4096):
            pass
        with suppress(OSError):
            connection.unwrap()  # without an end of TLS a session is not resumed
        return found
    return None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_authority_that_was_taken_away_lets_nobody_in(view: View, tmp_path: Path, version: ssl.TLSVersion) -> None:
    ca = authority(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    leaving_ca = authority(other)
    staying, leaving = trusting(ca, signed(tmp_path, "staying", ca)), trusting(ca, signed(other, "leaving", leaving_ca))
    staying.maximum_version = leaving.maximum_version = version
    authorities = tmp_path / "clients.pem"
    authorities.write_text(ca.certificate.read_text() + leaving_ca.certificate.read_text())
    config = with_tls(signed(tmp_path, "server", ca), tls_client_ca=str(authorities))

    with serving(view, config) as client:
        session = session_of(client, leaving)
        assert session
        assert session_of(client, staying)
        authorities.write_text(ca.certificate.read_text())
        wait_until(lambda: not session_of(client, leaving))
        assert not session_of(client, leaving, session), "it was resumed"
        assert session_of(client, staying)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_outlives_the_certificate_of_the_server(view: View, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A proxy may go on with the session that it has, whatever becomes of it."""
    ca = authority(tmp_path)
    server = signed(tmp_path, "server", ca)
    context = trusting(ca, signed(tmp_path, "proxy", ca))
    context.maximum_version = version
    with serving(view, with_tls(server, tls_client_ca=str(ca.certificate))) as client:
        session = session_of(client, context)
        assert session
        newer = signed(tmp_path, "renewed", ca)
        newer.key.replace(server.key)
        newer.certificate.replace(server.certificate)
        wait_until(lambda: "renewed" in subject(client, context))
        assert session_of(client, context, session)


def test_what_is_wrong_with_files_of_tls_is_said(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    server, other = signed(tmp_path, "server", ca), signed(tmp_path, "other", ca)
    text = secret(tmp_path / "text", "no pem at all")
    locked = tmp_path / "locked.key"
    os.system(f"openssl ec -in {server.key} -aes128 -passout pass:hush -out {locked} 2>/dev/null")
    broken = secret(tmp_path / "broken", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    certificate, key = str(server.certificate), str(server.key)
    for settings, at, reason in (
        ({"tls_certificate": certificate}, "tls_key", "is needed"),
        ({"tls_key": key}, "tls_certificate", "is needed"),
        ({"tls_client_ca": str(ca.certificate)}, "tls_client_ca", "needs"),
        ({"tls_certificate": text, "tls_key": key}, "tls_certificate", f"{text}: has no PEM certificate"),
        ({"tls_certificate": certificate, "tls_key": text}, "tls_key", f"{text}: has no PEM private key"),
        ({"tls_certificate": certificate, "tls_key": str(other.key)}, "tls_key", "is not the key of the certificate"),
        ({"tls_certificate": certificate, "tls_key": str(locked)}, "tls_key", "is encrypted"),
        ({"tls_certificate": broken, "tls_key": key}, "tls_certificate", "cannot be used"),
        ({"tls_certificate": certificate, "tls_key": key, "tls_client_ca": text}, "tls_client_ca", f"{text}: has no"),
    ):
        with pytest.raises(InvalidValue) as error:
            HttpConfig(**settings)
        assert (error.value.key, reason in error.value.reason) == (at, True), (settings, error.value.reason)


# Slow and many clients


def closed_within(connection: socket.socket, seconds: float) -> bytes:
    """What came until the other side closed the connection."""
    connection.settimeout(seconds)
    try:
        return b"".join(iter(lambda: connection.recv(4096), b""))
    except ConnectionResetError:
        return b""


def test_a_header_that_never_ends_is_cut_off(view: View) -> None:
    with serving(view, HttpConfig(idle_timeout_ms=500)) as client:
        with client.socket() as silent, client.socket() as slow:
            slow.sendall(b"GET /livez HTTP/1.1\r\n")
            begun = time.monotonic()
            while time.monotonic() - begun < 3:
                try:
                    slow.sendall(b"X-A: b\r\n")
                except OSError:
                    break
                time.sleep(0.05)
            assert time.monotonic() - begun < 2
            assert closed_within(silent, 2) == b""
        assert client.get("/livez").status == 200


def test_a_body_that_never_ends_is_cut_off(view: View) -> None:
    with serving(view, HttpConfig(body_timeout_ms=300)) as client, client.socket() as slow:
        slow.sendall(b"POST /v1/match HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
        answer = closed_within(slow, 5)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"
    assert view.http_counters.refused[HttpRefusal.SLOW] == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_compressed_body_is_refused_unopened(view: View, encoding: str) -> None:
    bomb = zlib.compress(bytes(100 << 20), wbits=31)
    with serving(view) as client:
        answer = client.post("/v1/match", bomb, Content_Encoding=encoding)
        assert answer.error == (415, "unsupported_media_type", None)


def test_idle_connections_make_room_for_others(view: View) -> None:
    with serving(view, HttpConfig(max_connections=20)) as client:
        idle = [client.socket() for _ in range(60)]
        for connection in idle[::3]:
            connection.sendall(b"POST /v1/match HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        for _ in range(10):
            assert client.post("/v1/match", {"block_hashes": [name(0)]}).json["workers"][0]["blocks"] == 1
        for connection in idle:
            connection.close()
    assert view.http_counters.refused[HttpRefusal.IDLE] >= 40
    assert view.http_counters.refused[HttpRefusal.FULL] == 0


def test_500_idle_connections_do_not_keep_others_from_answers(view: View) -> None:
    with serving(view) as client:
        idle = [client.socket() for _ in range(500)]
        begun = time.monotonic()
        for _ in range(20):
            assert client.get("/v1/workers").status == 200
        assert time.monotonic() - begun < 5
        for connection in idle:
            connection.close()


def test_beyond_the_limit_busy_connections_stay_and_the_next_is_told(view: View) -> None:
    big = MemoryBackend()
    big.apply([chain(first, 1000) for first in range(0, 60_000, 1000)])
    view.backend = big
    with serving(view, HttpConfig(max_connections=2)) as client:
        busy = [client.socket() for _ in range(2)]
        for connection in busy:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(b"GET /v1/snapshot HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        answer = client.get("/livez")
        assert answer.error == (503, "too_many_connections", None)
        assert answer.headers["retry-after"] == "1"
        for connection in busy:
            connection.close()
        wait_until(lambda: client.get("/livez").status == 200)
    assert view.http_counters.refused[HttpRefusal.FULL] >= 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has the option")
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_UNSENT_MS", 1000)
    backend = MemoryBackend()
    backend.apply([chain(number, 1) for number in range(30_000)])
    view.backend = backend
    with serving(view) as client, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((client.host, client.port))
        deaf.sendall(b"GET /v1/children?model_id=m&prefix_hash=root HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(4)
        answer = closed_within(deaf, 5)
        assert len(answer) < 1_000_000
