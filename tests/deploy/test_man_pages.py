"""A release has a man page for each command, the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcensus.daemon.cli import COMMANDS

SCRIPT = Path(__file__).parents[2] / "deploy" / "man_pages.py"


def written(directory: Path) -> dict[str, str]:
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1790000000"}
    subprocess.run([sys.executable, str(SCRIPT), str(directory)], check=True, env=environment, timeout=60)
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_every_command_has_a_page_and_the_same_one_twice(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="click-man is not installed")
    pages = written(tmp_path / "first")
    assert {f"kvcensus-{name}.1" for name in COMMANDS} | {"kvcensus.1", "kvcensus-backend-copy.1"} <= pages.keys()
    assert r"\-\-replay\-endpoint" in pages["kvcensus-run.1"]
    assert pages["kvcensus.1"].startswith('.TH "KVCENSUS" "1" "2026-09-21"')
    assert not [name for name, text in pages.items() if text.partition(".SH SYNOPSIS")[0].rstrip().endswith("...")]
    assert written(tmp_path / "second") == pages
