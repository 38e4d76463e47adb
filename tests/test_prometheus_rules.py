"""The rules of deploy/prometheus do what their unit tests say; every alert has its page, tests and drill."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .drills.alert_causes import CAUSES
from .drills.alert_stage import RUNBOOKS, commands_of
from .prometheus_server import RULES, scaled

ROOT = Path(__file__).parents[1]
DEPLOY = RULES.parent
ALERTS = (RULES / "alerts.yml").read_text()
RECORDING = (RULES / "recording.yml").read_text()
NAMES = re.findall(r"^ *- alert: (\w+)$", ALERTS, re.MULTILINE)
RECORDED = set(re.findall(r"^ *- record: (\S+)$", RECORDING, re.MULTILINE))
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def _promtool(*words: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def _body(alert: str) -> str:
    """The lines of one alert."""
    after = ALERTS.partition(f"- alert: {alert}\n")[2]
    return re.split(r"^ *- (?:alert|name): ", after, maxsplit=1, flags=re.MULTILINE)[0]


def _uncommented(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


@needs_promtool
def test_rules_and_the_example_are_well_formed() -> None:
    _promtool("check", "rules", *RULES.glob("*.yml"))
    _promtool("check", "config", DEPLOY / "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("path", sorted((DEPLOY / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_rules_do_what_their_unit_tests_say(path: Path) -> None:
    _promtool("test", "rules", path)


def test_every_alert_is_tested_firing_and_quiet_and_has_a_drill() -> None:
    tests = "\n".join(path.read_text() for path in (DEPLOY / "tests").glob("*.yml"))
    checks = re.findall(r"alertname: (\w+)\n *exp_alerts:(.*)", tests)
    assert {name for name, expected in checks if not expected.strip()} == set(NAMES)
    assert {name for name, expected in checks if expected.strip() == "[]"} == set(NAMES)
    assert Counter(alert for cause in CAUSES for alert in cause.alerts) == Counter(NAMES)


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("alert", NAMES)
def test_an_alert_says_what_where_and_how_bad(alert: str) -> None:
    body = _body(alert)
    severity = re.findall(r"^ *labels: \{severity: (critical|warning|info)\}$", body, re.MULTILINE)
    assert len(severity) == 1
    for annotation in ("summary", "description"):
        assert len(re.findall(rf"^ *{annotation}: \S", body, re.MULTILINE)) == 1
    assert f"runbook: docs/runbooks/{alert}.md\n" in body
    page = (RUNBOOKS / f"{alert}.md").read_text()
    assert page.startswith(f"# {alert}\n\n*{severity[0]}.* ")


@pytest.mark.parametrize("alert", NAMES)
def test_a_page_has_commands_and_says_how_it_was_drilled(alert: str) -> None:
    (what,) = [cause.what for cause in CAUSES if alert in cause.alerts]
    assert commands_of(alert)
    assert f"## Drill\n\n{what}.\n" in (RUNBOOKS / f"{alert}.md").read_text()


def test_links_of_the_pages_lead_somewhere() -> None:
    for path in RUNBOOKS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_metric_of_the_rules_is_in_the_reference() -> None:
    reference = "".join((ROOT / "docs" / "reference" / name).read_text() for name in ("metrics.md", "relay.md"))
    known = set(re.findall(r"^\| `(\w+)` \|", reference, re.MULTILINE))
    text = re.sub(r"^ *- record: .*$", "", _uncommented(ALERTS + RECORDING), flags=re.MULTILINE)
    text = re.sub(r"\b(summary|description|runbook): .*", "", text)
    used = set(re.findall(r"(?<![:\w])kvcensus_[a-z_]+(?!:)\b", text))
    assert used
    assert {re.sub(r"_bucket$", "", name) for name in used} <= known
    assert set(re.findall(r"\b[a-z_]+:kvcensus[a-z_]*:\w+", text)) <= RECORDED


def test_faster_time_changes_durations_and_nothing_else() -> None:
    faster = scaled(ALERTS, 15)
    assert faster.count("for: 8000ms") == ALERTS.count("for: 2m")
    assert "[2m]" not in faster
    assert re.sub(r"\d+(ms|s|m)\b", "T", faster) == re.sub(r"\d+(ms|s|m)\b", "T", ALERTS)
    assert scaled(RECORDING, 1).replace("[120000ms]", "[2m]") == RECORDING


def test_the_table_of_the_guide_is_that_of_the_rules() -> None:
    guide = (ROOT / "docs" / "how-to" / "monitoring.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./runbooks/\1\.md\) \| (\w+) \| (\w*) \|", guide, re.MULTILINE)
    expected = []
    for alert in NAMES:
        (severity,) = re.findall(r"severity: (\w+)", _body(alert))
        expected.append((alert, severity, "".join(re.findall(r"^ *for: (\w+)$", _body(alert), re.MULTILINE))))
    assert rows == expected
