"""Plots of a comparison, as PNG and SVG: a column for each figure, a row for each trace, a bar for each backend."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .running import Results, Row

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Told apart by those who do not see all colours."""
_PNG_DPI = 150


class PlotsUnavailable(Exception):
    """matplotlib is not installed."""


class _Panel(NamedTuple):
    title: str
    figure: str
    per: float = 1.0


_PLOTS = {
    "throughput": (
        "Blocks a second (more is better)",
        [_Panel("ingest, 1,000 blocks/s", "ingest", 1e3), _Panel("removal, 1,000 blocks/s", "removal", 1e3)],
    ),
    "latency": (
        "Answers, microseconds: p50, and p99 in lighter colour; logarithmic (less is better)",
        [
            _Panel("locate", "locate_p50_us"),
            _Panel("prefix_scan", "prefix_scan_p50_us"),
            _Panel("match of up to 64 blocks", "match_p50_us"),
        ],
    ),
    "space": (
        "Space (less is better)",
        [
            _Panel("disk, bytes a record", "disk_per_record"),
            _Panel("written, bytes a block", "written_per_block"),
            _Panel("RssAnon, MiB per 1M records", "rss_anon", float(1 << 20)),
        ],
    ),
    "life": (
        "Milliseconds (less is better)",
        [_Panel("reopen", "reopen_ms"), _Panel("clear_worker", "clear_worker_ms"), _Panel("reclaim", "reclaim_ms")],
    ),
}


def require_matplotlib() -> Any:
    """The module that makes figures. Raises PlotsUnavailable."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise PlotsUnavailable("plots need matplotlib: pip install 'kvcensus[plots]'") from error


def write_plots(results: Results, directory: Path) -> list[Path]:
    """Make the plots of every size. Recordings are with the sizes that they have. Raises PlotsUnavailable, OSError."""
    matplotlib = require_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    good = [row for row in results.rows if not row.failure]
    written = []
    for size in sorted({row.size for row in good}):
        rows = [row for row in good if row.size == size]
        for name, (title, panels) in _PLOTS.items():
            figure = _plot(matplotlib, f"{title} — {size:,} blocks", panels, rows)
            for suffix in ("png", "svg"):
                path = directory / f"{name}-{size}.{suffix}"
                figure.savefig(path, dpi=_PNG_DPI)
                written.append(path)
    return written


def _plot(matplotlib: Any, title: str, panels: list[_Panel], rows: list[Row]) -> Any:
    traces = list(dict.fromkeys(row.trace for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    height = 0.9 + len(traces) * (0.8 + 0.36 * len(backends))
    figure = matplotlib.Figure(figsize=(3.9 * len(panels) + 1, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(len(traces), len(panels), squeeze=False)
    for down, trace in enumerate(traces):
        for across, panel in enumerate(panels):
            axes = grid[down][across]
            _draw(axes, panel, {row.backend: row for row in rows if row.trace == trace}, backends)
            axes.set_title(f"{trace}: {panel.title}", fontsize=10, loc="left")
            if across:
                axes.set_yticklabels([])
    return figure


def _draw(axes: Any, panel: _Panel, rows: dict[str, Row], backends: list[str]) -> None:
    """Bars from the top down, each with its value and the spread of its rounds."""
    longest = 0.0
    for at, backend in enumerate(backends):
        figure = rows[backend].figures.get(panel.figure) if backend in rows else None
        if figure is None:
            axes.text(0, at, " none, or not measured", va="center", fontsize=8, color="#777777")
            continue
        color = _COLORS[at % len(_COLORS)]
        value, least, most = (one / panel.per for one in (figure.median, figure.least, figure.most))
        label_at = most
        if panel.figure.endswith("_p50_us"):
            tail = rows[backend].figures[panel.figure.replace("p50", "p99")]
            axes.barh(at, tail.median, color=color, alpha=0.35)
            text = f" {_number(value)} / {_number(tail.median)}"
            label_at = max(most, tail.median)
        else:
            text = f" {_number(value)}"
        axes.barh(at, value, color=color)
        axes.errorbar(value, at, xerr=[[value - least], [most - value]], color="black", capsize=2, linewidth=0.8)
        axes.text(label_at, at, text, va="center", fontsize=8)
        longest = max(longest, label_at)
    axes.set_yticks(range(len(backends)), backends)
    axes.set_ylim(len(backends) - 0.4, -0.6)
    if panel.figure.endswith("_us"):
        axes.set_xscale("log")
        axes.set_xlim(1, max(longest, 1) * 12)
    else:
        axes.set_xlim(0, longest * 1.4 or 1)
        axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
