"""The table `[valkey]` of the configuration."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvcensus.backends.valkey.server import ValkeyOptions
from kvcensus.daemon.config.errors import InvalidValue
from kvcensus.daemon.config.valkey import ValkeyConfig

from .certificates import authority, signed


def test_the_backend_takes_every_key_with_the_same_default() -> None:
    assert msgspec.convert(msgspec.to_builtins(ValkeyConfig()), ValkeyOptions) == ValkeyOptions()


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"servers": ("valkey://host:1",)}, "servers[0]"),
        ({"servers": ("host",)}, "servers[0]"),
        ({"servers": ("a:1", "host:99999")}, "servers[1]"),
        ({"servers": ("user:hunter2@host:1",)}, "servers[0]"),
        ({"user": "u"}, "password_file"),
        ({"password_file": "/nonexistent"}, "password_file"),
        ({"tls_ca_file": "/nonexistent"}, "tls_ca_file"),
        ({"tls_certificate_file": "/nonexistent"}, "tls_key_file"),
        ({"tls_key_file": "/nonexistent"}, "tls_certificate_file"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(given: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        ValkeyConfig(**given)
    assert refused.value.key == key
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("given", [{"namespace": "a/b"}, {"namespace": "{a}"}, {"part": ""}, {"lease_ms": 10}])
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, ValkeyConfig)


def test_a_password_that_is_not_well_kept_is_warned_of(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("word\n")
    secret.chmod(0o644)
    warnings = ValkeyConfig(servers=("far:6379",), password_file=str(secret)).warnings()
    assert len(warnings) == 2
    secret.chmod(0o600)
    made = signed(tmp_path, "client", authority(tmp_path))
    kept = ValkeyConfig(
        servers=("far:6379",),
        password_file=str(secret),
        tls_ca_file=str(tmp_path / "ca.pem"),
        tls_certificate_file=str(made.certificate),
        tls_key_file=str(made.key),
    )
    assert kept.has_tls
    assert kept.warnings() == []
