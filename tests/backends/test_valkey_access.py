"""Who we are to the server: users of its ACL, passwords in files, TLS with certificates of both sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("valkey")

from kvcensus.backends.errors import BackendError, BackendUnavailable
from kvcensus.backends.valkey.backend import open_valkey
from tests.daemon.certificates import authority, signed
from tests.valkey_servers import ValkeyServer, needs_server, running_server

from .building import block, clear, store

pytestmark = needs_server

RULES = (
    *("resetchannels", "~{kvcensus/*", "~kvcensus:parts", "-@all", "+watch", "+multi", "+exec"),
    *("+get", "+set", "+del", "+unlink", "+exists", "+hget", "+hmget", "+hset", "+hdel", "+hgetall", "+hkeys", "+hlen"),
    *("+hscan", "+zadd", "+zrem", "+zrangebylex", "+sadd", "+smembers", "+info", "+memory|usage"),
)
"""What docs/reference/backends/valkey.md names as enough."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with running_server(tmp_path / "server") as running:
        yield running


def password_file(directory: Path, password: str) -> str:
    path = directory / "password"
    path.write_text(f"{password}\n")
    path.chmod(0o600)
    return str(path)


def test_a_user_with_the_documented_rules_can_do_everything(server: ValkeyServer, tmp_path: Path) -> None:
    server.cli("ACL", "SETUSER", "census", "on", ">first", *RULES)
    server.cli("ACL", "SETUSER", "default", "off")
    options = {"servers": [server.address], "user": "census", "password_file": password_file(tmp_path, "first")}
    backend = open_valkey(tmp_path / "index", options)
    backend.apply([store(block(1), block(2)), clear("other")])
    assert len(backend.match(None, [block(1)])) == 1
    assert backend.stored_bytes() > 0
    assert backend.health().live_bytes > 0
    assert len(list(backend.snapshot())) == 2
    backend.apply([clear()])
    while backend.reclaim(100):
        pass
    backend.close()


def test_a_changed_password_is_read_for_the_next_connection(server: ValkeyServer, tmp_path: Path) -> None:
    server.cli("ACL", "SETUSER", "census", "on", ">first", *RULES)
    options = {"servers": [server.address], "user": "census", "password_file": password_file(tmp_path, "first")}
    backend = open_valkey(tmp_path / "index", options)
    server.cli("ACL", "SETUSER", "census", "resetpass", ">second")
    server.cli("CLIENT", "KILL", "USER", "census")
    with pytest.raises(BackendUnavailable) as refused:
        backend.apply([store(block(1))])
    assert "first" not in str(refused.value)
    password_file(tmp_path, "second")

    assert backend.apply([store(block(1))]).stored == 1
    backend.close()


def test_a_user_who_may_not_write_is_told(server: ValkeyServer, tmp_path: Path) -> None:
    server.cli("ACL", "SETUSER", "census", "on", ">first", "~*", "+@read", "+@transaction", "+info")
    options = {"servers": [server.address], "user": "census", "password_file": password_file(tmp_path, "first")}
    with pytest.raises(BackendError, match="permissions"):
        open_valkey(tmp_path / "index", options)


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    ours, theirs = signed(tmp_path, "client", ca), signed(tmp_path, "server", ca)
    settings = {
        "tls-cert-file": str(theirs.certificate),
        "tls-key-file": str(theirs.key),
        "tls-ca-cert-file": str(ca.certificate),
        "tls-auth-clients": "yes",
    }
    with running_server(tmp_path / "server", settings, tls=True) as server:
        chosen = {
            "servers": [server.address],
            "tls_ca_file": str(ca.certificate),
            "tls_certificate_file": str(ours.certificate),
            "tls_key_file": str(ours.key),
        }
        backend = open_valkey(tmp_path / "index", chosen)
        assert backend.apply([store(block(1))]).stored == 1
        backend.close()

        (tmp_path / "other").mkdir()
        stranger = authority(tmp_path / "other")
        with pytest.raises(BackendUnavailable, match="certificate verify failed"):
            open_valkey(tmp_path / "index", {**chosen, "tls_ca_file": str(stranger.certificate)})
        with pytest.raises(BackendUnavailable):
            open_valkey(tmp_path / "index", {"servers": [server.address], "timeout_ms": 1000})
        anonymous = {"servers": [server.address], "tls_ca_file": str(ca.certificate), "timeout_ms": 1000}
        with pytest.raises(BackendUnavailable):
            open_valkey(tmp_path / "index", anonymous)
