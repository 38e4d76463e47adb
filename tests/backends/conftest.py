"""A fresh backend of each kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.memory import MemoryBackend


@pytest.fixture(params=["memory", "lmdb"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexBackend]:
    opened: IndexBackend = MemoryBackend() if request.param == "memory" else LmdbBackend(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture
def lmdb_backend(tmp_path: Path) -> Iterator[LmdbBackend]:
    backend = LmdbBackend(tmp_path / "data")
    yield backend
    backend.close()
