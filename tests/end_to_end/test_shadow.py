"""A real daemon with a shadow: driven by a real stream, killed, and compared as a whole afterwards."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvcensus.backends.registry import why_unusable
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.recording import Recording

from ..captures_reader import CAPTURES, load_capture
from .daemon_process import DaemonProcess, wait_until

NAME = "vllm-0.32.0-evict"
KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]


def applied(daemon: DaemonProcess, published: int) -> None:
    wait_until(lambda: daemon.stream()["last_seq"] >= published - 1, "all is applied")


@pytest.mark.parametrize("backend", ["filesystem", "rocksdb"])
def test_after_kills_both_are_the_same_and_never_disagreed(backend: str, tmp_path: Path) -> None:
    if problem := why_unusable(backend):
        pytest.skip(problem)
    chance = random.Random(backend)
    messages = len(load_capture(NAME).messages)
    with ReplayedEngine(Recording(CAPTURES / f"{NAME}.jsonl.gz")) as engine:
        settings = tmp_path / "kvcensus.toml"
        settings.write_text(
            f'[[sources]]\nname = "w"\nendpoint = "{engine.endpoint}"\nreplay_endpoint = "{engine.replay_endpoint}"\n'
            f'[shadow]\nbackend = "{backend}"\ndata_dir = "{tmp_path}/shadow"\nsample_per_s = 1000\n'
        )
        with DaemonProcess(tmp_path, "--config", str(settings)) as daemon:
            asked = 0.0
            published = 0
            for part in range(3):
                upto = messages * (part + 1) // 3
                stop_at = chance.randrange(published, upto)
                while published < upto:
                    engine.publish()
                    published += 1
                    if published == stop_at and part:
                        daemon.kill()
                        daemon.start()
                applied(daemon, published)
                assert daemon.metric("kvcensus_shadow_up", backend=backend) == 1
                asked += daemon.metric("kvcensus_shadow_questions_total", question="locate")
                for question in ("locate", "match"):
                    assert daemon.metric("kvcensus_shadow_disagreements_total", question=question) == 0
            assert asked > 0
            assert daemon.terminate() == 0
        compared = subprocess.run(
            [*KVCENSUS, "backend", "diff", "--cursors", f"lmdb:{tmp_path}/data", f"{backend}:{tmp_path}/shadow"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (compared.returncode, compared.stdout) == (0, ""), compared.stderr
        with daemon:
            assert daemon.terminate() == 0
        copies = [line for line in daemon.log() if line["event"] == "shadow_copied"]
        assert len(copies) <= 2
