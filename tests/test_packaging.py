"""What a wheel holds is what the folders hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("backends", "translators", "daemon")


def test_every_folder_of_code_is_a_package_of_the_distribution() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert set(setuptools["packages"]) == {".".join(("kvcensus", *folder.parts)) for folder in folders}


def test_each_room_says_that_it_is_typed() -> None:
    for room in ROOMS:
        assert (ROOT / room / "py.typed").exists()
