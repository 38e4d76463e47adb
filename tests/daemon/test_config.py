"""What a configuration may say, what it means when it is silent, and what it must not say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvcensus.backends.lmdb import Durability
from kvcensus.backends.model import CacheTier
from kvcensus.daemon.config import (
    Config,
    HttpConfig,
    InvalidValue,
    NatsConfig,
    SourceConfig,
    SourceType,
    StreamConfig,
    WriterConfig,
)
from kvcensus.daemon.config.endpoints import Endpoint
from kvcensus.daemon.engines import ENGINE_TRANSLATORS
from kvcensus.translators.translation import ClearScope, HashJoin, TranslatorOptions


def source(endpoint: str = "tcp://engine:5557", **settings: Any) -> SourceConfig:
    return SourceConfig(endpoint=endpoint, **settings)


def refused(key: str, reason: str, **settings: Any) -> None:
    with pytest.raises(InvalidValue) as error:
        source(**settings)
    assert (error.value.key, reason in error.value.reason) == (key, True), error.value.reason


def test_nothing_configured_is_a_valid_configuration() -> None:
    config = Config()
    assert config.backend == "lmdb"
    assert config.index.durability is Durability.PROCESS
    assert config.http.address() == ("127.0.0.1", 9480)
    assert config.sources == ()
    assert config.warnings() == ["no source is configured: nothing will be followed"]


@pytest.mark.parametrize(
    ("listen", "address"),
    [("", None), ("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:9480", ("::1", 9480)), ("localhost:0", ("localhost", 0))],
)
def test_where_http_listens(listen: str, address: tuple[str, int] | None) -> None:
    assert HttpConfig(listen=listen).address() == address


@pytest.mark.parametrize(
    "listen", ["9480", ":9480", "localhost", "localhost:", "localhost:x", "a:b:1", "host:70000", "a..b:1"]
)
def test_where_http_cannot_listen(listen: str) -> None:
    with pytest.raises(InvalidValue) as error:
        HttpConfig(listen=listen)
    assert error.value.key == "listen"


@pytest.mark.parametrize(
    ("endpoint", "bind", "name"),
    [
        ("tcp://10.0.0.1:5557", False, "10.0.0.1:5557"),
        ("tcp://engine-0.engines.svc:5557", False, "engine-0.engines.svc:5557"),
        ("tcp://[fe80::1%eth0]:5557", False, "fe80::1-eth0:5557"),
        ("ipc:///run/engine/events.sock", False, "run/engine/events.sock"),
        ("tcp://*:5557", True, "bind:5557"),
        ("tcp://0.0.0.0:5557", True, "bind:5557"),
        ("tcp://[::]:5557", True, "bind:5557"),
    ],
)
def test_a_worker_without_a_name_is_named_by_its_address(endpoint: str, bind: bool, name: str) -> None:
    assert source(endpoint, bind=bind).name == name


@pytest.mark.parametrize("name", ["a b", "a\nb", 'a"', "ü", "x" * 201, "{}"])
def test_a_name_is_safe_as_a_label_and_in_a_url(name: str) -> None:
    refused("name", "characters", name=name)


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("", "is not tcp://HOST:PORT"),
        ("engine:5557", "is not tcp://HOST:PORT"),
        ("tcp://engine", "is not tcp://HOST:PORT"),
        ("tcp://engine:port", "is not tcp://HOST:PORT"),
        ("tcp://::1:5557", "is not tcp://HOST:PORT"),
        ("tcp://engine:5557/path", "is not tcp://HOST:PORT"),
        ("udp://engine:5557", "is not tcp://HOST:PORT"),
        ("inproc://engine", "is not tcp://HOST:PORT"),
        ("ipc://", "not ipc://PATH"),
        ("tcp://engine:65536", "above 65535"),
        ("tcp://engine:0", "port 0"),
        ("tcp://*:5557", "set bind = true"),
        ("tcp://[::]:5557", "set bind = true"),
    ],
)
def test_an_endpoint_that_nobody_can_connect_to(endpoint: str, reason: str) -> None:
    refused("endpoint", reason, endpoint=endpoint)


def test_a_replay_endpoint_is_always_connected_to() -> None:
    refused("replay_endpoint", "give the engine's own", replay_endpoint="tcp://*:5558", bind=True)
    refused("replay_endpoint", "give the engine's own", replay_endpoint="tcp://engine:0")
    refused("replay_endpoint", "is not tcp://HOST:PORT", replay_endpoint="engine:5558")


def test_an_address_that_an_engine_would_connect_to_is_warned_about() -> None:
    config = Config(sources=(source("tcp://0.0.0.0:5557", name="mine"),))
    assert len(config.warnings()) == 1
    assert config.warnings()[0].startswith("source mine: tcp://0.0.0.0:5557 ")
    assert Config(sources=(source("tcp://0.0.0.0:5557", bind=True),)).warnings() == []
    assert Config(sources=(source(),)).warnings() == []


def test_a_source_without_ranks_is_one_stream_without_rank() -> None:
    one = source(name="engine", replay_endpoint="tcp://engine:5558")
    assert one.streams() == [StreamConfig("engine", "engine", None, "tcp://engine:5557", "tcp://engine:5558")]


def test_every_rank_is_a_stream_at_its_own_ports() -> None:
    one = source(name="engine", replay_endpoint="tcp://engine:5657", ranks=3)
    assert one.streams() == [
        StreamConfig("engine/0", "engine", 0, "tcp://engine:5557", "tcp://engine:5657"),
        StreamConfig("engine/1", "engine", 1, "tcp://engine:5558", "tcp://engine:5658"),
        StreamConfig("engine/2", "engine", 2, "tcp://engine:5559", "tcp://engine:5659"),
    ]
    assert [stream.replay_endpoint for stream in source(ranks=2).streams()] == ["", ""]
    assert [stream.stream for stream in source("ipc:///run/a", name="a", ranks=1).streams()] == ["a/0"]


def test_ranks_that_have_no_port() -> None:
    refused("endpoint", "ipc has no port", endpoint="ipc:///run/engine", ranks=2)
    refused("replay_endpoint", "ipc has no port", replay_endpoint="ipc:///run/engine", ranks=2)
    refused("endpoint", "rank 3 would be at a port above 65535", endpoint="tcp://engine:65533", ranks=4)
    assert len(source("tcp://engine:65533", ranks=3).streams()) == 3


@pytest.mark.parametrize(("replay", "ranks"), [(5557, 0), (5557, 1), (5558, 2), (5560, 4), (5554, 4)])
def test_replay_ports_may_not_meet_those_of_the_live_streams(replay: int, ranks: int) -> None:
    refused("replay_endpoint", "its ports meet those of", replay_endpoint=f"tcp://ENGINE:{replay}", ranks=ranks)


@pytest.mark.parametrize(
    ("replay", "ranks"), [("tcp://engine:5558", 1), ("tcp://engine:5561", 4), ("tcp://other:5557", 4)]
)
def test_replay_ports_that_do_not_meet_the_live_ones(replay: str, ranks: int) -> None:
    assert source(replay_endpoint=replay, ranks=ranks).replay_endpoint == replay


def test_an_ipc_engine_has_two_sockets() -> None:
    refused("replay_endpoint", "its ports meet", endpoint="ipc:///run/a", replay_endpoint="ipc:///run/a")
    assert source("ipc:///run/a", replay_endpoint="ipc:///run/b").replay_endpoint == "ipc:///run/b"


def test_every_type_has_a_translator() -> None:
    assert ENGINE_TRANSLATORS.keys() | {SourceType.DYNAMO} == set(SourceType)


def test_reconnection_waits_are_in_order() -> None:
    refused("reconnect_max_ms", "less than reconnect_min_ms", reconnect_min_ms=200, reconnect_max_ms=100)


def test_the_translator_is_told_what_the_wire_does_not_say() -> None:
    one = source(
        name="engine",
        model="m",
        tenant="t",
        count_copies=False,
        clears=ClearScope.DEVICE,
        hash_join=HashJoin.NEVER,
        media={"WEIRD": CacheTier.LOCAL_SSD},
        bytes_per_block=4096,
    )
    assert one.options_of(one.name) == TranslatorOptions(
        worker="engine",
        model_id="m",
        tokenizer_id="m",
        tenant_id="t",
        count_copies=False,
        clears=ClearScope.DEVICE,
        hash_join=HashJoin.NEVER,
        media={"WEIRD": CacheTier.LOCAL_SSD},
        bytes_per_block=4096,
    )
    assert source(model="m", tokenizer="other").options_of("w").tokenizer_id == "other"


@pytest.mark.parametrize(
    ("sources", "key", "reason"),
    [
        ([source(name="a"), source("tcp://b:1", name="a")], "sources[1].name", "already that of sources[0]"),
        ([source(name="a"), source(name="b")], "sources[1].endpoint", "already followed by sources[0]"),
        (
            [source(name="a", ranks=4), source("tcp://engine:5559", name="b")],
            "sources[1].endpoint",
            "tcp://engine:5559 is already followed",
        ),
        ([source("tcp://b:1", name="a/0"), source(name="a")], "sources[0].name", "rank 0 of sources[1]"),
    ],
)
def test_sources_that_cannot_be_told_apart(sources: list[SourceConfig], key: str, reason: str) -> None:
    with pytest.raises(InvalidValue) as error:
        Config(sources=tuple(sources))
    assert (error.value.key, reason in error.value.reason) == (key, True), error.value.reason


@pytest.mark.parametrize("name", ["nats:fleet", "zmq:plane"])
def test_a_source_has_not_the_name_of_a_place_in_a_stream(name: str) -> None:
    plane = source("tcp://plane:1", name="plane", type=SourceType.DYNAMO)
    fleet = NatsConfig(name="fleet", type=SourceType.VLLM)
    with pytest.raises(InvalidValue) as error:
        Config(sources=(plane, source(name=name)), nats=(fleet,))
    assert (error.value.key, "place in the stream" in error.value.reason) == ("sources[1].name", True)


def test_one_publisher_may_be_followed_by_topic() -> None:
    config = Config(sources=(source(name="a", topic="a"), source(name="b", topic="b")))
    assert [stream.stream for _, stream in config.streams()] == ["a", "b"]


def test_the_largest_message_fits_the_queue() -> None:
    with pytest.raises(InvalidValue) as error:
        Config(sources=(source(max_message_bytes=2048),), writer=WriterConfig(queue_max_bytes=1024))
    assert error.value.key == "sources[0].max_message_bytes"


def test_a_data_directory_has_a_name() -> None:
    with pytest.raises(InvalidValue):
        Config(data_dir="")


@pytest.mark.parametrize(
    "setting",
    [{"receive_hwm": 0}, {"max_message_bytes": 0}, {"replay_attempts": 0}, {"ranks": -1}, {"heartbeat_ms": 1 << 31}],
)
def test_a_limit_is_never_unlimited(setting: dict[str, int]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(setting))):
        msgspec.convert({"endpoint": "tcp://engine:5557", **setting}, SourceConfig)


def test_an_endpoint_reads_as_it_was_written() -> None:
    for text in ("tcp://engine:5557", "tcp://[fe80::1]:5557", "tcp://*:5557", "ipc:///run/engine.sock"):
        assert str(Endpoint.parse(text)) == text
