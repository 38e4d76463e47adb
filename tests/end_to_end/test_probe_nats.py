"""`kvcensus check --probe` against real NATS servers: who we are there, what is on the bus, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcensus.daemon.relay.convention import Address, address_headers, numbered, subject_of
from kvcensus.daemon.streams.delivery import Control

from ..captures_reader import load_capture
from ..daemon.certificates import authority, signed
from ..dynamo_captures import messages_of
from ..nats_servers import NatsServer, Talk, free_port, nats_server, secret_file, talking
from .probing import Meanwhile, probe, probed, repeating

CAPTURE = load_capture("vllm-0.32.0-basic").messages


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture
def talk(server: NatsServer) -> Iterator[Talk]:
    with talking(server.url) as connected:
        yield connected


def bus(url: str, kind: str, connection: dict[str, str] | None = None, **settings: Any) -> str:
    settings = {"name": "fleet", "type": kind} | settings
    table = "[[nats]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    named = {"servers": [url]} | (connection or {})
    return f"{table}[nats.connection]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in named.items())


def relayed(worker: str, count: int, control: Control = Control.NONE) -> list[tuple[str, dict[str, str], bytes]]:
    address = Address(worker, 0, "llama", "vllm")
    prefix = "kvalive" if control else "kvevents"
    return [
        (
            subject_of(prefix, address),
            numbered(address_headers("spool-1", address), 1, one.seq, control),
            b"" if control else one.payload,
        )
        for one in CAPTURE[:count]
    ]


def published(talk: Talk, messages: list[tuple[str, dict[str, str], bytes]]) -> Meanwhile:
    def publish() -> None:
        for subject, headers, payload in messages:
            talk.publish(subject, payload, headers)

    return repeating(publish)


def test_relays_over_core_nats(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    messages = [*relayed("pod-1", 3), *relayed("pod-1", 1, Control.ALIVE), *relayed("pod-2", 1)]
    exit_code, findings = probed(tmp_path, bus(server.url, "vllm"), published(talk, messages))
    assert exit_code == 0
    (found,) = findings["buses"]
    assert (found["server"], found["tls"], found["transport"]) == (server.url, False, "core NATS")
    assert found["version"].startswith("2.")
    assert found["identity"] == "a client without credentials"
    assert found["subscribed"] == ["kvevents.*.*.*"]
    assert [(one["worker"], one["rank"], one["model"], one["alive"]) for one in found["workers"]] == [
        ("pod-1", 0, "llama", True),
        ("pod-2", 0, "llama", False),
    ]
    assert found["workers"][0]["releases"] == {"vllm": [["0.24.0", ""]]}
    assert found["warnings"] == []


def test_dynamo_over_core_nats(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    messages: list[tuple[str, dict[str, str], bytes]] = [
        (one.subject, {}, one.payload) for one in messages_of("dynamo-1.6.1-nats")
    ]
    found = probed(tmp_path, bus(server.url, "dynamo"), published(talk, messages)).bus
    assert found["messages"] > 0
    assert found["releases"] == {"dynamo": [["1.5", ""]]}
    assert found["publishers"] >= 1
    assert found["workers"]
    assert abs(found["behind_ms"]) > 1000
    assert "the clocks differ" in found["warnings"][0]


def test_a_silent_bus(tmp_path: Path, server: NatsServer) -> None:
    exit_code, printed = probe(tmp_path, bus(server.url, "dynamo"), arguments=())
    assert exit_code == 0
    assert f"bus fleet (Dynamo) over core NATS at {server.url}: reached in" in printed
    assert "without TLS, as a client without credentials" in printed
    assert "none in 1 s: idle engines publish nothing" in printed


def test_a_stream_of_relays(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    talk.add_stream("KV", ["kvevents.>"])
    for subject, headers, payload in [*relayed("pod-1", 5), *relayed("pod-2", 2)]:
        talk.store(subject, payload, headers)
    exit_code, findings = probed(tmp_path, bus(server.url, "vllm", stream="KV"))
    assert exit_code == 0
    (found,) = findings["buses"]
    kept = found["jetstream"]
    assert (kept["name"], kept["subjects"], kept["replicas"]) == ("KV", ["kvevents.>"], 1)
    assert (kept["first"], kept["last"], kept["messages"], kept["looked_at"]) == (1, 7, 7, 7)
    assert 0 <= kept["oldest_s"] < 60
    assert [(one["worker"], one["messages"]) for one in found["workers"]] == [("pod-1", 5), ("pod-2", 2)]
    assert found["workers"][0]["numbers"]["missing"] == 0
    assert talk.stream_info("KV").state.consumer_count == 0
    talk.delete_stream("KV")


def test_only_the_last_messages_of_a_long_stream_are_looked_at(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    talk.add_stream("KV", ["kvevents.>"])
    (subject, headers, payload) = relayed("old", 1)[0]
    talk.store(subject, payload, headers)
    (subject, headers, payload) = relayed("new", 1)[0]
    for _ in range(1000):
        talk.do(talk.client.publish(subject, payload, headers=headers))
    talk.do(talk.client.flush())
    found = probed(tmp_path, bus(server.url, "vllm", stream="KV"), seconds=3).bus
    assert found["jetstream"]["looked_at"] == 1000
    assert [one["worker"] for one in found["workers"]] == ["new"]
    talk.delete_stream("KV")


def test_an_empty_stream_and_one_with_other_subjects(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    talk.add_stream("EMPTY", ["other.>"])
    exit_code, printed = probe(tmp_path, bus(server.url, "vllm", stream="EMPTY"), arguments=())
    assert exit_code == 0
    assert 'EMPTY of "other.>": no messages' in printed
    talk.store("other.one", b"x")
    found = probed(tmp_path, bus(server.url, "vllm", stream="EMPTY", subjects=["kvevents.>"])).bus
    assert found["warnings"] == ["none of its last 1 messages is on kvevents.>"]
    talk.delete_stream("EMPTY")


def test_a_stream_that_is_missing_or_forgets_what_was_read(tmp_path: Path, server: NatsServer, talk: Talk) -> None:
    exit_code, findings = probed(tmp_path, bus(server.url, "vllm", stream="NONE"))
    assert exit_code == 69
    assert findings["buses"][0]["problem"] == f"{server.url} has no stream NONE"
    talk.add_stream("WORK", ["work.>"], retention="workqueue")
    exit_code, findings = probed(tmp_path, bus(server.url, "vllm", stream="WORK"))
    assert exit_code == 69
    assert "has retention workqueue" in findings["buses"][0]["problem"]
    talk.delete_stream("WORK")


def test_nobody_there(tmp_path: Path) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    exit_code, findings = probed(tmp_path, bus(url, "vllm"))
    assert exit_code == 69
    assert findings["buses"][0]["problem"] == f"nothing listens at {url}"
    assert findings["buses"][0]["connected_ms"] is None


def test_a_password_that_is_wrong_and_a_subject_without_permission(tmp_path: Path) -> None:
    users = [{"user": "reader", "password": "right", "permissions": {"subscribe": ["kvevents.>", "_INBOX.>"]}}]
    with nats_server(tmp_path, {"authorization": {"users": users}}, jetstream=False) as server:
        right, wrong = (secret_file(tmp_path / word, word) for word in ("right", "wrong"))
        who = {"user": "reader", "password_file": str(wrong)}
        exit_code, findings = probed(tmp_path, bus(server.url, "vllm", who))
        assert exit_code == 69
        assert findings["buses"][0]["problem"] == f"{server.url} refuses user reader with the password in {wrong}"

        who = {"user": "reader", "password_file": str(right)}
        exit_code, findings = probed(tmp_path, bus(server.url, "vllm", who))
        assert exit_code == 0
        assert "has no permission to subscribe to kvalive" in findings["buses"][0]["warnings"][0]

        exit_code, findings = probed(tmp_path, bus(server.url, "vllm", who, subjects=["kvevents.>", "secret.>"]))
        assert exit_code == 69
        assert findings["buses"][0]["problem"].endswith("has no permission to subscribe to secret.>")
        assert findings["buses"][0]["subscribed"] == ["kvevents.>"]


def test_a_server_with_tls(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    shown = signed(tmp_path, "server", ca)
    tls = {"cert_file": str(shown.certificate), "key_file": str(shown.key)}
    with nats_server(tmp_path, {"tls": tls}, jetstream=False) as server:
        known = {"tls_ca_file": str(ca.certificate)}
        exit_code, findings = probed(tmp_path, bus(server.tls_url, "vllm", known))
        assert (exit_code, findings["buses"][0]["tls"]) == (0, True)
        exit_code, findings = probed(tmp_path, bus(server.tls_url, "vllm"))
        assert exit_code == 69
        assert "signed by none of the authorities" in findings["buses"][0]["problem"]
