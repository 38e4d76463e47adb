"""Every alert of deploy/prometheus, caused on real daemons under a real Prometheus, and mended.

    .venv/bin/python -m tests.drills.alerts
    .venv/bin/python -m tests.drills.alerts --alerts KvcensusDown,KvcensusBusFailing --jobs 1

In each drill the alert is not there at first, goes through pending where it has a `for`, fires once its cause is there,
the commands of its runbook page are run while it does, and it clears after the mending. Durations of the rules are
divided by 15; see tests/prometheus_server.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec

from ..prometheus_server import FACTOR, MISSING
from .alert_causes import CAUSES, Cause
from .alert_stage import Scene, wait_for

QUIET_S = 3.0
"""How long an alert must not be there before its cause."""


class Drilled(msgspec.Struct):
    """One alert: seconds from its cause to pending (None: it has no `for`) and to firing, from mending to neither."""

    alert: str
    cause: str
    pending_s: float | None
    firing_s: float
    cleared_s: float
    commands: int
    others: list[str]


def drill(cause: Cause, directory: Path, *, commands: bool = True) -> list[Drilled]:
    """Raises AssertionError when an alert is there too early, does not fire or does not clear."""
    with ExitStack() as stack:
        scene = Scene(directory, stack)
        steps = cause.steps(scene)
        next(steps)
        _stays_away(scene, cause.alerts)
        began = time.monotonic()
        next(steps)
        seen = _until_firing(scene, cause.alerts, began)
        ran = {alert: scene.run_commands(alert) if commands else 0 for alert in cause.alerts}
        others = sorted(name for name, state in scene.prometheus.alerts().items() if state == "firing")
        next(steps)
        mended = time.monotonic()
        found = []
        for alert in cause.alerts:
            wait_for(lambda alert=alert: alert not in scene.prometheus.alerts(), f"{alert} clears")  # type: ignore[misc]
            pending, firing = seen[alert]
            cleared = round(time.monotonic() - mended, 1)
            rest = [one for one in others if one not in cause.alerts]
            found.append(Drilled(alert, cause.what, pending, firing, cleared, ran[alert], rest))
        assert not scene.prometheus.problems(), scene.prometheus.problems()
        for _ in steps:
            pass
        return found


def _stays_away(scene: Scene, alerts: Sequence[str]) -> None:
    wait_for(lambda: not set(alerts) & scene.prometheus.alerts().keys(), f"{alerts} are not there")
    ends = time.monotonic() + QUIET_S
    while time.monotonic() < ends:
        assert not set(alerts) & scene.prometheus.alerts().keys(), f"{alerts}: there before the cause"
        time.sleep(0.25)


def _until_firing(scene: Scene, alerts: Sequence[str], began: float) -> dict[str, tuple[float | None, float]]:
    pending: dict[str, float] = {}
    firing: dict[str, float] = {}

    def all_fire() -> bool:
        seconds = round(time.monotonic() - began, 1)
        for name, state in scene.prometheus.alerts().items():
            (firing if state == "firing" else pending).setdefault(name, seconds)
        return firing.keys() >= set(alerts)

    wait_for(all_fire, f"{alerts} fire")
    return {name: (pending.get(name), firing[name]) for name in alerts}


def _run(causes: Sequence[Cause], directory: Path, jobs: int) -> Iterator[tuple[Cause, list[Drilled] | str]]:
    with ThreadPoolExecutor(jobs) as pool:
        running = [(cause, pool.submit(drill, cause, directory / cause.alerts[0])) for cause in causes]
        for cause, future in running:
            try:
                yield cause, future.result()
            except Exception as error:  # noqa: BLE001 - the others go on
                yield cause, f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when an alert did not do what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alerts", default="", help="NAME,… (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="drills at a time")
    parser.add_argument("--keep", type=Path, help="directory for configurations, data and logs")
    options = parser.parse_args(arguments)
    if MISSING:
        sys.exit(MISSING)
    wanted = set(filter(None, options.alerts.split(",")))
    causes = [cause for cause in CAUSES if not wanted or wanted & set(cause.alerts)]
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for cause, outcome in _run(causes, options.keep or Path(temporary), options.jobs):
            if isinstance(outcome, str):
                failed += 1
                print(f"{'+'.join(cause.alerts)}: FAILED: {outcome}", file=sys.stderr, flush=True)
            else:
                for one in outcome:
                    print(json.dumps(msgspec.to_builtins(one)), flush=True)
    print(f"{len(causes) - failed} of {len(causes)} causes, durations divided by {FACTOR}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
