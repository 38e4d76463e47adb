"""Draws the dashboard from its own JSON and the answers of a real Prometheus: not by Grafana, which says each picture.

    python -m tests.screenshots.grafana [--seconds 150]

Writes docs/images/grafana-ROW.png, a picture for each row.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import dates
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.deploy.grafana_stage import board, series, stage

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NOTE = "drawn by this project from the dashboard's JSON and the answers of Prometheus, not by Grafana"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#999999")
BACKGROUND, TILE, TEXT = "#ffffff", "#f6f7f9", "#1f2328"
UNIT_WIDTH, UNIT_HEIGHT = 0.62, 0.36
SCALES = {"bytes": (1024, ("B", "KiB", "MiB", "GiB", "TiB")), "Bps": (1000, ("B", "kB", "MB", "GB", "TB"))}
DAY_S = 86400
"""matplotlib counts days."""


def shown(value: float, unit: str) -> str:
    """A number with its unit, as Grafana would abbreviate it."""
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    base, names = SCALES.get(unit, (1000, ("", "k", "M", "G")))
    step = 0
    while abs(value) >= base and step < len(names) - 1:
        value /= base
        step += 1
    suffixes = {"Bps": "/s", "mps": " msg/s", "eps": " events/s", "ops": " ops/s", "reqps": " req/s"}
    suffix = " " + unit.removeprefix("count:") if unit.startswith("count:") else suffixes.get(unit, "")
    number = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{number} {names[step]}".strip() + suffix


def legend_of(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], "none"), template)


def draw_stat(axes: Any, panel: dict[str, Any], prometheus: Any) -> None:
    axes.axis("off")
    found = series(prometheus, panel["targets"][0]["expr"])
    value = float(found[0]["value"][1])
    defaults = panel["fieldConfig"]["defaults"]
    steps = defaults["thresholds"]["steps"]
    colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    text = shown(value, defaults["unit"])
    for mapping in defaults["mappings"]:
        option = mapping["options"].get(f"{value:g}")
        text, colour = (option["text"], option["color"]) if option else (text, colour)
    axes.text(
        0.5, 0.42, text, ha="center", va="center", fontsize=21, color=colour, weight="bold", transform=axes.transAxes
    )


def draw_timeseries(axes: Any, panel: dict[str, Any], prometheus: Any, minutes: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    lines = [
        (legend_of(target["legendFormat"], one["metric"]), [(float(at), float(value)) for at, value in one["values"]])
        for target in panel["targets"]
        for one in series(prometheus, target["expr"], minutes=minutes)
    ]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        moments = [at / DAY_S for at, _ in points]
        if stacked:
            bottoms = [below.get(at, 0.0) for at, _ in points]
            tops = [bottom + value for bottom, (_, value) in zip(bottoms, points, strict=True)]
            axes.fill_between(moments, bottoms, tops, color=colour, alpha=0.35, linewidth=0)
            axes.plot(moments, tops, color=colour, linewidth=1.2, label=name)
            below.update({at: top for (at, _), top in zip(points, tops, strict=True)})
        else:
            axes.plot(moments, [value for _, value in points], color=colour, linewidth=1.2, label=name)
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=defaults["unit"] in ("none", "short")))
    _times(axes)
    axes.grid(axis="y", color="#dde1e6", linewidth=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=3, fontsize=7.5, frameon=False, handlelength=1.2)


def draw_states(axes: Any, panel: dict[str, Any], prometheus: Any, minutes: float) -> None:
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    rows = sorted(
        series(prometheus, panel["targets"][0]["expr"], minutes=minutes), key=lambda one: str(one["metric"]["stream"])
    )
    for at, one in enumerate(rows):
        for moment, value in one["values"]:
            colour = options[f"{float(value):g}"]["color"]
            axes.barh(at, 2.2 / DAY_S, left=float(moment) / DAY_S, height=0.8, color=colour, linewidth=0)
    axes.set_yticks(range(len(rows)), [one["metric"]["stream"] for one in rows], fontsize=8)
    axes.invert_yaxis()
    _times(axes)
    keys = [plt.Rectangle((0, 0), 1, 1, color=one["color"], label=one["text"]) for one in options.values()]
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=4, fontsize=8, frameon=False)


def _times(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S"))
    axes.tick_params(labelsize=7.5, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw(row: str, panels: list[dict[str, Any]], prometheus: Any, minutes: float) -> Path:
    """A picture of one row, each panel where the dashboard has it."""
    top = min(panel["gridPos"]["y"] for panel in panels)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    figure = plt.figure(figsize=(24 * UNIT_WIDTH, (height + 1.4) * UNIT_HEIGHT), facecolor=BACKGROUND)
    total = height + 1.4
    figure.text(0.008, 1 - 0.8 / total, f"kvcensus — {row}", fontsize=13, weight="bold", color=TEXT, va="center")
    figure.text(0.992, 1 - 0.8 / total, NOTE, fontsize=9, color="#59636e", ha="right", va="center", style="italic")
    for panel in panels:
        place = panel["gridPos"]
        x, y = place["x"] / 24, 1 - (place["y"] - top + place["h"] + 1.4) / total
        w, h = place["w"] / 24, place["h"] / total
        figure.add_artist(
            plt.Rectangle(
                (x + 0.004, y + 0.06 / total),
                w - 0.008,
                h - 0.2 / total,
                facecolor=TILE,
                transform=figure.transFigure,
                zorder=-1,
            )
        )
        figure.text(
            x + 0.011, y + h - 0.75 / total, panel["title"], fontsize=9.5, weight="bold", color=TEXT, va="center"
        )
        is_stat = panel["type"] == "stat"
        inner = (
            (x + 0.01, y + 0.3 / total, w - 0.02, h - 1.4 / total)
            if is_stat
            else (x + 0.058, y + 2.5 / total, w - 0.073, h - 4.1 / total)
        )
        axes = figure.add_axes(inner, facecolor=TILE)
        if is_stat:
            draw_stat(axes, panel, prometheus)
        elif panel["type"] == "state-timeline":
            draw_states(axes, panel, prometheus, minutes)
        else:
            draw_timeseries(axes, panel, prometheus, minutes)
    path = IMAGES / f"grafana-{row.lower().replace(' ', '-')}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="how long a past the pictures show")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as place, stage(Path(place)) as prometheus:
        time.sleep(seconds)
        row, of_row = "", dict[str, list[dict[str, Any]]]()
        for panel in board()["panels"]:
            if panel["type"] == "row":
                row = panel["title"]
            else:
                of_row.setdefault(row, []).append(panel)
        for name, panels in of_row.items():
            sys.stdout.write(f"{draw(name, panels, prometheus, seconds / 60)}\n")


if __name__ == "__main__":
    main()
