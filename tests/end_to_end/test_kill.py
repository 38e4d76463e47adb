"""kill -9 at any moment: after the next start the index is the engine's own, and nothing was applied twice.

KVCENSUS_KILL_RUNS=500 makes it a longer drill.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from kvcensus.backends.model import RemoveBlocks, StoreRun
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..captures_reader import CAPTURES, Stage, load_capture
from .daemon_process import DaemonProcess, wait_until

RUNS = int(os.environ.get("KVCENSUS_KILL_RUNS", "50"))
NAMES = ["vllm-0.32.0-evict", "vllm-0.9.2-evict", "vllm-0.32.0-swa", "vllm-0.12.0-restart", "vllm-0.32.0-cbor-bytes"]
PACE_S = 0.002


def blocks_on_the_wire(stage: Stage) -> tuple[int, int]:
    """Blocks stored and removed by all messages of a stage."""
    translator = VllmTranslator(TranslatorOptions("w"))
    stored = removed = 0
    for message in stage.messages:
        for operation in translator.translate(message.payload, 0).operations:
            if isinstance(operation, StoreRun):
                stored += len(operation.block_hashes)
            elif isinstance(operation, RemoveBlocks):
                removed += len(operation.block_hashes)
    return stored, removed


def play(engine: ReplayedEngine, messages: int) -> None:
    for _ in range(messages):
        engine.publish()
        time.sleep(PACE_S)


@pytest.mark.parametrize("run", range(RUNS))
def test_a_killed_daemon_neither_loses_nor_invents_nor_repeats(tmp_path: Path, run: int) -> None:
    name = NAMES[run % len(NAMES)]
    generator = random.Random(run)
    capture = load_capture(name)
    last = capture.stages[-1]
    with ReplayedEngine(Recording(CAPTURES / f"{name}.jsonl.gz")) as engine:
        arguments = ("--engine", engine.endpoint, "--replay-endpoint", engine.replay_endpoint, "--worker", "w")
        with DaemonProcess(tmp_path, *arguments) as daemon:
            player = threading.Thread(target=play, args=(engine, len(capture.messages)))
            player.start()
            time.sleep(generator.uniform(0, len(capture.messages) * PACE_S * 1.3))
            daemon.kill()
            if generator.random() < 0.5:
                player.join()
            daemon.start()
            player.join()
            wait_until(lambda: daemon.stream()["last_seq"] == last.messages[-1].seq, "the last message is committed")
            wait_until(lambda: daemon.stream()["state"] == "live", "the replay has ended")
            stream = daemon.stream()
            assert daemon.copies()[stream["worker_id"]] == last.copies
            assert stream["trust"] == "fresh"
            assert stream["messages"] == len(last.messages)
            assert (stream["blocks_stored"], stream["blocks_removed"]) == blocks_on_the_wire(last)
