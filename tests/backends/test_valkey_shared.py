"""One index that several daemons write and a router reads, on one server and in a cluster."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("valkey")

from kvcensus.backends.model import ROOT, Cursor
from kvcensus.backends.valkey.backend import open_valkey
from kvcensus.backends.valkey.forgetting import forget_index
from kvcensus.backends.valkey.shared import SharedReader
from tests.valkey_servers import needs_server, running_cluster, running_server

from .building import SCOPE, blocks, clear, store

pytestmark = needs_server

A, B, C = blocks(1, 2, 3)


@pytest.fixture(params=["server", "cluster"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param == "server":
        with running_server(tmp_path / "server") as server:
            yield {"servers": [server.address]}
    else:
        with running_cluster(tmp_path / "cluster") as nodes:
            yield {"servers": [node.address for node in nodes]}


def test_a_router_reads_what_all_daemons_write(options: dict[str, Any], tmp_path: Path) -> None:
    parts = ("east", "north", "west")
    daemons = {part: open_valkey(tmp_path / part, {**options, "part": part}) for part in parts}
    daemons["east"].apply([store(A, B, worker="e")], [Cursor("e", 1, 7)])
    daemons["west"].apply([store(A, B, C, worker="w")], [Cursor("w", 1, 8, trust="untrusted")])
    router = SharedReader(options)

    assert router.parts() == dict.fromkeys(parts, True)
    assert [(one.worker_id, one.blocks) for one in router.match(SCOPE, [A, B, C])] == [("w", 3), ("e", 2)]
    assert {one.worker_id for one in router.find(A)} == {"e", "w"}
    assert {one.worker_id for one in router.prefix_scan(SCOPE, ROOT)} == {"e", "w"}
    assert {(one.worker_id, one.blocks) for one in router.holdings()} == {("e", 2), ("w", 3)}
    assert {part: {name: one.trust for name, one in found.items()} for part, found in router.cursors().items()} == {
        "east": {"e": "fresh"},
        "north": {},
        "west": {"w": "untrusted"},
    }
    assert [one.worker_id for one in daemons["east"].find(A)] == ["e"]

    daemons["west"].apply([clear("w")])
    assert [(one.worker_id, one.blocks) for one in router.match(None, [A, B, C])] == [("e", 2)]
    router.close()
    for daemon in daemons.values():
        daemon.close()


def test_a_forgotten_part_leaves_nothing_and_the_other_parts_alone(options: dict[str, Any], tmp_path: Path) -> None:
    for part in ("east", "west"):
        daemon = open_valkey(tmp_path / part, {**options, "part": part})
        daemon.apply([store(A, B)], [Cursor("e", 1, 7)])
        daemon.close()
    forget_index({**options, "part": "west"})
    router = SharedReader(options)
    assert list(router.parts()) == ["east"]
    router.close()
    anew = open_valkey(tmp_path / "west", {**options, "part": "west"})
    assert (len(anew), anew.cursors()) == (0, {})
    anew.close()
    kept = open_valkey(tmp_path / "east", {**options, "part": "east"})
    assert len(kept) == 2
    kept.close()


def test_a_worker_of_two_parts_is_counted_once(options: dict[str, Any], tmp_path: Path) -> None:
    one = open_valkey(tmp_path / "one", {**options, "part": "one"})
    two = open_valkey(tmp_path / "two", {**options, "part": "two"})
    one.apply([store(A)])
    two.apply([store(A, B)])
    router = SharedReader(options)

    assert len(router.find(A)) == 1
    assert [match.blocks for match in router.match(None, [A, B])] == [1]
    assert [holding.blocks for holding in router.holdings()] == [1]
    router.close()
    one.close()
    two.close()


def test_a_part_that_nobody_keeps_is_not_read(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        options = {"servers": [server.address], "lease_ms": 200}
        daemon = open_valkey(tmp_path / "index", options)
        daemon.apply([store(A)])
        router = SharedReader(options)
        assert len(router.find(A)) == 1
        time.sleep(1.1)

        assert router.parts() == {"main": False}
        assert router.find(A) == []
        daemon.reclaim(1)
        time.sleep(1.0)
        daemon.reclaim(1)
        assert len(router.find(A)) == 1
        router.close()
        daemon.close()
