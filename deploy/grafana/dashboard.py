"""Writes kvcensus.json, the Grafana dashboard, from the list of panels below.

    python deploy/grafana/dashboard.py > deploy/grafana/kvcensus.json

The colours are those of Okabe and Ito, which people of any colour vision can tell apart.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

GREEN, YELLOW, ORANGE, RED, BLUE = "#009E73", "#F0E442", "#E69F00", "#D55E00", "#0072B2"
WIDTH = 24
HEIGHT = 8
STAT_HEIGHT = 4
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
DAEMON = 'instance=~"$instance"'
STREAM = f'{DAEMON}, stream=~"$stream"'
RATE = "$__rate_interval"
BLOCKS = "count:blocks/s"
"""A unit of our own, in Grafana's notation for one."""
RUNBOOKS = "https://example.org/kvcensus/runbooks/"
"""Where the runbook pages are served; to be set in the dashboard."""
TRUST_NUMBERS = ("fresh", "catching_up", "stale", "untrusted")
TRUST_COLOURS = (GREEN, BLUE, ORANGE, RED)

Steps = tuple[tuple[float | None, str], ...]
PLAIN: Steps = ((None, BLUE),)


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are legend and expression; `unit` is Grafana's name of it."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    steps: Steps = PLAIN
    most: float | None = None
    stacked: bool = False
    mappings: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """Panels under a title."""

    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, labels: str, by: str) -> str:
    """The sum over all but `by` of what a counter grows by in a second."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{RATE}]))"


def quantile(share: float, metric: str, labels: str, by: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def named(values: tuple[str, ...], colours: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """Numbers from 0 on as words in colours."""
    options = {
        str(number): {"text": word.replace("_", " "), "color": colour, "index": number}
        for number, (word, colour) in enumerate(zip(values, colours, strict=True))
    }
    return ({"type": "value", "options": options},)


def stat(title: str, description: str, unit: str, query: str, steps: Steps = PLAIN, **more: Any) -> Panel:
    """A single figure over all daemons that are chosen."""
    return Panel(title, description, unit, (("", query),), kind="stat", width=4, steps=steps, **more)


TRUST = " + ".join(
    f'{number} * sum by (stream) (kvcensus_stream_trust{{{STREAM}, trust="{trust}"}})'
    for number, trust in enumerate(TRUST_NUMBERS)
)
YES_NO = (
    {"type": "value", "options": {"1": {"text": "ready", "color": GREEN}, "0": {"text": "NOT READY", "color": RED}}},
)

OVERVIEW = (
    stat(
        "Ready",
        "The least of the daemons: whether /readyz says yes. KvcensusNotReady",
        "none",
        f"min(kvcensus_ready{{{DAEMON}}})",
        ((None, RED), (1, GREEN)),
        mappings=YES_NO,
    ),
    stat(
        "Workers that are fresh",
        "Share of the workers whose blocks can be believed. KvcensusWorkersNotFresh",
        "percentunit",
        f'sum(kvcensus_stream_trust{{{DAEMON}, trust="fresh"}}) / sum(kvcensus_stream_trust{{{DAEMON}}})',
        ((None, RED), (0.5, ORANGE), (1, GREEN)),
    ),
    stat(
        "Untrusted workers",
        "Messages of them were lost for good. KvcensusWorkerFenced",
        "none",
        f'sum(kvcensus_stream_trust{{{DAEMON}, trust="untrusted"}})',
        ((None, GREEN), (1, RED)),
    ),
    stat(
        "Records",
        "Residencies in the index: a block on a worker at a tier.",
        "short",
        f"sum(kvcensus_backend_records{{{DAEMON}}})",
    ),
    stat(
        "Lag, p99",
        "From the engine's timestamp of a message to its commit. KvcensusLagHigh",
        "s",
        quantile(0.99, "kvcensus_stream_lag_seconds", DAEMON, "job"),
        ((None, GREEN), (1, ORANGE), (5, RED)),
    ),
    stat(
        "Queue",
        "How full the queue to the writer is. KvcensusQueueFull",
        "percentunit",
        f"max(kvcensus_queue_messages{{{DAEMON}}} / kvcensus_queue_limit_messages{{{DAEMON}}})",
        ((None, GREEN), (0.5, ORANGE), (0.8, RED)),
        most=1,
    ),
    Panel(
        "Blocks stored and removed",
        "Blocks of applied events.",
        BLOCKS,
        (
            ("stored", f"sum(rate(kvcensus_stream_blocks_stored_total{{{DAEMON}}}[{RATE}]))"),
            ("removed", f"sum(rate(kvcensus_stream_blocks_removed_total{{{DAEMON}}}[{RATE}]))"),
        ),
    ),
    Panel(
        "Messages applied",
        "By daemon.",
        "mps",
        (("{{instance}}", rate("kvcensus_stream_applied_messages_total", DAEMON, "instance")),),
    ),
    Panel(
        "Workers by trust",
        "How many workers can be believed how far.",
        "none",
        tuple(
            (trust.replace("_", " "), f'sum(kvcensus_stream_trust{{{DAEMON}, trust="{trust}"}})')
            for trust in TRUST_NUMBERS
        ),
        stacked=True,
    ),
)
WORKERS = (
    Panel(
        "Trust",
        "How far the blocks of each worker can be believed, over time. KvcensusWorkerFenced",
        "none",
        (("{{stream}}", TRUST),),
        kind="state-timeline",
        width=WIDTH,
        mappings=named(TRUST_NUMBERS, TRUST_COLOURS),
    ),
    Panel(
        "Blocks stored",
        "By worker.",
        BLOCKS,
        (("{{stream}}", rate("kvcensus_stream_blocks_stored_total", STREAM, "stream")),),
    ),
    Panel(
        "Blocks removed",
        "By worker.",
        BLOCKS,
        (("{{stream}}", rate("kvcensus_stream_blocks_removed_total", STREAM, "stream")),),
    ),
    Panel(
        "Lag, p99",
        "From the engine's timestamp to the commit. KvcensusLagHigh",
        "s",
        (("{{stream}}", quantile(0.99, "kvcensus_stream_lag_seconds", STREAM, "stream")),),
    ),
)
STREAMS = (
    Panel(
        "Messages received",
        "By stream.",
        "mps",
        (("{{stream}}", rate("kvcensus_stream_messages_total", STREAM, "stream")),),
    ),
    Panel(
        "Missing and given up",
        "Sequence numbers that were missing, and those that no replay brought. KvcensusReplayFailing",
        "mps",
        (
            ("missing", f"sum(rate(kvcensus_stream_missing_messages_total{{{STREAM}}}[{RATE}]))"),
            ("replayed", f"sum(rate(kvcensus_stream_replayed_messages_total{{{STREAM}}}[{RATE}]))"),
            ("given up", f"sum(rate(kvcensus_stream_unrecovered_messages_total{{{STREAM}}}[{RATE}]))"),
        ),
    ),
    Panel(
        "Refused",
        "Payloads and events that could not be read, by reason. KvcensusQuarantineGrowing",
        "eps",
        (("{{reason}}", rate("kvcensus_stream_rejections_total", STREAM, "reason")),),
    ),
    Panel(
        "Restarts and disconnects",
        "Of engines, in the last hour. KvcensusStreamDisconnected",
        "none",
        (
            ("restarts", f"sum(increase(kvcensus_stream_restarts_total{{{STREAM}}}[1h]))"),
            ("disconnects", f"sum(increase(kvcensus_stream_disconnects_total{{{STREAM}}}[1h]))"),
        ),
    ),
    Panel(
        "Replays",
        "Asked for, and failed.",
        "reqps",
        (
            ("asked for", f"sum(rate(kvcensus_stream_replay_requests_total{{{STREAM}}}[{RATE}]))"),
            ("failed", f"sum(rate(kvcensus_stream_replay_failures_total{{{STREAM}}}[{RATE}]))"),
        ),
    ),
    Panel(
        "Bytes received",
        "By stream.",
        "Bps",
        (("{{stream}}", rate("kvcensus_stream_received_bytes_total", STREAM, "stream")),),
    ),
)
BACKEND = (
    Panel(
        "Records by tier",
        "What the index holds.",
        "short",
        (("{{tier}}", f"sum by (tier) (kvcensus_backend_tier_records{{{DAEMON}}})"),),
        stacked=True,
    ),
    Panel(
        "Commit time",
        "To apply and commit a transaction. KvcensusCommitSlow",
        "s",
        (
            ("p50", quantile(0.5, "kvcensus_backend_commit_seconds", DAEMON, "job")),
            ("p99", quantile(0.99, "kvcensus_backend_commit_seconds", DAEMON, "job")),
        ),
    ),
    Panel(
        "Commits",
        "Transactions, and those that failed. KvcensusBackendCannotWrite",
        "ops",
        (
            ("commits", f"sum(rate(kvcensus_backend_commits_total{{{DAEMON}}}[{RATE}]))"),
            ("failed", f"sum(rate(kvcensus_backend_commit_errors_total{{{DAEMON}}}[{RATE}]))"),
        ),
    ),
    Panel(
        "Disk",
        "What the index occupies, and what of it is in use. KvcensusMapNearlyFull",
        "bytes",
        (
            ("occupied {{instance}}", f"kvcensus_backend_file_bytes{{{DAEMON}}}"),
            ("in use {{instance}}", f"kvcensus_backend_live_bytes{{{DAEMON}}}"),
        ),
    ),
    Panel(
        "Map used",
        "Of what an LMDB file may grow to. KvcensusMapNearlyFull",
        "percentunit",
        (
            (
                "{{instance}}",
                f"kvcensus_backend_live_bytes{{{DAEMON}}} / (kvcensus_backend_limit_bytes{{{DAEMON}}} > 0)",
            ),
        ),
        most=1,
    ),
    Panel(
        "Oldest reader",
        "Transactions since the oldest state that somebody reads. KvcensusReaderPinsIndex",
        "none",
        (("{{instance}}", f"kvcensus_backend_oldest_reader_lag_transactions{{{DAEMON}}}"),),
    ),
    Panel(
        "Queue",
        "Messages that wait for the writer. KvcensusQueueFull",
        "short",
        (("{{instance}}", f"kvcensus_queue_messages{{{DAEMON}}}"),),
    ),
    Panel("Memory", "Of the process.", "bytes", (("{{instance}}", f"process_resident_memory_bytes{{{DAEMON}}}"),)),
    Panel(
        "CPU",
        "Cores that the process takes.",
        "none",
        (("{{instance}}", f"rate(process_cpu_seconds_total{{{DAEMON}}}[{RATE}])"),),
    ),
)
BUSES = (
    Panel(
        "Bus messages",
        "Received over NATS, by bus; 0 without one. KvcensusBusFailing",
        "mps",
        (("{{bus}}", f"{rate('kvcensus_bus_messages_total', DAEMON, 'bus')} or on() vector(0)"),),
    ),
    Panel(
        "Messages that wait in JetStream",
        "What the stream still has for us; with core NATS, what waits in the client.",
        "short",
        (("{{bus}}", f"sum by (bus) (kvcensus_bus_pending_messages{{{DAEMON}}}) or on() vector(0)"),),
    ),
    Panel(
        "Workers of buses",
        "That the bus has brought. KvcensusBusRefusesWorkers",
        "none",
        (("{{bus}}", f"sum by (bus) (kvcensus_bus_workers{{{DAEMON}}}) or on() vector(0)"),),
    ),
    Panel(
        "Relays: spool used",
        "Of what it may take before messages are dropped. KvcensusRelaySpoolFilling",
        "percentunit",
        (("{{instance}}", "(kvcensus_relay_spool_bytes / kvcensus_relay_spool_limit_bytes) or on() vector(0)"),),
        most=1,
    ),
    Panel(
        "Relays: time to the acknowledgement",
        "From the spool to the bus, p99; 0 without a relay.",
        "s",
        (
            (
                "{{instance}}",
                f"{quantile(0.99, 'kvcensus_relay_publish_delay_seconds', '', 'instance')} or on() vector(0)",
            ),
        ),
    ),
    Panel(
        "Relays: dropped",
        "Messages that were never published, in the last hour. KvcensusRelayDropping",
        "none",
        (
            (
                "{{stream}}",
                "sum by (stream) (increase(kvcensus_relay_stream_dropped_messages_total[1h])) or on() vector(0)",
            ),
        ),
    ),
)
ROWS = (
    Row("Overview", OVERVIEW),
    Row("Workers", WORKERS),
    Row("Streams and replay", STREAMS),
    Row("Backend", BACKEND),
    Row("Buses and relays", BUSES),
)  # fmt: skip


def panel_json(panel: Panel, number: int, x: int, y: int, height: int) -> dict[str, Any]:
    """A panel as Grafana keeps it."""
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "mappings": list(panel.mappings),
        "thresholds": {"mode": "absolute", "steps": steps},
        "min": 0,
        "color": {"mode": "thresholds" if panel.kind != "timeseries" else "palette-classic-by-name"},
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 30 if panel.stacked else 8, "lineWidth": 1, "stacking": stacking}
        options = {
            "legend": legend,
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value"}
    else:
        options = {"showValue": "never", "rowHeight": 0.9, "legend": legend}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend or "__auto", "datasource": DATASOURCE}
            for at, (legend, query) in enumerate(panel.queries)
        ],
        "links": [
            {"title": word, "url": f"${{runbooks}}{word}.html", "targetBlank": True}
            for word in panel.description.split()
            if word.startswith("Kvcensus")
        ],
    }


def panels() -> list[dict[str, Any]]:
    """Every panel, from left to right and down."""
    made: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": row.title, "gridPos": place, "collapsed": False, "panels": []}
        )
        y += 1
        x, height = 0, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            height = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
            made.append(panel_json(panel, len(made) + 1, x, y, height))
            x += panel.width
        y += height
    return made


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """One that offers the values of a label, all of them at first."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 7,
    }


def dashboard() -> dict[str, Any]:
    """The whole of it."""
    return {
        "uid": "kvcensus",
        "title": "kvcensus",
        "description": "Which inference worker holds which KV-cache block on which tier.",
        "tags": ["kvcensus", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("instance", "Daemon", "label_values(kvcensus_ready, instance)"),
                {
                    "name": "runbooks",
                    "label": "Runbooks",
                    "type": "textbox",
                    "query": RUNBOOKS,
                    "current": {"value": RUNBOOKS},
                },
                variable("stream", "Stream", 'label_values(kvcensus_stream_epoch{instance=~"$instance"}, stream)'),
            ]
        },
        "panels": panels(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
