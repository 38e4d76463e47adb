"""Where values come from, which one wins, and how exactly a bad one is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.daemon.config import Config, ConfigError, LogLevel, config_from_flags, load_config
from kvcensus.daemon.config.toml_lines import line_of

GOOD = """\
data_dir = "/var/lib/kvcensus"

[http]
listen = "127.0.0.1:0"

[[sources]]
name = "one"
endpoint = "tcp://one:5557"

[[sources]]
name = "two"
endpoint = "tcp://two:5557"
[sources.media]
WEIRD = "local_ssd"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvcensus.toml"


def error_of(file: Path, text: str | bytes, environ: dict[str, str] | None = None) -> ConfigError:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(file, environ or {})
    return error.value


def test_a_file_says_what_to_follow(file: Path) -> None:
    file.write_text(GOOD)
    config = load_config(file, {})
    assert config.data_dir == "/var/lib/kvcensus"
    assert [source.name for source in config.sources] == ["one", "two"]
    assert config.sources[1].media == {"WEIRD": "local_ssd"}


def test_no_file_is_all_defaults() -> None:
    assert load_config(None, {}) == Config()


@pytest.mark.parametrize(
    ("bad", "line", "key", "reason"),
    [
        ('data_dir = "a"\ndata_dri = "b"\n', 2, "data_dri", "unknown key; did you mean data_dir?"),
        ("[htpp]\nlisten = ''\n", 1, "htpp", "unknown key; did you mean http?"),
        ("\n[http]\n# comment\nlisten = 5\n", 4, "http.listen", "Expected `str`, got `int`"),
        ("[http]\nlisten = 'x'\n", 2, "http.listen", "'x' is not HOST:PORT"),
        ("http.listen = 'x'\n", 1, "http.listen", "'x' is not HOST:PORT"),
        ("http = 5\n", 1, "http", "Expected `object`, got `int`"),
        ("[writer]\ncommit_max_ms = '20'\n", 2, "writer.commit_max_ms", "Expected `int`, got `str`"),
        (
            "[log]\nlevel = 'loud'\n",
            2,
            "log.level",
            "Invalid enum value 'loud'; expected one of debug, info, warning, error",
        ),
        ("[index]\ndurability = 'x'\n", 2, "index.durability", "expected one of process, consistent, full"),
        ("[http]\nmax_snapshots = 0\n", 2, "http.max_snapshots", "Expected `int` >= 1"),
        ("[[sources]]\nname = 'a'\n", 1, "sources[0].endpoint", "is required"),
        (
            "[[sources]]\nendpoint = 'tcp://a:1'\n\n[[sources]]\nendpoint = 'a'\n",
            5,
            "sources[1].endpoint",
            "is not tcp",
        ),
        ("sources = [\n  {endpoint = 'tcp://a:1'},\n  {endpoint = 'a'},\n]\n", 1, "sources[1].endpoint", "is not tcp"),
        ("[[sources]]\nendpoint = 'tcp://a:1'\nreceive_hwm = 0\n", 3, "sources[0].receive_hwm", "Expected `int` >= 1"),
        ("[[sources]]\nendpoint = 'tcp://a:1'\ntype = 'x'\n", 3, "sources[0].type", "expected one of vllm, sglang"),
        (
            "[[sources]]\nendpoint = 'tcp://a:1'\n[sources.media]\nX = 'y'\n",
            3,
            "sources[0].media",
            "expected one of hbm,",
        ),
        ("[[sources]]\nendpoint = 'tcp://a:1'\n[[sources]]\nendpoint = 'tcp://a:1'\n", 4, "sources[1]", "already"),
    ],
)
def test_a_bad_value_is_named_by_line_and_key(file: Path, bad: str, line: int, key: str, reason: str) -> None:
    error = error_of(file, bad)
    assert (error.line, error.key.startswith(key)) == (line, True), str(error)
    assert reason in error.reason
    assert str(error).startswith(f"{file}:{line}: {error.key}: ")


@pytest.mark.parametrize(
    ("bad", "line"),
    [("[http\n", 1), ("a = 1\n\nb = \n", 3), ("a = 1\na = 2\n", 2), ("a = 1\nb = '''\nnever ended\n", 3)],
)
def test_what_is_not_toml_is_named_by_its_line(file: Path, bad: str, line: int) -> None:
    error = error_of(file, bad)
    assert (error.line, error.key) == (line, "")
    assert str(error).startswith(f"{file}:{line}: not TOML: ")


def test_a_file_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    assert str(error_of(file, b"a = '\xff'")) == f"{file}: is not UTF-8: invalid start byte at byte 5"
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.toml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, {})


def test_the_environment_overrides_the_file(file: Path) -> None:
    file.write_text(GOOD)
    environ = {
        "KVCENSUS__HTTP__LISTEN": "",
        "KVCENSUS__DATA_DIR": "elsewhere",
        "KVCENSUS__WRITER__COMMIT_MAX_MS": "7",
        "KVCENSUS__BACKEND": "memory",
    }
    config = load_config(file, environ)
    assert (config.http.listen, config.data_dir, config.writer.commit_max_ms) == ("", "elsewhere", 7)
    assert config.backend == "memory"
    assert len(config.sources) == 2


def test_flags_override_the_environment(file: Path) -> None:
    file.write_text(GOOD)
    environ = {"KVCENSUS__HTTP__LISTEN": "", "KVCENSUS__LOG__LEVEL": "debug"}
    config = load_config(file, environ, {"http.listen": "localhost:1"})
    assert config.http.listen == "localhost:1"
    assert config.log.level is LogLevel.DEBUG


def test_what_is_overridden_need_not_be_usable(file: Path) -> None:
    file.write_text("backend = 'gone'\n[http]\ntoken_file = '/nowhere'\n")
    environ = {"KVCENSUS__HTTP__TOKEN_FILE": ""}
    assert load_config(file, environ, {"backend": "memory"}).http.token_file == ""
    with pytest.raises(ConfigError, match=r"toml:1: backend: there is no backend gone"):
        load_config(file, environ)
    with pytest.raises(ConfigError, match=r"toml:3: http.token_file: /nowhere: No such file"):
        load_config(file, {"KVCENSUS__LOG__LEVEL": "debug"}, {"backend": "memory"})
    file.write_text("[writer]\ncommit_max_ms = '7'\n")
    with pytest.raises(ConfigError, match=r"toml:2: writer.commit_max_ms: Expected `int`, got `str`"):
        load_config(file, environ)


def test_the_variables_of_a_kubernetes_service_mean_nothing() -> None:
    environ = {"KVCENSUS_PORT": "tcp://10.0.0.1:9480", "KVCENSUS_SERVICE_HOST": "10.0.0.1", "PATH": "/bin"}
    assert load_config(None, environ) == Config()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("KVCENSUS__HTTP__LISTEN", "x", "'x' is not HOST:PORT"),
        ("KVCENSUS__WRITER__COMMIT_MAX_MS", "soon", "Expected `int`, got `str`"),
        ("KVCENSUS__WRITER__QUEUE_MAX_BYTES", "0", "Expected `int` >= 1"),
        ("KVCENSUS__BACKEND", "disk", "there is no backend disk; there are "),
        ("KVCENSUS__HTTP__LISTNE", "", "unknown key; did you mean listen?"),
        ("KVCENSUS__COLOUR", "red", "unknown key"),
        ("KVCENSUS__DATA_DIR", "/data/\udcff", "is not UTF-8"),
        ("KVCENSUS__HTTP", "x", "not KVCENSUS__KEY or KVCENSUS__SECTION__KEY"),
        ("KVCENSUS__HTTP__", "x", "not KVCENSUS__KEY or KVCENSUS__SECTION__KEY"),
        ("KVCENSUS__NOWHERE__KEY", "x", "not KVCENSUS__KEY or KVCENSUS__SECTION__KEY"),
        ("KVCENSUS__SOURCES__0__NAME", "x", "sources cannot be set here"),
    ],
)
def test_a_bad_variable_is_named(file: Path, variable: str, value: str, reason: str) -> None:
    error = error_of(file, GOOD, {variable: value})
    assert str(error).startswith(f"environment: {variable}: ")
    assert reason in error.reason


def test_flags_make_one_source_an_engine() -> None:
    config = config_from_flags(
        ["tcp://a:5557", "tcp://b:5557"],
        ["tcp://a:5558"],
        workers=["first"],
        topic="kv",
        model="m",
        data_dir="here",
        http="localhost:0",
        backend="memory",
        environ={"KVCENSUS__HTTP__LISTEN": "localhost:1", "KVCENSUS__WRITER__COMMIT_MAX_MS": "7"},
    )
    assert [(one.name, one.endpoint, one.replay_endpoint) for one in config.sources] == [
        ("first", "tcp://a:5557", "tcp://a:5558"),
        ("b:5557", "tcp://b:5557", ""),
    ]
    assert {(one.topic, one.model) for one in config.sources} == {("kv", "m")}
    assert (config.data_dir, config.http.listen, config.backend) == ("here", "localhost:0", "memory")
    assert config.writer.commit_max_ms == 7


def test_flags_leave_the_rest_at_its_default() -> None:
    config = config_from_flags(["tcp://a:5557"])
    assert config == load_config(None, {}, {"sources": [{"endpoint": "tcp://a:5557"}]})
    assert config_from_flags(["tcp://a:5557"], ranks=2, bind=True).sources[0].ranks == 2


def test_more_replay_endpoints_than_engines() -> None:
    with pytest.raises(ConfigError, match="command line: --replay-endpoint: given 2 times for 1 --engine"):
        config_from_flags(["tcp://a:5557"], ["tcp://a:5558", "tcp://b:5558"])
    with pytest.raises(ConfigError, match="command line: --worker: given 1 times for 0 --engine"):
        config_from_flags([], workers=["a"])


def test_flags_make_a_bus_of_the_servers() -> None:
    config = config_from_flags([], servers=["nats://a:4222", "nats://b:4222"], stream="KV", engine_type="dynamo")
    (bus,) = config.nats
    assert (bus.name, bus.type, bus.stream) == ("nats", "dynamo", "KV")
    assert bus.connection.servers == ("nats://a:4222", "nats://b:4222")
    assert config.sources == ()


def test_a_bad_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^command line: nats\[0\]\.connection\.servers"):
        config_from_flags([], servers=["nats://user:secret@a"])
    with pytest.raises(ConfigError, match=r"^command line: sources\[1\]\.endpoint: 'b' is not tcp"):
        config_from_flags(["tcp://a:5557", "b"])
    with pytest.raises(ConfigError, match=r"^command line: http\.listen: 'x' is not HOST:PORT"):
        config_from_flags(["tcp://a:5557"], http="x")
    with pytest.raises(ConfigError, match=r"^command line: backend: there is no backend x; there are "):
        config_from_flags(["tcp://a:5557"], backend="x")


STATEMENTS = st.sampled_from(
    [
        "# x = 1",
        "",
        "other{n} = 1",
        'other{n} = """\nkey = 1\n[[sources]]\n"""',
        "other{n} = [\n  1,\n\n  2, # ]\n]",
        "other{n} = 'key = 1'",
        "other{n}.key = {{ key = 1 }}",
    ]
)


@given(before=st.lists(STATEMENTS, max_size=12), after=st.lists(STATEMENTS, max_size=12), spread=st.booleans())
def test_the_line_of_a_key_is_found_among_anything(before: list[str], after: list[str], spread: bool) -> None:
    head = [statement.format(n=number) for number, statement in enumerate(before)]
    tail = [statement.format(n=number + len(before)) for number, statement in enumerate(after)]
    line = len("\n".join([*head, ""]).split("\n"))
    text = "\n".join([*head, "key = [\n 1\n]" if spread else "key = 1", *tail])
    tomllib.loads(text)
    assert line_of(text, "key") == (line if head else 1)


def test_the_line_of_a_key_that_is_not_there_is_that_of_its_table() -> None:
    assert line_of(GOOD, "sources[1].ranks") == 10
    assert line_of(GOOD, "sources[7]") == 6
    assert line_of(GOOD, "http.max_snapshots") == 3
    assert line_of(GOOD, "log.level") is None
