"""A fresh backend of each kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.registry import open_backend, why_unusable
from tests.valkey_servers import MISSING, ValkeyServer, running_server


@pytest.fixture(params=["memory", "lmdb", "filesystem", "rocksdb", "valkey"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexBackend]:
    if problem := why_unusable(request.param):
        pytest.skip(problem)
    options = {"servers": [request.getfixturevalue("valkey_server").address]} if request.param == "valkey" else {}
    opened = open_backend(request.param, tmp_path / "data", options)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def running_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    if MISSING:
        pytest.skip(MISSING)
    with running_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey_server(running_valkey: ValkeyServer) -> ValkeyServer:
    """An empty server."""
    running_valkey.cli("FLUSHALL")
    return running_valkey


@pytest.fixture
def lmdb_backend(tmp_path: Path) -> Iterator[LmdbBackend]:
    backend = LmdbBackend(tmp_path / "data")
    yield backend
    backend.close()
