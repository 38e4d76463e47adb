"""The page on NATS: its examples are configurations, and its permissions are enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcensus.daemon.config import Config, load_config
from kvcensus.daemon.status import Trust

from ..nats_servers import Operator, nats_server, new_key, secret_file, talking
from .certificates import authority, signed
from .nats_following import STREAM, Relay, following, wait_until

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "nats.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PERMISSIONS = re.findall(r"^```\n(permissions = .*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find in /etc/kvcensus."""
    directory = tmp_path_factory.mktemp("etc")
    signed(directory, "kvcensus", authority(directory))
    Operator().credentials(directory / "kvcensus.creds")
    secret_file(directory / "kvcensus.nk", new_key().seed)
    secret_file(directory / "password", "secret")
    return directory


def loaded(example: str, etc: Path, tmp_path: Path) -> Config:
    file = tmp_path / "kvcensus.toml"
    file.write_text(example.replace("/etc/kvcensus", str(etc)))
    return load_config(file, {})


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_is_a_configuration_without_a_warning(number: int, etc: Path, tmp_path: Path) -> None:
    config = loaded(EXAMPLES[number], etc, tmp_path)
    assert config.nats
    assert config.warnings() == []


def test_the_examples_use_every_kind_of_credentials_and_tls() -> None:
    assert len(EXAMPLES) == 7
    for key in ("credentials_file", "nkey_file", "password_file", "token_file", "tls_ca_file", "tls_certificate_file"):
        assert key in PAGE


@pytest.mark.parametrize("durable", [True, False], ids=["jetstream", "core"])
def test_the_permissions_are_enough(durable: bool, tmp_path: Path) -> None:
    jetstream, core = PERMISSIONS
    ours = (jetstream if durable else core).replace("STREAM.INFO.STREAM", f"STREAM.INFO.{STREAM}")
    ours = re.sub(r"\.STREAM\.>", f".{STREAM}.>", ours)
    (tmp_path / "users.conf").write_text(
        f"users = [{{ user = kv, password = x, {ours} }}, {{ user = relay, password = y }}]"
    )
    reach = {"user": "kv", "password_file": str(secret_file(tmp_path / "password", "x"))}
    options = {"stream": STREAM} if durable else {}
    with nats_server(tmp_path / "nats") as server:
        server.include("authorization", tmp_path / "users.conf")
        with talking(server.url, user="relay", password="y") as talk:
            talk.add_stream(STREAM, ["kvevents.>"])
            with following(tmp_path, server.url, connection=reach, **options) as one:
                one.lives()
                assert one.bus.problem == ""
                relay = Relay(talk, durable=durable)
                relay.send(0)
                one.holds(range(1))
                relay.beat(0)
                wait_until(lambda: one.trust() is Trust.FRESH, "the worker is believed")
            assert talk.do(talk.jetstream.consumers_info(STREAM)) == []
            assert "Violation" not in server.log()
