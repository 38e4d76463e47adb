"""The drills of a bus, shortly. tests/drills/bus_kills.py and bus_outage.py are the same for as long as one likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..drills import bus_kills, bus_outage


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a drill printed, once it has ended well."""

    def read(code: int) -> dict[str, Any]:
        out, complaints = capsys.readouterr()
        assert code == 0, complaints
        found: dict[str, Any] = json.loads(out)
        return found

    return read


def test_kills_of_everything_lose_nothing_and_double_nothing(tmp_path: Path, said: Any) -> None:
    words = ["--kills", "6", "--workers", "4", "--blocks", "30000", "--every", "1.5", "--down", "1"]
    report = said(bus_kills.main([*words, "--keep", str(tmp_path)]))
    assert sum(report["kills"].values()) == 6
    assert report["blocks_stored"] >= 30_000


def test_an_outage_beyond_the_bound_fences_exactly_the_workers_that_lost_something(tmp_path: Path, said: Any) -> None:
    """The other relay has the default bound: it drops nothing."""
    words = ["--seconds", "3", "--rate", "2500", "--workers", "8", "--bound", "262144"]
    report = said(bus_outage.main([*words, "--keep", str(tmp_path)]))
    assert report["spool_records_at_most"] > 300
    assert (report["equal"], len(report["untrusted"])) == (5, 3)
