"""Two of the alerts' drills. `python -m tests.drills.alerts` has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..drills.alert_causes import CAUSES
from ..drills.alerts import drill
from ..prometheus_server import needs_prometheus

pytestmark = [needs_prometheus, pytest.mark.timeout(600)]


@pytest.mark.parametrize("alert", ["KvcensusStreamSilent", "KvcensusBusFailing"])
def test_an_alert_fires_when_its_cause_is_there_and_clears_when_it_is_mended(alert: str, tmp_path: Path) -> None:
    (cause,) = [cause for cause in CAUSES if alert in cause.alerts]
    (drilled,) = drill(cause, tmp_path / "drill")
    assert drilled.pending_s is not None
    assert drilled.pending_s <= drilled.firing_s
    assert drilled.commands > 0
