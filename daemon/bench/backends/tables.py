"""The comparison for people: tables on a terminal and in Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .running import Results, Row, Spread

_MIB = 1 << 20

METHOD = """\
Each backend, size, trace and round is a process of its own, with the options that the backend has by default. The
figure is the median of the rounds, with the least and the most in brackets. Translation is not part of any figure: a
trace is translated once, and every backend gets the same operations, 16,384 blocks a call of `apply`, with a cursor.

- Ingest: block hashes of all operations of the trace, stores and removals, by the time within `apply`. Removal: one
  copy of every fifth record afterwards, 16 hashes an event, in random order.
- `locate`, `prefix_scan`, `match` (chains of up to 64 blocks, all held): 5,000 questions each, one thread, after 200
  that do not count. `prefix_scan` does not ask for the roots; its slowest questions are of
  the end of a shared system prompt, which has thousands of children.
- `clear_worker`: the worker that holds most; reclaim: the space that this leaves to be freed. Reopen: the files are
  still in the page cache.
- Disk: blocks of the files after the close that follows ingest and questions, as `du` has it.
- Written: `write_bytes` of `/proc/PID/io` up to that close, which the kernel counts a page at a time when a page
  becomes dirty; on a file system in memory it counts nothing. Write amplification: that, by the bytes of keys and
  values that the backend handed to its store. What a backend hands over differs; compare backends by the bytes
  written per block of the operations.
- Memory: what the process has more than before it opened the backend, by a million records held; `RssAnon` is its
  own, `RssFile` pages of mapped files, which the kernel takes back when it needs them.
  Of a small index most is what is allocated once.
- Of a server (valkey) disk, writes and memory are the server's and are not measured: its memory column is the
  client's.
"""


class Column(NamedTuple):
    """A figure: its name in the results, its heading, and how a value is written."""

    figure: str
    heading: str
    text: Callable[[float], str]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _mib(value: float) -> str:
    return _short(value / _MIB)


_LATENCIES = [
    Column(f"{question}_{figure}_us", f"{question} {shown}, µs", _short)
    for question in ("locate", "prefix_scan", "match")
    for figure, shown in (("p50", "p50"), ("p99", "p99"), ("p999", "p99.9"))
]
GROUPS = {
    "Writing": [
        Column("ingest", "ingest, blocks/s", _whole),
        Column("removal", "removal, blocks/s", _whole),
        Column("clear_worker_ms", "clear_worker, ms", _short),
        Column("reclaim_ms", "reclaim, ms", _short),
        Column("reopen_ms", "reopen, ms", _short),
    ],
    "Asking": _LATENCIES,
    "Space": [
        Column("stored_bytes", "stored_bytes, MiB", _mib),
        Column("disk_bytes", "disk (du), MiB", _mib),
        Column("disk_per_record", "disk, bytes/record", _whole),
        Column("written_bytes", "written, MiB", _mib),
        Column("written_per_block", "written, bytes/block", _whole),
        Column("write_amplification", "written / handed over", _short),
        Column("rss_anon", "RssAnon, MiB/1M records", _mib),
        Column("rss_file", "RssFile, MiB/1M records", _mib),
    ],
}


def markdown(results: Results, machine: str, command: str) -> str:
    """A document: how it was measured, the traces, and three tables for each trace and size."""
    lines = [
        "# Backends compared",
        "",
        machine,
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        "## Method",
        "",
        METHOD.rstrip(),
    ]
    lines += ["", "## Traces", "", "| trace | size | messages | stored | removed | records left | refused |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for size, trace in results.traces:
        numbers = (size, trace.messages, trace.blocks_stored, trace.blocks_removed, trace.records, trace.rejections)
        lines.append(f"| {_escaped(trace.name)} | " + " | ".join(f"{one:,}" for one in numbers) + " |")
    for trace_name, size, rows in by_trace(results):
        lines += ["", f"## {trace_name}, {size:,} blocks"]
        for title, columns in GROUPS.items():
            lines += ["", f"### {title}", "", "| backend | " + " | ".join(column.heading for column in columns) + " |"]
            lines.append("|---|" + "--:|" * len(columns))
            for row in rows:
                if not row.failure:
                    cells = [_cell(column, row.figures.get(column.figure)) for column in columns]
                    lines.append(f"| {row.backend} | " + " | ".join(cells) + " |")
        failed = [f"- {row.backend} failed: {_escaped(row.failure)}" for row in rows if row.failure]
        lines += ["", *failed] if failed else []
    return "\n".join(lines) + "\n"


def show(results: Results, console: Console) -> None:
    """The same on a terminal: a line for each figure, so that it fits."""
    for trace_name, size, rows in by_trace(results):
        good = [row for row in rows if not row.failure]
        table = Table(title=f"{trace_name}, {size:,} blocks", title_justify="left")
        table.add_column("")
        for row in good:
            table.add_column(row.backend, justify="right")
        for columns in GROUPS.values():
            for column in columns:
                table.add_row(column.heading, *(_cell(column, row.figures.get(column.figure)) for row in good))
            table.add_section()
        console.print(table)
        for row in rows:
            if row.failure:
                console.print(f"{row.backend} failed: {row.failure}", markup=False)


def by_trace(results: Results) -> Iterator[tuple[str, int, list[Row]]]:
    """The rows of each trace and size."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in results.rows:
        found.setdefault((row.trace, row.size), []).append(row)
    for (trace, size), rows in found.items():
        yield trace, size, rows


def _cell(column: Column, figure: Spread | None) -> str:
    if figure is None:
        return "-"
    if figure.least == figure.most:
        return column.text(figure.median)
    return f"{column.text(figure.median)} ({column.text(figure.least)} to {column.text(figure.most)})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
