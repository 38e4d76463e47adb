"""Sdist and wheel of the same files have the same bytes, wherever, whenever and by whomever they are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("backends", "daemon", "translators", "pyproject.toml", "README.md", "LICENSE")
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "target", "dist", "build", "*.so")
COMMIT_S = 1_700_000_000

pytest.importorskip("build", reason="the extra `dev` is not installed")


def _tree(place: Path, *, mtime: int, mode: int) -> Path:
    """The sources as somebody else has them: other times, other permissions."""
    place.mkdir(parents=True)
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=NOT_SOURCE)
        else:
            shutil.copy(source, place)
    for path in place.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            os.utime(path, (mtime, mtime))
    return place


def _built(tree: Path, *, umask: int, seed: str) -> dict[str, str]:
    """The SHA-256 of each distribution of a tree."""
    out = tree.parent / "out"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(COMMIT_S), "PYTHON": sys.executable, "PYTHONHASHSEED": seed}
    built = subprocess.run(
        ["sh", str(ROOT / "deploy" / "distributions.sh"), str(tree), str(out), "--no-isolation"],
        env=environment,
        umask=umask,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.mark.skipif(
    int(version("setuptools").partition(".")[0]) < 77, reason="setuptools >= 77, which builds, is not installed"
)
def test_two_builds_are_equal_byte_for_byte(tmp_path: Path) -> None:
    first = _built(_tree(tmp_path / "a" / "tree", mtime=COMMIT_S, mode=0o644), umask=0o022, seed="1")
    other_place = tmp_path / "a longer one" / "kvcensus"
    second = _built(_tree(other_place, mtime=COMMIT_S + 86_400, mode=0o600), umask=0o077, seed="2")

    assert sorted(name.rpartition(".")[2] for name in first) == ["gz", "whl"]
    assert first == second
