"""What is drilled: a configuration, the user's or one of our own, and the simulated engines at its endpoints."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from kvcensus.translators.translation import ClearScope, HashJoin

from ..bench.processes import free_port
from ..config import (
    Config,
    HttpConfig,
    LogConfig,
    LogFormat,
    LogLevel,
    SourceConfig,
    SourceType,
    WriterConfig,
)
from ..simulate.cache import CacheOptions
from ..simulate.engine import EngineOptions, SimulatedEngine
from ..simulate.rank import RankOptions
from ..simulate.wire import FORMATS
from ..simulate.workload import WorkloadOptions
from .machine import Link

_HWM = 60
_SEND_BUFFER = 8192
"""Small, so that a daemon that stands still for a moment loses messages."""

_OWN_WRITER = WriterConfig(queue_max_messages=64)
"""A queue that is full now and then."""

_OWN_TIMES: dict[str, Any] = {
    "replay_timeout_ms": 400,
    "probe_ms": 1000,
    "reconnect_min_ms": 20,
    "reconnect_max_ms": 200,
    "heartbeat_ms": 1000,
}
"""Patience of a drill: an engine on this machine that has not answered by then is not going to."""


class NothingToDrill(Exception):
    """A configuration without anything that an engine could be simulated for."""


class Target(msgspec.Struct, frozen=True):
    """A configuration with the endpoints of `engines`, which run. HTTP is at `port` of the daemon's end of `link`."""

    config: Config
    engines: list[SimulatedEngine]
    port: int
    link: Link


def own_sources(seed: int) -> tuple[SourceConfig, ...]:
    """Two engines, one with two ranks, in wire formats of the seed's choice."""
    random = Random(f"sources {seed}")
    types = [random.choice([SourceType.VLLM, SourceType.SGLANG]), SourceType.VLLM]
    return tuple(
        SourceConfig(
            endpoint="tcp://127.0.0.1:1",
            replay_endpoint="tcp://127.0.0.1:9001",
            name=name,
            type=kind,
            model="drilled",
            ranks=ranks,
            **_OWN_TIMES,
        )
        for name, kind, ranks in (("pair", types[0], 2), ("single", types[1], 0))
    )


def make_target(base: Config, seed: int, directory: Path, backend: str | None, link: Link) -> Target:
    """Start an engine for each source of `base`, or for those of our own if it has none, and point them at each other.

    HTTP and its credentials, CURVE, every place of an index, the log and further media are replaced; all else is
    drilled. `base` is `drillable`.
    """
    own = not base.sources
    sources, engines = [], []
    for number, source in enumerate(own_sources(seed) if own else base.sources):
        bound = f"tcp://{link.daemon}:{free_port()}" if source.bind else ""
        options = _engine_options(source, Random(f"{seed}/{number}"), seed, bound, link.engines)
        engine = SimulatedEngine(options).start()
        engines.append(engine)
        sources.append(
            msgspec.structs.replace(
                source,
                endpoint=bound or f"tcp://{link.engines}:{engine.base_port}",
                replay_endpoint=f"tcp://{link.engines}:{engine.replay_port}" if source.replay_endpoint else "",
                curve_server_key_file="",
                curve_secret_key_file="",
                media={},
            )
        )
    port = free_port()
    config = msgspec.structs.replace(
        _elsewhere(base, directory, f"kvcensus-drill-{seed}-{secrets.token_hex(4)}"),
        backend=base.backend if backend is None else backend,
        http=HttpConfig(listen=f"{link.daemon}:{port}"),
        log=LogConfig(level=LogLevel.DEBUG, format=LogFormat.JSON),
        writer=_OWN_WRITER if own else base.writer,
        sources=tuple(sources),
    )
    return Target(config, engines, port, link)


def drillable(base: Config) -> tuple[Config, list[str]]:
    """What simulated engines can stand in for, and a sentence on each thing that is left out. Raises NothingToDrill."""
    sources = tuple(source for source in base.sources if not source.is_bus)
    left_out = [f"{bus.name} is left out: the simulated engines have no bus" for bus in base.buses()]
    if left_out and not sources:
        raise NothingToDrill("only buses are configured, and the simulated engines have none")
    return msgspec.structs.replace(base, sources=sources, nats=()), left_out


def _elsewhere(base: Config, directory: Path, namespace: str) -> Config:
    """The same without any place where a real index might be: `namespace` is for those on a server."""
    shadow = base.shadow
    if shadow.backend:
        named = {"namespace": namespace, "part": "shadow"} if shadow.backend == "valkey" else {}
        data_dir = str(directory / "shadow")
        shadow = msgspec.structs.replace(shadow, data_dir=data_dir, options=shadow.options | named)
    return msgspec.structs.replace(
        base,
        data_dir=str(directory / "data"),
        shadow=shadow,
        valkey=msgspec.structs.replace(base.valkey, namespace=namespace, part="index"),
    )


def forget_indexes(config: Config) -> None:
    """Delete what a drill has left on a server. Raises BackendError."""
    if "valkey" not in (config.backend, config.shadow.backend):
        return
    from kvcensus.backends.valkey.forgetting import forget_index

    if config.backend == "valkey":
        forget_index(config.backend_options())
    if config.shadow.backend == "valkey":
        forget_index(config.shadow.options)


def _engine_options(source: SourceConfig, random: Random, seed: int, bound: str, address: str) -> EngineOptions:
    forms = [one for one in FORMATS.values() if one.name.startswith(source.type) and (one.has_rank or not source.ranks)]
    form = random.choice(forms)
    hash_bytes = 0 if form.signed or source.hash_join is HashJoin.ALWAYS else random.choice((0, 0, 16, 32))
    joins = source.hash_join is not HashJoin.NEVER or not form.long_offloaded
    host, _, port = bound.rpartition(":")
    rank = RankOptions(
        form=form.name,
        hash_bytes=hash_bytes,
        cache=CacheOptions(
            blocks=random.choice((96, 256, 1024)),
            cpu_blocks=random.choice((0, 50, 200)) if joins else 0,
            window_blocks=random.choice((0, 0, 2)),
            copies=source.count_copies,
            clear_offloaded=form.sglang or source.clears is ClearScope.ALL,
        ),
        workload=WorkloadOptions(adapters=random.randint(0, 2)),
        clear_every=random.choice((0, 0, 150)),
        topic=source.topic,
    )
    return EngineOptions(
        name=source.name,
        seed=seed,
        ranks=source.ranks,
        rank=rank,
        host=address,
        replay=bool(source.replay_endpoint),
        connect=tuple(f"{host}:{int(port) + at}" for at in range(max(source.ranks, 1))) if bound else (),
        live_hwm=_HWM,
        send_buffer=_SEND_BUFFER,
    )


def toml_text(config: Config) -> str:
    """The configuration as a file."""
    return "\n".join(_lines("", msgspec.to_builtins(config))) + "\n"


def _lines(path: str, values: Mapping[str, Any]) -> list[str]:
    """A table without its heading. A text in JSON is one in TOML."""
    tables = {key: value for key, value in values.items() if _is_table(value)}
    plain = {key: value for key, value in values.items() if key not in tables and value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        below = f"{path}{key}"
        for row in [value] if isinstance(value, dict) else value:
            lines += [f"[{below}]" if isinstance(value, dict) else f"[[{below}]]", *_lines(f"{below}.", row)]
    return lines


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and all(isinstance(one, dict) for one in value))
