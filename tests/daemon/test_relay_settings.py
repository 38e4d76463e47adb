"""What a relay can be told, and what it refuses before it begins."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcensus.daemon.cli.relay import relay
from kvcensus.daemon.config import ConfigError, RelayConfig, load_config
from kvcensus.daemon.relay import metrics
from kvcensus.daemon.relay.service import RelayService

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "relay.md").read_text()

REFUSED = {
    "stream": ('stream = "a.b"', "relay.stream"),
    "prefix": ('prefix = "kv events"', "relay.prefix"),
    "wildcard": ('prefix = "kv.*"', "relay.prefix"),
    "the same prefix twice": ('alive_prefix = "kvevents"', "relay.alive_prefix"),
    "spool": ('spool_dir = ""', "relay.spool_dir"),
    "replicas": ("stream_replicas = 7", "relay.stream_replicas"),
    "a window longer than what is kept": ("stream_max_age_s = 60", "relay.stream_duplicates_s"),
    "pipeline": ('pipeline = "perhaps"', "relay.pipeline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_setting_is_named(case: str, tmp_path: Path) -> None:
    text, key = REFUSED[case]
    file = tmp_path / "relay.toml"
    file.write_text(f"[relay]\n{text}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(file, {})
    assert refused.value.key == key


def test_the_environment_may_name_the_stream() -> None:
    assert load_config(None, {"KVCENSUS__RELAY__STREAM": "KV"}).relay.stream == "KV"


def ended(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(relay, arguments)
    return result.exit_code, result.output


ENGINE = ("--engine", "tcp://127.0.0.1:5557", "--replay-endpoint", "tcp://127.0.0.1:5558")


def test_a_relay_needs_a_stream() -> None:
    code, said = ended(*ENGINE)
    assert (code, said) == (78, "kvcensus: command line: --stream: is required\n")


def test_a_relay_needs_an_engine_or_a_file() -> None:
    assert ended("--stream", "KV")[0] == 2
    assert ended("--config", "x.toml", *ENGINE)[0] == 2


def test_a_worker_of_this_machine_needs_a_name_that_tells_it_from_others(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[relay]\nstream = "KV"\n[[sources]]\nendpoint = "tcp://127.0.0.1:5557"\n')
    code, said = ended("--config", str(file))
    assert code == 78
    assert "sources[0].name: '127.0.0.1:5557' would be the name of every worker" in said
    code, said = ended(*ENGINE, "--engine", "ipc:///run/kv", "--stream", "KV")
    assert code == 78
    assert "--worker" in said


def test_dynamo_is_not_relayed(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[relay]\nstream = "KV"\n[[sources]]\nendpoint = "tcp://e:5557"\ntype = "dynamo"\n')
    code, said = ended("--config", str(file))
    assert code == 78
    assert "sources[0].type" in said


def test_a_spool_smaller_than_a_message_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[relay]\nstream = "KV"\nspool_max_bytes = 1000\n[[sources]]\nendpoint = "tcp://e:5557"\n')
    code, said = ended("--config", str(file))
    assert code == 78
    assert "relay.spool_max_bytes" in said


def test_one_engine_is_called_like_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def stop_here(config: object) -> None:
        seen.extend(source.name for source in config.sources)  # type: ignore[attr-defined]
        raise SystemExit(0)

    monkeypatch.setattr("kvcensus.daemon.cli.relay.RelayService", stop_here)
    ended(*ENGINE, "--stream", "KV", "--spool-dir", str(tmp_path))
    assert seen == [socket.gethostname()]


def test_the_page_shows_the_metrics_of_a_relay() -> None:
    assert metrics.reference_table() in PAGE


def test_every_metric_is_there_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(
        f'[relay]\nstream = "KV"\nspool_dir = "{tmp_path}/spool"\n[[sources]]\nendpoint = "tcp://127.0.0.1:1"\n'
    )
    service = RelayService(load_config(file, {}))
    try:
        declared = (*metrics.RECEIVED_METRICS, *metrics.RELAYED_METRICS, *metrics.RELAY_METRICS)
        families = {family.name: family for family in service.registry.collect()}
        for metric in declared:
            family = families[metric.name.removesuffix("_total")]
            assert family.samples, metric.name
            assert re.fullmatch(r"kvcensus_(relay|stream)_[a-z_]+", metric.name)
    finally:
        service.spool.close()


def test_the_defaults_are_those_of_the_convention() -> None:
    relay_config = RelayConfig()
    assert (relay_config.prefix, relay_config.alive_prefix, relay_config.heartbeat_ms) == ("kvevents", "kvalive", 5000)
