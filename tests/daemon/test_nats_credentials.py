"""How to reach NATS, as it is configured: what is refused before anything is connected."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.config import InvalidValue, NatsServers
from kvcensus.daemon.credentials import CredentialError
from kvcensus.daemon.nats_credentials import certificate_expiry, read_nkey_seed, read_user_credentials

from ..nats_servers import Operator, new_key, secret_file
from .certificates import authority, signed


def refused(**settings: Any) -> tuple[str, str]:
    with pytest.raises(InvalidValue) as raised:
        NatsServers(**settings)
    return raised.value.key, raised.value.reason


@pytest.mark.parametrize(
    "url", ["nats://a", "tls://a:4222", "nats://10.0.0.1:4222", "nats://[::1]:4222", "nats://a.b-c_d.svc:4222/"]
)
def test_what_is_a_server(url: str) -> None:
    assert NatsServers(servers=(url,)).servers == (url,)


@pytest.mark.parametrize(
    "url", ["a:4222", "http://a", "nats://", "nats://a:b", "nats://a:70000", "nats://a/b", "nats://a b"]
)
def test_what_is_no_server(url: str) -> None:
    key, reason = refused(servers=("nats://a", url))
    assert (key, reason) == ("servers[1]", f"{url!r} is not nats://HOST:PORT and not tls://HOST:PORT")


def test_no_server_at_all() -> None:
    with pytest.raises(msgspec.ValidationError, match="length >= 1"):
        msgspec.convert({"servers": []}, NatsServers)


@pytest.mark.parametrize("url", ["nats://kv:hunter2@a:4222", "tls://hunter2@a"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    key, reason = refused(servers=(url,))
    assert key == "servers[0]"
    assert "secrets stand in files" in reason
    assert "hunter2" not in reason


def test_a_websocket_is_not_supported() -> None:
    assert "WebSocket" in refused(servers=("wss://a",))[1]


def test_one_kind_of_credentials(tmp_path: Path) -> None:
    token = str(secret_file(tmp_path / "token", "x"))
    seed = str(secret_file(tmp_path / "seed", new_key().seed))
    assert refused(token_file=token, nkey_file=seed) == (
        "token_file",
        "nkey_file is set too, and a client has one kind of credentials",
    )


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"user": "kv"}, "password_file"),
        ({"password_file": "{file}"}, "user"),
        ({"tls_certificate_file": "{file}"}, "tls_key_file"),
        ({"tls_key_file": "{file}"}, "tls_certificate_file"),
    ],
)
def test_what_comes_in_pairs(tmp_path: Path, given: dict[str, str], missing: str) -> None:
    file = secret_file(tmp_path / "file", "x")
    key, reason = refused(**{name: text.format(file=file) for name, text in given.items()})
    assert key == missing
    assert reason == f"is needed with {next(iter(given))}"


@pytest.mark.parametrize("key", ["credentials_file", "nkey_file", "token_file", "tls_ca_file"])
def test_a_file_that_is_not_there(tmp_path: Path, key: str) -> None:
    missing = str(tmp_path / "missing")
    assert refused(**{key: missing}) == (key, f"{missing}: No such file or directory")


def test_files_of_the_wrong_kind(tmp_path: Path) -> None:
    path = str(secret_file(tmp_path / "secret", "hunter2\nand more\n"))
    for key in ("credentials_file", "nkey_file", "token_file", "tls_ca_file"):
        named, reason = refused(**{key: path})
        assert named == key
        assert reason.startswith(f"{path}: ")
        assert "hunter2" not in reason


def test_a_seed_with_a_mistake_in_it(tmp_path: Path) -> None:
    seed = new_key().seed
    wrong = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    with pytest.raises(CredentialError, match="has an nkey seed with a mistake in it"):
        read_nkey_seed(str(secret_file(tmp_path / "seed", wrong)))


def test_secrets_that_others_may_read(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "token", "x")
    assert NatsServers(token_file=str(path)).warnings() == []
    path.chmod(0o644)
    assert NatsServers(token_file=str(path)).warnings() == [
        f"token_file: {path} can be read by others than its owner: chmod 600"
    ]


def test_a_password_in_the_clear_over_the_network(tmp_path: Path) -> None:
    token = str(secret_file(tmp_path / "token", "x"))
    assert "in the clear" in NatsServers(servers=("nats://far:4222",), token_file=token).warnings()[0]
    assert NatsServers(servers=("tls://far:4222",), token_file=token).warnings() == []
    assert NatsServers(servers=("nats://127.0.0.1:4222",), token_file=token).warnings() == []


def test_when_credentials_end(tmp_path: Path) -> None:
    operator = Operator()
    now = datetime.now(UTC).timestamp()
    ending = read_user_credentials(str(operator.credentials(tmp_path / "a", expires_in_s=3600)))
    assert abs(ending.expires_s - now - 3600) < 60
    assert read_user_credentials(str(operator.credentials(tmp_path / "b"))).expires_s == 0
    assert "SU" not in repr(ending)


def test_when_a_certificate_ends(tmp_path: Path) -> None:
    made = signed(tmp_path, "ours", authority(tmp_path), days=3)
    now = datetime.now(UTC).timestamp()
    assert abs(certificate_expiry(str(made.certificate)) - now - 3 * 86400) < 60
    assert certificate_expiry(str(made.key)) == 0
