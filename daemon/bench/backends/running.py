"""Every backend with every trace, each time in a process of its own, and the median of the rounds with its spread."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from kvcensus.backends.errors import BackendError

from .measuring import Job, Measured
from .trace_file import Trace
from .traces import is_recording, make_trace

_SERVER = "valkey"
_MILLION = 1_000_000


class Spread(msgspec.Struct, frozen=True):
    """A figure over the rounds."""

    median: float
    least: float
    most: float


class Row(msgspec.Struct, frozen=True):
    """One backend with one trace. `figures` by the names in `FIGURES`; `failure` says why there are none."""

    backend: str
    trace: str
    size: int
    figures: dict[str, Spread] = {}
    failure: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What is measured. `traces` as in `make_trace`; `server` is HOST:PORT of a Valkey server, "" for none."""

    backends: Sequence[str]
    sizes: Sequence[int]
    traces: Sequence[str]
    rounds: int
    engine: str = "vllm"
    server: str = ""


class Results(msgspec.Struct, frozen=True):
    """The traces that there were, and a row for each of them and each backend."""

    traces: list[tuple[int, Trace]]
    rows: list[Row]


def compare(plan: Plan, directory: Path, say: Callable[[str], None]) -> Results:
    """Measure all of a plan; files are made below `directory`. A backend that fails is a row that says so.

    Raises RecordingError.
    """
    traces: list[tuple[int, Trace]] = []
    rows: list[Row] = []
    for name in plan.traces:
        for size in plan.sizes[:1] if is_recording(name) else plan.sizes:
            with tempfile.TemporaryDirectory(dir=directory) as place:
                say(f"{name}: making the trace")
                trace = make_trace(name, size, Path(place, "trace"), plan.engine)
                label = trace.blocks_stored if is_recording(name) else size
                traces.append((label, trace))
                rows += _rows(plan, trace, label, Path(place), say)
    return Results(traces, rows)


def _rows(plan: Plan, trace: Trace, size: int, directory: Path, say: Callable[[str], None]) -> list[Row]:
    """The rounds go over all backends in turn, so that what else the machine does is spread over them."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in plan.backends}
    failures: dict[str, str] = {}
    for number in range(plan.rounds):
        for name in plan.backends:
            if name in failures:
                continue
            say(f"{trace.name}, {size:,} blocks, {name}, round {number + 1} of {plan.rounds}")
            result = _measure(name, trace, directory, plan.server)
            if isinstance(result, str):
                failures[name] = result
            else:
                measured[name].append(_figures(result))
    return [
        Row(name, trace.name, size, failure=failures[name])
        if name in failures
        else Row(name, trace.name, size, _spreads(measured[name]))
        for name in plan.backends
    ]


def _measure(backend: str, trace: Trace, directory: Path, server: str) -> Measured | str:
    """The figures of one process, or the last line that it wrote."""
    on_server = backend == _SERVER
    namespace = f"bench-{uuid.uuid4().hex}"
    options: dict[str, Any] = {"servers": [server], "namespace": namespace} if on_server else {}
    with tempfile.TemporaryDirectory(dir=directory) as place:
        job = Job(backend, trace.path, str(Path(place, "index")), options, on_server)
        command = [sys.executable, "-m", "kvcensus.daemon.bench.backends.measuring"]
        ended = subprocess.run(command, input=msgspec.json.encode(job), capture_output=True, check=False)
    if on_server:
        from kvcensus.backends.valkey.forgetting import forget_index

        with suppress(BackendError):  # a server that is away has told so already
            forget_index(options)
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with {ended.returncode}"
    return msgspec.json.decode(ended.stdout, type=Measured)


def _figures(one: Measured) -> dict[str, float]:
    """The comparable figures of one process. What was not measured is left out."""
    records = max(one.records, 1)
    found: dict[str, float | None] = {
        "ingest": one.ingest_blocks / one.ingest_s,
        "removal": one.removal_blocks / one.removal_s if one.removal_blocks else None,
        "clear_worker_ms": one.clear_worker_s * 1000,
        "reclaim_ms": one.reclaim_s * 1000,
        "reopen_ms": None if one.reopen_s is None else one.reopen_s * 1000,
        "rss_anon": one.rss_anon * _MILLION / records,
        "rss_file": one.rss_file * _MILLION / records,
        "stored_bytes": one.stored_bytes,
        "disk_bytes": one.disk_bytes,
        "disk_per_record": None if one.disk_bytes is None else one.disk_bytes / records,
        "written_bytes": one.written_bytes,
        "cancelled_bytes": one.cancelled_bytes,
        "written_per_block": None if one.written_bytes is None else one.written_bytes / one.ingest_blocks,
        "write_amplification": one.written_bytes / one.handed_bytes if one.written_bytes and one.handed_bytes else None,
    }
    for question in ("locate", "prefix_scan", "match"):
        latency = getattr(one, question)
        for field in latency.__struct_fields__:
            found[f"{question}_{field}"] = getattr(latency, field)
    return {name: float(value) for name, value in found.items() if value is not None}


def _spreads(rounds: list[dict[str, float]]) -> dict[str, Spread]:
    return {
        name: Spread(statistics.median(values), min(values), max(values))
        for name in rounds[0]
        if (values := [figures[name] for figures in rounds if name in figures])
    }
