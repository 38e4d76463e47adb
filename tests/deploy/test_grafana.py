"""The dashboard: sound, and every query of every panel has data while a daemon and a relay are under load."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..prometheus_server import needs_prometheus
from .grafana_stage import DASHBOARD, board, data_panels, series, stage

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"


def test_the_dashboard_is_what_its_source_makes() -> None:
    made = subprocess.run(
        [sys.executable, DASHBOARD.with_name("dashboard.py")], capture_output=True, text=True, check=True, timeout=60
    )
    assert made.stdout == DASHBOARD.read_text()


def test_every_panel_says_what_it_shows_of_the_chosen_data_source() -> None:
    for panel in data_panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {one["uid"] for one in sources} == {"${datasource}"}


def test_panels_have_ids_of_their_own_and_places_of_their_own() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_every_link_is_to_a_runbook() -> None:
    links = [link for panel in data_panels() for link in panel["links"]]
    assert links
    for link in links:
        assert (RUNBOOKS / f"{link['title']}.md").exists(), link["title"]


@needs_prometheus
def test_no_panel_is_empty_under_load(tmp_path: Path) -> None:
    with stage(tmp_path) as prometheus:
        empty = [
            f"{panel['title']}: {target['expr']}"
            for panel in data_panels()
            for target in panel["targets"]
            if not finite(series(prometheus, target["expr"]))
        ]
    assert empty == []


def finite(found: list[dict[str, Any]]) -> bool:
    """Whether there is a number at all, and no series is without one."""
    return bool(found) and any(math.isfinite(float(one["value"][1])) for one in found)


def test_a_query_without_data_would_be_noticed() -> None:
    assert not finite([])
    assert not finite([{"value": [0, "NaN"]}])
