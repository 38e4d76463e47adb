"""What the server says to requests that it cannot answer: one shape, the right status, the field, never a traceback."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from kvcensus.backends.errors import BackendError
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import Holding, IdentityScope, WorkerMatch
from kvcensus.daemon.config import HttpConfig

from .served import Client, View, chain, name, serving, status

CONFIG = HttpConfig(max_hashes_per_query=100, max_body_bytes=10_000)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    backend = MemoryBackend()
    backend.apply([chain(0, 2)])
    with serving(View(backend, [status("w")]), CONFIG) as client:
        yield client
        assert client.post("/v1/match", {"block_hashes": [name(0)]}).json["workers"][0]["blocks"] == 1


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/match", {}, "block_hashes"),
        ("/v1/match", [], None),
        ("/v1/match", None, None),
        ("/v1/match", {"block_hashes": None}, "block_hashes"),
        ("/v1/match", {"block_hashes": name(0)}, "block_hashes"),
        ("/v1/match", {"block_hashes": [name(0), 1.5]}, "block_hashes[1]"),
        ("/v1/match", {"block_hashes": [True]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": [[name(0)]]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": [name(0), "xyz0"]}, "block_hashes[1]"),
        ("/v1/match", {"block_hashes": [name(0), name(0)[1:]]}, "block_hashes[1]"),
        ("/v1/match", {"block_hashes": ["abc", "a"]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": ["ab cd ef", "ab cd ef"]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": [""]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": ["0x" + name(0)]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": ["root"]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": ["ab" * 241]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": ["\u0660\u0660"]}, "block_hashes[0]"),
        ("/v1/match", {"block_hashes": [], "hashes": []}, "hashes"),
        ("/v1/match", {"block_hashes": [], "trusted_only": "yes"}, "trusted_only"),
        ("/v1/match", {"block_hashes": [], "trusted_only": 1}, "trusted_only"),
        ("/v1/match", {"block_hashes": [], "scope": "m"}, "scope"),
        ("/v1/match", {"block_hashes": [], "scope": {}}, "scope.model_id"),
        ("/v1/match", {"block_hashes": [], "scope": {"model_id": 7}}, "scope.model_id"),
        ("/v1/match", {"block_hashes": [], "scope": {"model_id": "m", "lora": "x"}}, "scope.lora"),
        ("/v1/match", {"block_hashes": [], "scope": {"model_id": "m", "tenant_id": None}}, "scope.tenant_id"),
        ("/v1/locate", {}, "block_hash"),
        ("/v1/locate", {"block_hash": "0"}, "block_hash"),
        ("/v1/locate", {"block_hash": name(0), "group": -1}, "group"),
        ("/v1/locate", {"block_hash": name(0), "group": "0"}, "group"),
        ("/v1/children", {"prefix_hash": "root"}, "scope"),
        ("/v1/children", {"scope": None, "prefix_hash": "root"}, "scope"),
        ("/v1/children", {"scope": {"model_id": "m"}}, "prefix_hash"),
        ("/v1/children", {"scope": {"model_id": "m"}, "prefix_hash": "ROOT"}, "prefix_hash"),
        ("/v1/children", {"scope": {"model_id": "m"}, "prefix_hash": ""}, "prefix_hash"),
    ],
)
def test_an_invalid_body_is_refused_by_the_path_of_its_field(
    client: Client, path: str, body: Any, field: str | None
) -> None:
    assert client.post(path, body).error == (400, "invalid", field)
    answer = client.post(path, msgspec.msgpack.encode(body), Content_Type="application/msgpack")
    assert answer.error == (400, "invalid", field)


@pytest.mark.parametrize("digits", [b"18446744073709551616", b"-9223372036854775809", b"9" * 400, b"9" * 5000])
def test_an_integer_of_more_than_64_bits_is_no_hash(client: Client, digits: bytes) -> None:
    answer = client.post("/v1/match", b'{"block_hashes":[0,%s]}' % digits)

    assert answer.error == (400, "invalid", "block_hashes[1]")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b"\x00" * 9, b'{"block_hashes": []}{}', b"\xef\xbb\xbf{}", b'{"block_hashes": ["\xff"]}'],
)
def test_a_body_that_is_no_json_is_malformed(client: Client, raw: bytes) -> None:
    assert client.post("/v1/match", raw).error == (400, "malformed", None)


@pytest.mark.parametrize(
    "raw", [b"", b"\x81", b"\x81\xacblock_hashes\xdd\xff\xff\xff\xff", b"\x81\xacblock_hashes\x91\xa1\xff"]
)
def test_a_body_that_is_no_msgpack_is_malformed(client: Client, raw: bytes) -> None:
    assert client.post("/v1/match", raw, Content_Type="application/msgpack").error == (400, "malformed", None)


@pytest.mark.parametrize("opening", [b"[", b'{"scope":', b'{"x":', b'{"block_hashes":['])
def test_deeply_nested_json_is_refused(client: Client, opening: bytes) -> None:
    deep = opening * (9000 // len(opening))

    assert client.post("/v1/match", deep).error[0] == 400


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("/v1/locate", "block_hash"),
        ("/v1/locate?block_hash=xyz", "block_hash"),
        (f"/v1/locate?block_hash={name(0)}&block_hash={name(1)}", "block_hash"),
        (f"/v1/locate?block_hash={name(0)}&model=m", "model"),
        (f"/v1/locate?block_hash={name(0)}&adapter_id=lora", "model_id"),
        (f"/v1/locate?block_hash={name(0)}&group=first", "group"),
        (f"/v1/locate?block_hash={name(0)}&group=-1", "group"),
        ("/v1/children?prefix_hash=root", "model_id"),
        ("/v1/children?model_id=m", "prefix_hash"),
        ("/v1/children?model_id=m&prefix_hash=%ff", "prefix_hash"),
    ],
)
def test_an_invalid_query_is_refused_by_the_name_of_its_parameter(client: Client, target: str, field: str) -> None:
    assert client.get(target).error == (400, "invalid", field)


def test_more_hashes_than_configured(client: Client) -> None:
    assert client.post("/v1/match", {"block_hashes": [0] * 100}).status == 200
    assert client.post("/v1/match", {"block_hashes": [0] * 101}).error == (400, "too_many_hashes", "block_hashes")


def test_a_longer_body_than_configured(client: Client) -> None:
    assert client.post("/v1/match", b" " * 10_001).error == (413, "too_large", None)


def test_a_longer_body_than_configured_in_chunks(client: Client) -> None:
    with client.socket() as connection:
        connection.sendall(b"POST /v1/match HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            connection.sendall(b"800\r\n" + b" " * 0x800 + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "json"])
def test_a_body_of_another_type(client: Client, content_type: str) -> None:
    answer = client.post("/v1/match", {"block_hashes": []}, Content_Type=content_type)

    assert answer.error == (415, "unsupported_media_type", None)
    assert content_type in answer.json["error"]["message"]


def test_json_with_a_charset_or_without_a_type_is_taken(client: Client) -> None:
    charset = client.post("/v1/match", {"block_hashes": []}, Content_Type="Application/JSON; charset=utf-8")
    assert charset.status == 200
    assert client.ask("POST", "/v1/match", b'{"block_hashes": []}', {}).status == 200


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/match/", "/v2/match", "/../etc/passwd", "/%00"])
def test_an_unknown_path(client: Client, path: str) -> None:
    assert client.get(path).error == (404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/match", "POST"),
        ("DELETE", "/v1/locate", "GET, POST"),
        ("POST", "/v1/snapshot", "GET"),
        ("PUT", "/metrics", "GET"),
        ("HEAD", "/livez", "GET"),
    ],
)
def test_a_wrong_method_names_the_right_ones(client: Client, method: str, path: str, allowed: str) -> None:
    answer = client.ask(method, path, None, {})

    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert answer.error == (405, "method_not_allowed", None)


def test_errors_in_msgpack_for_those_who_speak_it(client: Client) -> None:
    answer = client.get("/nowhere", Accept="application/msgpack")

    assert msgspec.msgpack.decode(answer.raw)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/match HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        bytes(range(256)) * 50,
    ],
)
def test_garbage_instead_of_http_is_cut_off_without_a_traceback(client: Client, raw: bytes) -> None:
    with client.socket() as connection:
        answer = b""
        try:
            connection.sendall(raw)
            while received := connection.recv(65536):
                answer += received
        except ConnectionError:
            pass
    assert b"Traceback" not in answer
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert client.get("/livez").status == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with client.socket() as connection:
        connection.sendall(b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    assert client.get("/livez").status == 200
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


class _Broken(MemoryBackend):
    """A backend whose reads fail as told."""

    error: Exception

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        raise self.error

    def holdings(self) -> list[Holding]:
        raise self.error


def test_a_backend_error_is_unavailable_and_says_what_is_wrong() -> None:
    backend = _Broken()
    backend.error = BackendError("the disk is gone")
    with serving(View(backend)) as client:
        answer = client.post("/v1/match", {"block_hashes": [0]})
        assert answer.error == (503, "backend", None)
        assert answer.json["error"]["message"] == "the disk is gone"
        assert client.get("/v1/workers").error == (503, "backend", None)


def test_what_nobody_foresaw_is_logged_under_the_id_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    backend = _Broken()
    backend.error = ZeroDivisionError("a secret")
    with serving(View(backend)) as client:
        answer = client.post("/v1/match", {"block_hashes": [0]})

    assert answer.error == (500, "internal", None)
    assert "secret" not in json.dumps(answer.json)
    request_id = answer.json["error"]["message"].split()[-1]
    (line,) = [one for one in caplog.records if request_id in str(one.msg)]
    assert "ZeroDivisionError" in (caplog.text)
    assert line.levelno == logging.ERROR
