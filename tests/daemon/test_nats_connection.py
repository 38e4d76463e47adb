"""Connections to real NATS servers: who is let in, and what is said of each thing that can be wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from nats.aio.msg import Msg

from kvcensus.daemon.config import NatsServers
from kvcensus.daemon.sources.nats_connection import Backoff, NatsConnection, NatsConnector
from kvcensus.daemon.sources.nats_problems import NatsProblem, NoAnswer

from ..nats_servers import (
    NatsServer,
    Operator,
    each_server,
    free_port,
    nats_cluster,
    nats_server,
    new_key,
    secret_file,
    talking,
)
from .certificates import Signed, authority, signed

ResultT = TypeVar("ResultT")
QUICK_MS = 2000


def servers(*urls: str, **options: Any) -> NatsServers:
    return NatsServers(servers=urls, connect_timeout_ms=options.pop("connect_timeout_ms", QUICK_MS), **options)


def connected(where: NatsServers, use: Callable[[NatsConnection], Awaitable[ResultT]]) -> ResultT:
    """What `use` makes of one connection."""

    async def main() -> ResultT:
        connection = await NatsConnector(where, "test").connect()
        try:
            return await use(connection)
        finally:
            await connection.close()

    return asyncio.run(main())


async def nothing(connection: NatsConnection) -> bool:
    return not connection.is_lost


def problem(where: NatsServers) -> str:
    """The sentence on why there is no connection."""
    with pytest.raises(NatsProblem) as raised:
        connected(where, nothing)
    return str(raised.value)


async def ignore(message: object) -> None:
    pass


# Who is let in


@pytest.fixture(params=each_server())
def program(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_a_server_without_users(tmp_path: Path, program: Path) -> None:
    with nats_server(tmp_path, program=program) as server:
        assert connected(servers(server.url), nothing)


def test_a_password(tmp_path: Path, program: Path) -> None:
    users = {"authorization": {"user": "kv", "password": "right"}}
    with nats_server(tmp_path, users, program=program) as server:
        right = secret_file(tmp_path / "right", "right\n")
        wrong = secret_file(tmp_path / "wrong", "wrong")
        assert connected(servers(server.url, user="kv", password_file=str(right)), nothing)
        refused = problem(servers(server.url, user="kv", password_file=str(wrong)))
        assert refused == f"{server.url} refuses user kv with the password in {wrong}"
        assert problem(servers(server.url)) == (
            f"{server.url} refuses a client without credentials: "
            "set credentials_file, nkey_file, user and password_file, or token_file"
        )


def test_a_token(tmp_path: Path, program: Path) -> None:
    with nats_server(tmp_path, {"authorization": {"token": "right"}}, program=program) as server:
        token = secret_file(tmp_path / "token", "right\n")
        assert connected(servers(server.url, token_file=str(token)), nothing)
        token.write_text("wrong\n")
        assert problem(servers(server.url, token_file=str(token))) == f"{server.url} refuses the token in {token}"


def test_an_nkey(tmp_path: Path, program: Path) -> None:
    key, other = new_key(), new_key()
    with nats_server(tmp_path, {"authorization": {"users": [{"nkey": key.public}]}}, program=program) as server:
        seed = secret_file(tmp_path / "seed", f"# ours\n{key.seed}\n")
        assert connected(servers(server.url, nkey_file=str(seed)), nothing)
        seed.write_text(other.seed)
        assert problem(servers(server.url, nkey_file=str(seed))) == f"{server.url} refuses the nkey in {seed}"


def test_a_credentials_file(tmp_path: Path, program: Path) -> None:
    operator = Operator()
    with nats_server(tmp_path, operator.settings, program=program) as server:
        good = operator.credentials(tmp_path / "good.creds")
        assert connected(servers(server.url, credentials_file=str(good)), nothing)
        strange = Operator().credentials(tmp_path / "strange.creds")
        refused = problem(servers(server.url, credentials_file=str(strange)))
        assert refused == f"{server.url} refuses the user of {strange}"


def test_expired_credentials(tmp_path: Path, program: Path) -> None:
    operator = Operator()
    with nats_server(tmp_path, operator.settings, program=program) as server:
        expired = operator.credentials(tmp_path / "expired.creds", expires_in_s=-5)
        refused = problem(servers(server.url, credentials_file=str(expired)))
        assert refused.startswith(f"{server.url} refuses the user of {expired} (the credentials end at 20")


def test_credentials_that_expire_while_connected(tmp_path: Path) -> None:
    operator = Operator()
    with nats_server(tmp_path, operator.settings) as server:
        soon = operator.credentials(tmp_path / "soon.creds", expires_in_s=1)

        async def wait(connection: NatsConnection) -> str:
            while not connection.is_lost:
                await asyncio.sleep(0.05)
            return connection.why_lost()

        why = connected(servers(server.url, credentials_file=str(soon)), wait)
        assert why.startswith(f"{server.url} ended the connection: the user of {soon} has expired")


def test_secrets_are_read_anew_for_each_connection(tmp_path: Path) -> None:
    password = secret_file(tmp_path / "password", "old")
    with nats_server(tmp_path, {"authorization": {"user": "kv", "password": "new"}}) as server:
        where = servers(server.url, user="kv", password_file=str(password))
        connector = NatsConnector(where, "test")

        async def twice() -> None:
            with pytest.raises(NatsProblem, match="refuses user kv"):
                await connector.connect()
            password.write_text("new")
            await (await connector.connect()).close()

        asyncio.run(twice())


def test_a_file_that_is_gone_or_spoilt_since_the_start(tmp_path: Path) -> None:
    password = secret_file(tmp_path / "password", "x")
    where = servers("nats://127.0.0.1:4222", user="kv", password_file=str(password))
    password.unlink()
    assert problem(where) == f"{password}: No such file or directory"
    password.write_text("two\nlines\n")
    assert problem(where).startswith(f"{password}: is not one line")


# TLS


class Certificates(NamedTuple):
    ca: Signed
    server: Signed
    client: Signed


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    ca = authority(directory)
    return Certificates(ca, signed(directory, "server", ca), signed(directory, "client", ca))


@contextmanager
def tls_server(directory: Path, shown: Signed, program: Path | None = None, **tls: object) -> Iterator[NatsServer]:
    settings = {"tls": {"cert_file": str(shown.certificate), "key_file": str(shown.key), **tls}}
    with nats_server(directory, settings, program=program) as server:
        yield server


def test_tls(tmp_path: Path, program: Path, certificates: Certificates) -> None:
    with tls_server(tmp_path, certificates.server, program) as server:
        assert connected(servers(server.tls_url, tls_ca_file=str(certificates.ca.certificate)), nothing)
        assert connected(servers(server.url, tls_ca_file=str(certificates.ca.certificate)), nothing)


def test_an_unknown_authority(tmp_path: Path, certificates: Certificates) -> None:
    (tmp_path / "other").mkdir()
    other = authority(tmp_path / "other")
    with tls_server(tmp_path, certificates.server) as server:
        assert problem(servers(server.tls_url, tls_ca_file=str(other.certificate))) == (
            f"the certificate of {server.tls_url} is signed by none of the authorities in {other.certificate}"
        )
        assert problem(servers(server.tls_url)) == (
            f"the certificate of {server.tls_url} is signed by none of the authorities "
            "that the system trusts; set tls_ca_file"
        )


def test_an_expired_certificate_of_the_server(tmp_path: Path, certificates: Certificates) -> None:
    expired = signed(tmp_path, "expired", certificates.ca, days=-1)
    with tls_server(tmp_path, expired) as server:
        said = problem(servers(server.tls_url, tls_ca_file=str(certificates.ca.certificate)))
        assert said == f"the certificate of {server.tls_url} has expired"


def test_a_certificate_of_another_host(tmp_path: Path, certificates: Certificates) -> None:
    tls = {"cert_file": str(certificates.server.certificate), "key_file": str(certificates.server.key)}
    with nats_server(tmp_path, {"tls": tls}, host="127.0.0.2") as server:
        said = problem(servers(server.tls_url, tls_ca_file=str(certificates.ca.certificate)))
        assert said.startswith(f"the certificate of {server.tls_url} is that of another host: IP address mismatch")


def test_a_client_certificate(tmp_path: Path, program: Path, certificates: Certificates) -> None:
    ca = str(certificates.ca.certificate)
    with tls_server(tmp_path, certificates.server, program, ca_file=ca, verify=True) as server:
        ours = {
            "tls_certificate_file": str(certificates.client.certificate),
            "tls_key_file": str(certificates.client.key),
        }
        assert connected(servers(server.tls_url, tls_ca_file=ca, **ours), nothing)
        said = problem(servers(server.tls_url, tls_ca_file=ca))
        assert "a client without a certificate: set tls_certificate_file and tls_key_file" in said


def test_an_expired_client_certificate(tmp_path: Path, certificates: Certificates) -> None:
    ca = str(certificates.ca.certificate)
    expired = signed(tmp_path, "expired", certificates.ca, days=-1)
    with tls_server(tmp_path, certificates.server, ca_file=ca, verify=True) as server:
        ours = {"tls_certificate_file": str(expired.certificate), "tls_key_file": str(expired.key)}
        said = problem(servers(server.tls_url, tls_ca_file=ca, **ours))
        assert f"refuses the certificate in {expired.certificate} (it ends at 20" in said


def test_the_handshake_comes_first_where_both_want_it(tmp_path: Path, certificates: Certificates) -> None:
    ca = str(certificates.ca.certificate)
    with tls_server(tmp_path, certificates.server, handshake_first=True) as server:
        assert connected(servers(server.tls_url, tls_ca_file=ca, tls_first=True), nothing)
        said = problem(servers(server.tls_url, tls_ca_file=ca, connect_timeout_ms=300))
        assert said == f"{server.tls_url} does not answer within 300 ms"


def test_no_secret_goes_to_a_server_without_tls(tmp_path: Path) -> None:
    """nats-py would send the password in the clear."""
    password = secret_file(tmp_path / "password", "hush")
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"tls://127.0.0.1:{listening.getsockname()[1]}"

        def serve() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.settimeout(5)
                peer.sendall(
                    b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"auth_required":true}\r\n'
                )
                received.append(peer.recv(4096))

        thread = threading.Thread(target=serve)
        thread.start()
        said = problem(servers(url, user="kv", password_file=str(password)))
        thread.join()
    assert said == f"{url} offers no TLS, which was asked for: nothing was sent to it"
    assert received == [b""]


def test_tls_is_used_where_it_is_only_offered(tmp_path: Path, certificates: Certificates) -> None:
    """nats-py would stay in the clear."""
    tls = {"cert_file": str(certificates.server.certificate), "key_file": str(certificates.server.key)}
    with nats_server(tmp_path, {"tls": tls, "allow_non_tls": True}) as server:
        (tmp_path / "other").mkdir()
        other = authority(tmp_path / "other")
        assert connected(servers(server.tls_url, tls_ca_file=str(certificates.ca.certificate)), nothing)
        assert "signed by none of" in problem(servers(server.tls_url, tls_ca_file=str(other.certificate)))


# Servers that are not there


def test_nothing_listens() -> None:
    port = free_port()
    assert problem(servers(f"nats://127.0.0.1:{port}")) == f"nothing listens at nats://127.0.0.1:{port}"


def test_no_such_host() -> None:
    said = problem(servers("nats://nowhere.invalid:4222"))
    assert said.startswith("nats://nowhere.invalid:4222: the name of the host cannot be resolved: ")


def test_a_server_that_hangs(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        server.pause()
        said = problem(servers(server.url, connect_timeout_ms=200))
        server.go_on()
    assert said == f"{server.url} does not answer within 200 ms"


def test_a_server_that_is_full(tmp_path: Path) -> None:
    with nats_server(tmp_path, {"max_connections": 1}) as server, talking(server.url):
        assert server.url in problem(servers(server.url))


def test_each_server_is_tried_and_all_are_named(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    urls = [f"nats://127.0.0.1:{port}" for port in ports]
    assert problem(servers(*urls)) == "; ".join(sorted(f"nothing listens at {url}" for url in urls))
    with nats_server(tmp_path) as server:
        assert connected(servers(*urls, server.url), nothing)


def test_a_cluster_is_known_by_one_of_its_servers(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as cluster:
        first = cluster.servers[0]
        connector = NatsConnector(servers(first.url), "test")

        async def main() -> str:
            await (await connector.connect()).close()
            first.kill()
            connection = await connector.connect()
            await connection.close()
            return connection.url

        assert asyncio.run(main()) in {server.url for server in cluster.servers[1:]}


# The life of a connection


def test_a_killed_server_ends_the_connection(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:

        async def kill(connection: NatsConnection) -> str:
            lost = asyncio.Event()
            connection.lost = lost.set
            server.kill()
            await asyncio.wait_for(lost.wait(), 2)
            assert connection.is_lost
            return connection.why_lost()

        assert connected(servers(server.url), kill) == f"{server.url} ended the connection"


def test_a_server_that_no_longer_answers_ends_the_connection(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:

        async def hang(connection: NatsConnection) -> str:
            server.pause()
            started = time.monotonic()
            while not connection.is_lost:
                assert time.monotonic() - started < 3
                await asyncio.sleep(0.05)
            server.go_on()
            return connection.why_lost()

        said = connected(servers(server.url, ping_interval_ms=100), hang)
        assert said == f"{server.url} no longer answers pings"


PERMISSIONS = {
    "authorization": {
        "users": [
            {"user": "kv", "password": "x", "permissions": {"subscribe": ["_INBOX.>", "kvevents.>"], "publish": ["A"]}}
        ]
    }
}


@pytest.fixture
def restricted(tmp_path: Path, program: Path) -> Iterator[NatsServers]:
    with nats_server(tmp_path, PERMISSIONS, program=program) as server:
        yield servers(server.url, user="kv", password_file=str(secret_file(tmp_path / "password", "x")))


def test_what_a_server_did_not_read_is_not_sent_after_the_end(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:

        async def main() -> None:
            connector = NatsConnector(servers(server.url), "test")
            before = open_files()
            connection = await connector.connect()
            server.pause()
            for _ in range(100):
                await connection.publish("subject", bytes(100_000))
            await asyncio.sleep(0.1)
            await connection.close()
            deadline = time.monotonic() + 60
            while open_files() != before:
                assert time.monotonic() < deadline, "the connection is still there"
                await asyncio.sleep(0.01)
            server.go_on()

        asyncio.run(main())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_subject_without_permission_to_subscribe(restricted: NatsServers) -> None:
    async def subscribe(connection: NatsConnection) -> None:
        await connection.subscribe("kvevents.>", ignore, max_messages=0, max_bytes=0)
        with pytest.raises(NatsProblem) as raised:
            await connection.subscribe("Secret.Events.>", ignore, max_messages=0, max_bytes=0)
        assert str(raised.value) == (
            f"user kv with the password in {restricted.password_file} has no permission to subscribe to Secret.Events.>"
        )
        assert not connection.is_lost

    connected(restricted, subscribe)


def test_a_request_without_permission_is_refused_at_once(restricted: NatsServers) -> None:
    async def request(connection: NatsConnection) -> float:
        started = time.monotonic()
        with pytest.raises(NatsProblem, match=r"has no permission to publish to Secret\.Api$"):
            await connection.request("Secret.Api")
        with pytest.raises(NoAnswer, match="nobody answers on A"):
            await connection.request("A")
        return time.monotonic() - started

    assert connected(restricted, request) < QUICK_MS / 2000


def test_who_asked_is_told_and_who_published_is_complained_of(restricted: NatsServers) -> None:
    complaints: list[str] = []

    async def ask_and_publish(connection: NatsConnection) -> None:
        connection.complained = complaints.append
        with pytest.raises(NatsProblem, match=r"has no permission to publish to Secret\.Api$"):
            await connection.request("Secret.Api")
        assert complaints == []
        await connection.publish("Secret.Api", b"")
        await connection.client.flush()
        await connection.client.flush()

    connected(restricted, ask_and_publish)
    (complaint,) = complaints
    assert complaint.endswith("has no permission to publish to Secret.Api")


def test_requests_on_one_subject_at_a_time_do_not_know_of_each_other(restricted: NatsServers) -> None:
    async def ask(connection: NatsConnection) -> list[str]:
        found = await asyncio.gather(
            *(connection.request(subject) for subject in ("A", "A", "Secret.Api", "Secret.Api")), return_exceptions=True
        )
        assert not connection.is_lost
        return [str(one) for one in found]

    first, second, *refused = connected(restricted, ask)
    assert first.endswith("nobody answers on A")
    assert second == first
    assert ["no permission to publish to Secret.Api" in one for one in refused] == [True, True]


# Messages


def test_a_message_is_taken_at_once_unless_one_before_it_waits(tmp_path: Path, program: Path) -> None:
    with nats_server(tmp_path / "nats", program=program) as server:

        async def use(connection: NatsConnection) -> list[str]:
            said: list[str] = []
            may_go_on = asyncio.Event()

            async def callback(message: Msg) -> None:
                said.append(f"waited {message.data.decode()}")
                await may_go_on.wait()

            def at_once(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> bool:
                if payload == b"2":
                    return False
                said.append(f"at once {payload.decode()} on {subject.decode()} with {headers.decode()}")
                return True

            await connection.subscribe("a.*", callback, max_messages=0, max_bytes=0, at_once=at_once)
            for number in range(5):
                await connection.publish("a.b", b"%d" % number, headers={"N": "x"})
            await connection.publish("a.b", b"without headers")
            await connection.client.flush()
            await connection.client.flush()
            may_go_on.set()
            await connection.client.drain()
            return said

        first, second, *waited = connected(servers(server.url), use)
        headers = "NATS/1.0\r\nN: x\r\n\r\n"
        assert [first, second] == [f"at once {number} on a.b with {headers}" for number in (0, 1)]
        assert waited == ["waited 2", "waited 3", "waited 4", "waited without headers"]


def test_what_goes_wrong_in_taking_a_message_is_no_secret(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:

        async def use(connection: NatsConnection) -> Exception | None:
            def at_once(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> bool:
                raise RuntimeError(payload.decode())

            await connection.subscribe("a", ignore, max_messages=0, max_bytes=0, at_once=at_once)
            await connection.publish("a", b"odd", headers={"N": "x"})
            await connection.client.flush()
            await connection.client.flush()
            return connection.failure

        assert str(connected(servers(server.url), use)) == "odd"


def test_waits_double_up_to_a_bound_and_begin_anew_after_success() -> None:
    backoff = Backoff(servers("nats://127.0.0.1", reconnect_min_ms=100, reconnect_max_ms=500))
    assert [backoff.next_s() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    assert backoff.next_s() == 0.1
