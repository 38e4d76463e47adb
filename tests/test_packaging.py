"""What a wheel holds is what the folders hold."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("backends", "translators", "daemon")
OF_ITS_OWN = ROOT / "backends" / "holt"  # another distribution, kvcensus-holt


def test_every_folder_of_code_is_a_package_of_the_distribution() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if OF_ITS_OWN not in path.parents]
    folders = {path.parent.relative_to(ROOT) for path in files}
    assert set(setuptools["packages"]) == {".".join(("kvcensus", *folder.parts)) for folder in folders}


def test_each_room_says_that_it_is_typed() -> None:
    for room in ROOMS:
        assert (ROOT / room / "py.typed").exists()


def test_every_file_of_the_status_page_is_in_the_wheel() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path.name for path in (ROOT / "daemon/http/page").iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) > 2
    for name in files:
        assert any(fnmatch(name, pattern) for pattern in patterns["kvcensus.daemon.http.page"]), name
