"""From the start of the daemon to ready and to caught up, against the size of the index: it must not grow with it.

    python tests/benchmarks/restart.py [--blocks 100000,1000000] [--no-verify] [--work-dir DIR]

Fills an index (chains of 64 random 8-byte hashes, four workers), ends without closing it as kill -9 does, and starts
`kvcensus run` several times beside an engine that has published 1,000 messages of 64 blocks meanwhile; also how long
the long look of `kvcensus verify` takes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.backends.model import ROOT, CacheTier, Cursor, IdentityScope, StoreRun
from kvcensus.daemon.bench.frames import make_workload
from kvcensus.daemon.bench.processes import free_port, get, rss_mb
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.streams.verdicts import fingerprint

_CHAIN = 64
_BATCH = 512
_STARTS = 5
_APPLIED = 10
_MISSED = 1_000
"""The number of the last message that the index has, and how many came after it."""


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
        backend.apply(runs)
    print_of_last = fingerprint(messages()[0].payload)
    backend.apply([], [Cursor("w", 1, _APPLIED, print_of_last, source="w", worker_id="w/0", rank=0)])
    os._exit(0)


@cache
def messages() -> list[RecordedMessage]:
    """What the engine's ring holds: the last message that was applied, and those after it."""
    payloads = make_workload((_MISSED + 1) * _CHAIN, _CHAIN).messages
    return [
        RecordedMessage(0, (b"", (_APPLIED + number).to_bytes(8, "big"), payload))
        for number, payload in enumerate(payloads)
    ]


def start(directory: Path, engine: ReplayedEngine) -> tuple[float, float, float, float]:
    """Seconds to /readyz 200, and to all that was missed committed; own and mapped memory in MB then.

    The directory is left as it was: the daemon works on a copy, and is killed with -9.
    """
    port = free_port()
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "run", "--engine", engine.endpoint, "--worker", "w"]
    command += ["--replay-endpoint", engine.replay_endpoint]
    command += ["--data-dir", str(directory), "--http", f"127.0.0.1:{port}"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready(port):
        assert process.poll() is None, process.returncode
        time.sleep(0.005)
    took = time.perf_counter() - begin
    while not caught_up(port):
        time.sleep(0.005)
    caught = time.perf_counter() - begin
    own, mapped = rss_mb(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return took, caught, own, mapped


def caught_up(port: int) -> bool:
    (stream,) = json.loads(get(port, "/v1/streams"))["streams"]
    assert stream["epoch"] == 1, stream
    return stream["state"] == "live" and stream["last_seq"] == _APPLIED + _MISSED


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
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--work-dir", type=Path)
    arguments = parser.parse_args()
    messages()
    for blocks in map(int, arguments.blocks.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as directory:
            begin = time.perf_counter()
            fill(Path(directory, "index"), blocks)
            filled = time.perf_counter() - begin
            starts = []
            with ReplayedEngine(messages()) as engine:
                engine.publish_rest()
                for number in range(_STARTS):
                    copy = Path(directory, f"start-{number}")
                    shutil.copytree(Path(directory, "index"), copy)
                    starts.append(start(copy, engine))
                    if number + 1 < _STARTS:
                        shutil.rmtree(copy)
            begin = time.perf_counter()
            if not arguments.no_verify:
                verify = [sys.executable, "-m", "kvcensus.daemon.cli", "verify", "--data-dir", str(copy)]
                subprocess.run(verify, check=True, stderr=subprocess.DEVNULL)
            figures = {
                "blocks": blocks,
                "fill_s": round(filled, 1),
                "file_mb": Path(directory, "index", INDEX_FILE).stat().st_blocks * 512 // 1_000_000,
                "ready_s_median": round(statistics.median(took for took, _, _, _ in starts), 3),
                "ready_s_max": round(max(took for took, _, _, _ in starts), 3),
                "caught_up_s_median": round(statistics.median(caught for _, caught, _, _ in starts), 3),
                "caught_up_s_max": round(max(caught for _, caught, _, _ in starts), 3),
                "own_mb": round(starts[-1][2]),
                "mapped_mb": round(starts[-1][3]),
                "verify_s": round(time.perf_counter() - begin, 1),
            }
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
