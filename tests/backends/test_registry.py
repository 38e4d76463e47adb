"""Which backends there are, and what is said of one that cannot be opened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.backends import registry
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.registry import BackendMissing, backend_names, open_backend, usable_backends, why_unusable

TOY = """
from kvcensus.backends.memory import MemoryBackend


class ToyBackend(MemoryBackend):
    def name(self):
        return "toy"


def open_toy(directory, options):
    backend = ToyBackend()
    backend.opened_with = (directory, dict(options))
    return backend
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package outside this tree that registers a backend, as an installer leaves it."""
    (tmp_path / "toy_backend.py").write_text(TOY)
    info = tmp_path / "toy_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvcensus.backends]\ntoy = toy_backend:open_toy\nlmdb = toy_backend:open_toy\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._outside.cache_clear()
    yield
    registry._outside.cache_clear()
    sys.modules.pop("toy_backend", None)


def test_memory_and_lmdb_are_always_there(tmp_path: Path) -> None:
    assert {"memory", "lmdb"} <= set(usable_backends())
    for name in ("memory", "lmdb"):
        backend = open_backend(name, tmp_path / name)
        assert backend.name() == name
        backend.close()


def test_lmdb_takes_its_options_in_plain_values(tmp_path: Path) -> None:
    backend = open_backend("lmdb", tmp_path, {"durability": "full", "map_size": 1 << 24})
    assert backend.health().limit_bytes == 1 << 24
    backend.close()


def test_an_unknown_backend_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(BackendMissing, match=r"^there is no backend disk; there are .*lmdb, memory"):
        open_backend("disk", tmp_path)


def test_holt_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_outside", dict)
    assert "holt" in backend_names()
    assert "holt" not in usable_backends()
    with pytest.raises(BackendMissing, match="pip install kvcensus-holt"):
        open_backend("holt", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("rocksdb", "rocksdict"), ("valkey", "valkey")])
def test_a_backend_without_its_library_says_what_to_install(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert why_unusable(name) == f"the backend {name} needs {module}: pip install 'kvcensus[{name}]'"


@pytest.mark.usefixtures("toy")
def test_a_package_outside_this_tree_registers_a_backend(tmp_path: Path) -> None:
    assert "toy" in usable_backends()
    backend = open_backend("toy", tmp_path, {"speed": 3})
    assert backend.name() == "toy"
    assert isinstance(backend, MemoryBackend)
    assert vars(backend)["opened_with"] == (tmp_path, {"speed": 3})


@pytest.mark.usefixtures("toy")
def test_nobody_takes_the_name_of_a_backend_of_ours(tmp_path: Path) -> None:
    backend = open_backend("lmdb", tmp_path / "index")
    assert backend.name() == "lmdb"
    backend.close()
