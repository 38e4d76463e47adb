"""From the start of the daemon to ready, against the size of the index: it must not grow with it.

    python tests/benchmarks/restart.py [--blocks 100000,1000000] [--work-dir DIR]

Fills an index (chains of 64 random 8-byte hashes, four workers), ends without closing it as kill -9 does, and starts
`kvcensus run` several times; also how long the long look of `kvcensus verify` takes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.backends.model import ROOT, CacheTier, Cursor, IdentityScope, StoreRun
from kvcensus.daemon.bench.processes import free_port, rss_mb

_CHAIN = 64
_BATCH = 512
_STARTS = 5


def fill(directory: Path, blocks: int) -> None:
    """Fill an index in a process that ends without closing it."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    scope = IdentityScope("m", "m")
    random_bytes = random.Random(1).randbytes
    backend = LmdbBackend(directory)
    for first in range(0, blocks // _CHAIN, _BATCH):
        runs = [
            StoreRun(f"w/{at % 4}", at % 4, scope, CacheTier.HBM, tuple(random_bytes(8) for _ in range(_CHAIN)), ROOT)
            for at in range(first, min(first + _BATCH, blocks // _CHAIN))
        ]
        backend.apply(runs, [Cursor("w", 1, first, worker_id="w", source="w")])
    os._exit(0)


def start(directory: Path) -> tuple[float, float, float]:
    """Seconds to /readyz 200; own and mapped memory in MB then. The daemon is killed with -9."""
    port = free_port()
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "run", "--engine", "tcp://127.0.0.1:9", "--worker", "w"]
    command += ["--data-dir", str(directory), "--http", f"127.0.0.1:{port}"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready(port):
        assert process.poll() is None, process.returncode
        time.sleep(0.005)
    took = time.perf_counter() - begin
    own, mapped = rss_mb(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return took, own, mapped


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", default="100000,1000000")
    parser.add_argument("--work-dir", type=Path)
    arguments = parser.parse_args()
    for blocks in map(int, arguments.blocks.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as directory:
            begin = time.perf_counter()
            fill(Path(directory), blocks)
            filled = time.perf_counter() - begin
            starts = [start(Path(directory)) for _ in range(_STARTS)]
            begin = time.perf_counter()
            verify = [sys.executable, "-m", "kvcensus.daemon.cli", "verify", "--data-dir", directory]
            subprocess.run(verify, check=True, stderr=subprocess.DEVNULL)
            figures = {
                "blocks": blocks,
                "fill_s": round(filled, 1),
                "file_mb": (Path(directory) / INDEX_FILE).stat().st_blocks * 512 // 1_000_000,
                "ready_s_median": round(statistics.median(took for took, _, _ in starts), 3),
                "ready_s_max": round(max(took for took, _, _ in starts), 3),
                "own_mb": round(starts[-1][1]),
                "mapped_mb": round(starts[-1][2]),
                "verify_s": round(time.perf_counter() - begin, 1),
            }
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
