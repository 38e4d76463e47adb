"""One backend and one trace, once, in this process: `python -m kvcensus.daemon.bench.backends.measuring`.

A Job as JSON on stdin, Measured as JSON on stdout.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import ClearBlocks, Cursor, Operation
from kvcensus.backends.registry import open_backend

from ...collector import settle_collector
from ..latency import Latency, measure
from ..processes import rss_mb
from .trace_file import Questions, TraceReader

_ASKED = 5_000
_RECLAIM_ROWS = 5_000
_BLOCK_BYTES = 512
"""Unit of `st_blocks`."""


class Job(msgspec.Struct, frozen=True):
    """What is measured. `on_server`: what the backend stores is not in `directory`, nor written by this process."""

    backend: str
    trace: str
    directory: str
    options: dict[str, Any] = {}
    on_server: bool = False


class Measured(msgspec.Struct, frozen=True):
    """Figures of one process. None where there is nothing to measure.

    Times in seconds. `written_bytes` is `write_bytes` of /proc/self/io from before the opening to after the close that
    follows ingest, `cancelled_bytes` what of it was deleted before it reached a disk, `handed_bytes` the keys and
    values that the backend says it handed to its store meanwhile. Memory in bytes, over what the process had before it
    opened the backend.
    """

    records: int
    ingest_blocks: int
    ingest_s: float
    removal_blocks: int
    removal_s: float
    locate: Latency
    prefix_scan: Latency
    match: Latency
    clear_worker_s: float
    clear_worker_records: int
    reclaim_s: float
    rss_anon: int
    rss_file: int
    reopen_s: float | None = None
    stored_bytes: int | None = None
    disk_bytes: int | None = None
    written_bytes: int | None = None
    cancelled_bytes: int | None = None
    handed_bytes: int | None = None


def run(job: Job) -> Measured:
    """Ingest, ask, close, open again, remove, clear. Raises BackendError."""
    reader = TraceReader(Path(job.trace))
    directory = Path(job.directory)
    settle_collector()
    gc.collect()
    anon, mapped = rss_mb(os.getpid())
    written, cancelled = _io()
    backend = open_backend(job.backend, directory, job.options)
    try:
        ingest_blocks, ingest_s = _apply(backend, reader.batches())
        handed = backend.metrics().bytes_written
        gc.collect()
        anon_after, mapped_after = rss_mb(os.getpid())
        records = len(backend)
        questions = reader.questions()
        figures: dict[str, Any] = {**_ask(backend, questions)}
        if backend.persistent():
            if not job.on_server:
                figures["stored_bytes"] = backend.stored_bytes()
            backend.close()
            if not job.on_server:
                figures["disk_bytes"] = _disk(directory)
                after, cancelled_after = _io()
                figures["written_bytes"] = after - written
                figures["cancelled_bytes"] = cancelled_after - cancelled
                figures["handed_bytes"] = handed or None
            started = time.perf_counter()
            backend = open_backend(job.backend, directory, job.options)
            figures["reopen_s"] = time.perf_counter() - started
            assert len(backend) == records, (len(backend), records)
        removal_blocks, removal_s = _apply(backend, reader.batches())
        started = time.perf_counter()
        cleared = backend.clear_worker(questions.worker_id)
        clear_s = time.perf_counter() - started
        started = time.perf_counter()
        _reclaim(backend)
        reclaim_s = time.perf_counter() - started
        if job.on_server:
            backend.clear()
            _reclaim(backend)
    finally:
        with suppress(Exception):  # a backend that was closed and could not be opened again
            backend.close()
        reader.close()
    return Measured(
        records=records,
        ingest_blocks=ingest_blocks,
        ingest_s=ingest_s,
        removal_blocks=removal_blocks,
        removal_s=removal_s,
        clear_worker_s=clear_s,
        clear_worker_records=cleared,
        reclaim_s=reclaim_s,
        rss_anon=round((anon_after - anon) * 1000) << 10,
        rss_file=round((mapped_after - mapped) * 1000) << 10,
        **figures,
    )


def _apply(backend: IndexBackend, batches: Iterable[list[Operation]]) -> tuple[int, float]:
    """Block hashes of the operations, and the seconds within `apply`. Reading the trace does not count."""
    blocks, seconds = 0, 0.0
    for number, batch in enumerate(batches):
        cursor = Cursor("bench", 1, number, worker_id="bench")
        started = time.perf_counter()
        backend.apply(batch, [cursor])
        seconds += time.perf_counter() - started
        blocks += sum(len(one.block_hashes) for one in batch if not isinstance(one, ClearBlocks))
    return blocks, seconds


def _ask(backend: IndexBackend, questions: Questions) -> dict[str, Latency]:
    keys, parents, chains = questions.keys, questions.parents, questions.chains
    assert all(backend.locate(key) for key in keys[:100])
    return {
        "locate": measure(lambda number: backend.locate(keys[number % len(keys)]), _ASKED),
        "prefix_scan": measure(lambda number: backend.prefix_scan(*parents[number % len(parents)]), _ASKED),
        "match": measure(
            lambda number: backend.match(chains[number % len(chains)].scope, chains[number % len(chains)].block_hashes),
            _ASKED,
        ),
    }


def _reclaim(backend: IndexBackend) -> None:
    while backend.reclaim(_RECLAIM_ROWS):
        pass


def _io() -> tuple[int, int]:
    """Bytes that this process has caused to be written to storage, and those of them that were cancelled."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"]), int(fields["cancelled_write_bytes"])


def _disk(directory: Path) -> int:
    """What `du` says of a directory."""
    return sum(path.stat().st_blocks * _BLOCK_BYTES for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
