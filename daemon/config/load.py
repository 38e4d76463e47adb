"""Reading the configuration: a TOML file, then environment overrides, then flags."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from .errors import ConfigError, InvalidValue
from .filesystem import FilesystemConfig
from .model import Config, HttpConfig, IndexConfig, LogConfig, QuarantineConfig, WriterConfig
from .nats import NatsConfig
from .nats_servers import NatsServers
from .relay import RelayConfig
from .rocksdb import RocksdbConfig
from .shadow import ShadowConfig
from .source import SourceConfig
from .toml_lines import line_of
from .valkey import ValkeyConfig

ENVIRONMENT_PREFIX = "KVCENSUS__"
"""Two underscores: Kubernetes sets KVCENSUS_PORT when a Service has the program's name."""

_STRUCTS = (
    Config,
    HttpConfig,
    IndexConfig,
    WriterConfig,
    QuarantineConfig,
    LogConfig,
    SourceConfig,
    NatsConfig,
    NatsServers,
    RelayConfig,
    ShadowConfig,
    FilesystemConfig,
    RocksdbConfig,
    ValkeyConfig,
)
_SECTIONS = (
    *("http", "index", "writer", "quarantine", "log", "relay", "shadow"),
    *("filesystem", "rocksdb", "valkey"),
)
_AT = re.compile(r"(?P<reason>.*?)(?: - at `\$\.?(?P<key>.*?)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<verb>contains unknown|missing required) field `(?P<field>[^`]*)`")
_TOML_PLACE = re.compile(r"(?P<reason>.*) \(at (?:line (?P<line>[0-9]+), column [0-9]+|end of document)\)", re.DOTALL)


def load_config(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Config:
    """Read `path` (None: defaults only), then KVCENSUS__SECTION__KEY of `environ`, then `overrides` by dotted key.

    Raises ConfigError, which names the place.
    """
    text = _read(path) if path is not None else ""
    table = _parse(text, path)
    from_environment = _environment_overrides(environ)
    layers: dict[str, object] = {key: value for key, (_, value) in from_environment.items()} | dict(overrides or {})
    try:
        config = _convert(table, lambda key, reason: _in_file(text, path, key, reason), strict=True)
    except ConfigError as error:
        if not layers or not _is_of_value(error):
            raise
    else:
        if not layers:
            return config
    for key, value in layers.items():
        _put(table, key, value)

    def located(key: str, reason: str) -> ConfigError:
        if overrides and key in overrides:
            return ConfigError("command line", None, key, reason)
        if key in from_environment:
            return ConfigError("environment", None, from_environment[key][0], reason)
        if overrides and any(key.startswith(f"{name}[") for name in overrides):
            return ConfigError("command line", None, key, reason)
        return _in_file(text, path, key, reason)

    return _convert(table, located, strict=False)


def config_from_flags(
    engines: Sequence[str],
    replay_endpoints: Sequence[str] = (),
    *,
    workers: Sequence[str] = (),
    servers: Sequence[str] = (),
    stream: str = "",
    engine_type: str = "vllm",
    topic: str = "",
    model: str = "",
    bind: bool = False,
    ranks: int = 0,
    data_dir: str | None = None,
    http: str | None = None,
    backend: str | None = None,
    environ: Mapping[str, str] | None = None,
    relay: Mapping[str, object] | None = None,
) -> Config:
    """The configuration of `kvcensus run --engine …`: one source per engine, further flags paired by order.

    `servers` and `stream` are those of one bus, which is called `nats`. `topic`, `model`, `engine_type`, `bind` and
    `ranks` are those of every engine; `relay` has keys of that section. Raises ConfigError.
    """
    for flag, values in (("--replay-endpoint", replay_endpoints), ("--worker", workers)):
        if len(values) > len(engines):
            raise ConfigError("command line", None, flag, f"given {len(values)} times for {len(engines)} --engine")
    sources = [
        {
            "endpoint": engine,
            "replay_endpoint": replay,
            "name": worker,
            "type": engine_type,
            "topic": topic,
            "model": model,
            "bind": bind,
            "ranks": ranks,
        }
        for engine, replay, worker in zip_longest(engines, replay_endpoints, workers, fillvalue="")
    ]
    buses = []
    if servers:
        bus = {"name": "nats", "type": engine_type, "model": model, "stream": stream}
        buses.append({**bus, "connection": {"servers": servers}})
    flags = {"data_dir": data_dir, "http.listen": http, "backend": backend}
    overrides: dict[str, object] = {key: value for key, value in flags.items() if value is not None}
    overrides |= {f"relay.{key}": value for key, value in (relay or {}).items()}
    return load_config(None, environ or {}, overrides | {"sources": sources, "nats": buses})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), None, "", f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(str(path), None, "", error.strerror or str(error)) from error


def _parse(text: str, path: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.fullmatch(str(error))
        last_line = len(text.rstrip("\n").split("\n"))
        line = int(place["line"]) if place and place["line"] else last_line
        raise ConfigError(str(path), line, "", f"not TOML: {place['reason'] if place else error}") from error


def _environment_overrides(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Dotted key to (variable, value)."""
    found = {}
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if value != value.encode(errors="replace").decode():
            raise ConfigError("environment", None, variable, "is not UTF-8")
        parts = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if parts[0] == "sources":
            raise ConfigError("environment", None, variable, "sources cannot be set here; use a file or --engine")
        if len(parts) != (2 if parts[0] in _SECTIONS else 1) or not all(parts):
            raise ConfigError(
                "environment", None, variable, f"not {ENVIRONMENT_PREFIX}KEY or {ENVIRONMENT_PREFIX}SECTION__KEY"
            )
        found[".".join(parts)] = (variable, value)
    return found


def _put(table: dict[str, Any], key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    (table.setdefault(section, {}) if section else table)[name] = value


def _convert(table: dict[str, Any], located: Any, *, strict: bool) -> Config:
    try:
        return msgspec.convert(table, Config, strict=strict)
    except msgspec.ValidationError as error:
        raise located(*_key_and_reason(error)) from error


def _is_of_value(error: ConfigError) -> bool:
    """Whether the types are right: what overrides the value, or one that it does not go with, may mend it."""
    return error.__cause__ is not None and isinstance(error.__cause__.__cause__, InvalidValue)


def _key_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """Dotted key and a sentence, from msgspec's text or our own InvalidValue."""
    text = _AT.fullmatch(str(error))
    reason, key = (text["reason"], text["key"] or "") if text else (str(error), "")
    key = key.removesuffix("[...]")
    if isinstance(error.__cause__, InvalidValue):
        return _join(key, error.__cause__.key), error.__cause__.reason
    if field := _FIELD.match(reason):
        name = field["field"]
        if field["verb"] == "missing required":
            return _join(key, name), "is required"
        near = difflib.get_close_matches(name, [one for struct in _STRUCTS for one in struct.__struct_fields__], 1)
        return _join(key, name), f"unknown key; did you mean {near[0]}?" if near else "unknown key"
    if reason.startswith("Invalid enum value"):
        return key, f"{reason}; expected one of {', '.join(_choices(key))}"
    return key, reason


def _choices(key: str) -> list[str]:
    name = key.rpartition(".")[2]
    for struct in _STRUCTS:
        for field in msgspec.structs.fields(struct):
            if field.name == name:
                kind = getattr(field.type, "__args__", [field.type])[-1]
                return [str(one) for one in kind] if issubclass(kind, StrEnum) else []
    return []


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _in_file(text: str, path: Path | None, key: str, reason: str) -> ConfigError:
    return ConfigError(str(path) if path else None, line_of(text, key) if path else None, key, reason)
