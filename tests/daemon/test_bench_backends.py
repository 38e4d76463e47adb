"""`kvcensus bench backends`: every backend gets the same trace, and every figure comes out of a process of its own."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.bench.backends.plots import PlotsUnavailable, require_matplotlib
from kvcensus.daemon.bench.backends.trace_file import TraceReader
from kvcensus.daemon.bench.backends.traces import SIMULATED, make_trace
from tests.valkey_servers import ValkeyServer, needs_server

BENCH = [sys.executable, "-m", "kvcensus.daemon.cli", "bench"]
CAPTURE = Path(__file__).parents[1] / "captures" / "vllm-0.32.0-evict.jsonl.gz"
LATENCIES = [f"{one}_{p}_us" for one in ("locate", "prefix_scan", "match") for p in ("p50", "p99", "p999")]


@pytest.mark.parametrize("name", SIMULATED)
def test_a_trace_is_the_same_each_time_and_stores_what_it_says(name: str, tmp_path: Path) -> None:
    first = make_trace(name, 2_000, tmp_path / "a")
    make_trace(name, 2_000, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 2_000 <= first.blocks_stored < 2_200
    assert (first.blocks_removed > 500) == (name == "eviction")
    assert not first.rejections


def test_what_is_asked_and_removed_is_there(tmp_path: Path) -> None:
    reader = TraceReader(Path(make_trace("chat", 2_000, tmp_path / "trace").path))
    index = MemoryBackend()
    for batch in reader.batches():
        index.apply(batch)
    questions = reader.questions()
    assert len(questions.keys) > 100
    assert all(index.locate(key) for key in questions.keys)
    assert all(index.prefix_scan(scope, parent) for scope, parent in questions.parents)
    for chain in questions.chains:
        assert max(one.blocks for one in index.match(chain.scope, chain.block_hashes)) == len(chain.block_hashes)
    removed = [index.apply(batch) for batch in reader.batches()]
    assert sum(one.copies_removed for one in removed) > 100
    assert not sum(one.unknown_removals for one in removed)
    assert index.clear_worker(questions.worker_id) > 0


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One comparison of a simulated trace and a capture, with everything that it writes."""
    place = tmp_path_factory.mktemp("compared")
    command = [*BENCH, "backends", "--backends", "memory,lmdb", "--sizes", "2000", "--rounds", "2"]
    command += ["--traces", f"chat,capture:{CAPTURE}", "--json", str(place / "a.json"), "--work-dir", str(place)]
    command += ["--markdown", str(place / "a.md")]
    if _has_matplotlib():
        command += ["--plots", str(place / "plots")]
    subprocess.run(command, check=True, timeout=100)
    return place


def _has_matplotlib() -> bool:
    try:
        require_matplotlib()
    except PlotsUnavailable:
        return False
    return True


def test_the_figures_are_there_and_positive(compared: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((compared / "a.json").read_bytes())["results"]["rows"]
    assert [(row["backend"], row["trace"]) for row in rows] == [
        (name, trace) for trace in ("chat", CAPTURE.name) for name in ("memory", "lmdb")
    ]
    for row in rows:
        figures = row["figures"]
        assert not row["failure"]
        wanted = ["ingest", "removal", "clear_worker_ms", "rss_anon", *LATENCIES]
        if row["backend"] == "lmdb":
            wanted += ["reopen_ms", "stored_bytes", "disk_bytes"]
        for name in wanted:
            assert 0 < figures[name]["least"] <= figures[name]["median"] <= figures[name]["most"], (row, name)
        assert ("disk_bytes" in figures) == (row["backend"] == "lmdb")


def test_the_markdown_has_whole_tables(compared: Path) -> None:
    lines = (compared / "a.md").read_text().splitlines()
    tables = [at for at, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == 1 + 2 * 3
    for at in tables:
        columns = lines[at].count("|")
        assert lines[at - 1].count("|") == columns
        body = [line for line in lines[at + 1 : at + 3] if line.startswith("|")]
        assert len(body) == 2
        assert all(line.count("|") == columns for line in body)


@pytest.mark.skipif(not _has_matplotlib(), reason="matplotlib is not installed: pip install 'kvcensus[plots]'")
def test_the_plots_are_images(compared: Path) -> None:
    plots = sorted((compared / "plots").iterdir())
    assert {path.name.split("-")[0] for path in plots} == {"throughput", "latency", "space", "life"}
    for path in plots:
        if path.suffix == ".png":
            data = path.read_bytes()
            width, height = struct.unpack(">II", data[16:24])
            assert data.startswith(b"\x89PNG")
            assert width > 500
            assert height > 200
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(PlotsUnavailable, match=r"pip install 'kvcensus\[plots\]'"):
        require_matplotlib()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backends", "nothing"], "there is no backend nothing"),
        (["--backends", "valkey"], "valkey"),
        (["--traces", "capture:/nowhere"], "nor a recording"),
        (["--valkey", "somewhere"], "is not HOST:PORT"),
        (["--sizes", "ten"], "'ten'"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str) -> None:
    ended = subprocess.run([*BENCH, "backends", *arguments], capture_output=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.decode().split())


@needs_server
def test_nothing_is_left_on_a_server(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path / "server")
    try:
        command = [*BENCH, "backends", "--backends", "valkey", "--valkey", server.address, "--sizes", "2000"]
        command += ["--traces", "chat", "--rounds", "1", "--json", str(tmp_path / "a.json")]
        subprocess.run(command, check=True, timeout=60)
        figures = json.loads((tmp_path / "a.json").read_bytes())["results"]["rows"][0]["figures"]
        assert figures["ingest"]["median"] > 0
        assert "disk_bytes" not in figures
        with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            connection.sendall(b"DBSIZE\r\n")
            assert connection.recv(64) == b":0\r\n"
    finally:
        server.kill()


def test_bench_without_a_subcommand_is_the_measurement_of_before() -> None:
    ended = subprocess.run(
        [*BENCH, "--source", "nats", "--nats-server", "no-such-program"], capture_output=True, check=False, timeout=60
    )
    assert ended.returncode == 2
    assert b"no-such-program is not there" in ended.stderr
