"""The systemd units: sound, hardened, alike. tests/drills/systemd.py runs them under a real systemd."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvcensus.daemon.cli.run import run
from kvcensus.daemon.config import Config
from kvcensus.daemon.config.errors import EXIT_CONFIG

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("kvcensus.service", "kvcensus@.service", "kvcensus-relay.service")
EXPOSURE_MAX = 1.5
NOT_INSTALLED = "/opt/kvcensus/bin/kvcensus is not executable: No such file or directory"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def settings(name: str) -> list[tuple[str, str]]:
    lines = (UNITS / name).read_text().splitlines()
    return [(key, value) for key, equals, value in (line.partition("=") for line in lines) if equals and key[0] != "#"]


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong_with_a_unit(name: str) -> None:
    found = analyze("verify", "--man=no", UNITS / name).stderr.splitlines()
    # The one for newer systemd is not known to this one, which is why it is a drop-in.
    ours = [line for line in found if NOT_INSTALLED not in line and "notify-reload" not in line]
    assert ours == []


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_is_hardened(name: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:.0f}", UNITS / name)
    assert done.returncode == 0, done.stdout


@needs_systemd
def test_a_unit_without_its_hardening_would_be_noticed(tmp_path: Path) -> None:
    kept = [line for line in (UNITS / NAMES[0]).read_text().splitlines() if not line.startswith("SystemCall")]
    (tmp_path / NAMES[0]).write_text("\n".join(kept))
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:.0f}", tmp_path / NAMES[0])
    assert done.returncode != 0


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_unit_has_the_same_limits(name: str) -> None:
    own = {"Description", "ExecStart", "TimeoutStartSec", "StateDirectory", "RuntimeDirectory"}
    plain, other = ([one for one in settings(unit) if one[0] not in own] for unit in (NAMES[0], name))
    assert plain == other


def test_a_unit_knows_what_the_program_does() -> None:
    unit = dict(settings(NAMES[0]))
    options = {option for parameter in run.params for option in parameter.opts}
    assert {word for word in unit["ExecStart"].split() if word.startswith("--")} <= options
    assert float(unit["TimeoutStopSec"].removesuffix("s")) * 1000 > Config().writer.drain_deadline_ms
    assert str(EXIT_CONFIG) in unit["RestartPreventExitStatus"].split()
