"""A fresh backend of each kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.registry import open_backend
from tests.valkey_servers import why_untested, with_server


@pytest.fixture(params=["memory", "lmdb", "filesystem", "rocksdb", "valkey", "holt"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexBackend]:
    if problem := why_untested(request.param):
        pytest.skip(problem)
    opened = open_backend(request.param, tmp_path / "data", with_server(request.param, {}))
    yield opened
    opened.close()


@pytest.fixture
def lmdb_backend(tmp_path: Path) -> Iterator[LmdbBackend]:
    backend = LmdbBackend(tmp_path / "data")
    yield backend
    backend.close()
