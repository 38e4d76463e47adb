"""`kvcensus check --probe` in this process, over real sockets, beside engines that publish meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from kvcensus.daemon.cli import main
from kvcensus.daemon.engine_replay import ReplayedEngine
from kvcensus.daemon.engine_sockets import ReplayFraming
from kvcensus.daemon.recording import Recording

CAPTURES = Path(__file__).parents[1] / "captures"
PROBE_S = 1.0
BUSY_S = 2.5
"""For a probe that has to see what is published meanwhile."""

Meanwhile = Callable[[threading.Event], object]
"""Called while it looks, with what is set when it has looked."""


class Probed(NamedTuple):
    exit_code: int
    findings: dict[str, Any]

    @property
    def stream(self) -> dict[str, Any]:
        (stream,) = self.findings["streams"]
        return dict(stream)

    @property
    def bus(self) -> dict[str, Any]:
        (bus,) = self.findings["buses"]
        return dict(bus)


def nothing(ended: threading.Event) -> None:
    """Nothing happens meanwhile."""


def engine_of(capture: str, published: int = 0, **options: Any) -> ReplayedEngine:
    """A captured engine that has published so many messages already."""
    framing = ReplayFraming.NEW if "vllm-0.32" in capture or "sglang" in capture else ReplayFraming.OLD
    recording = Recording(CAPTURES / f"{capture}.jsonl.gz")
    settings: dict[str, Any] = {"framing": framing, "fresh_timestamps": True} | options
    engine = ReplayedEngine(recording, **settings).start()
    engine.publish(published)
    return engine


def probe(
    directory: Path,
    toml: str,
    meanwhile: Meanwhile = nothing,
    *,
    seconds: float | None = None,
    arguments: tuple[str, ...] = ("--json",),
) -> tuple[int, str]:
    """The exit code and what is printed. It looks longer where something is to come meanwhile."""
    config = directory / "probed.toml"
    config.write_text(toml)
    seconds = seconds or (PROBE_S if meanwhile is nothing else BUSY_S)
    ended_looking = threading.Event()
    beside = threading.Thread(target=lambda: meanwhile(ended_looking))
    beside.start()
    command = ["check", "--config", str(config), "--probe", "--probe-s", str(seconds), *arguments]
    ended = CliRunner().invoke(main, command)
    ended_looking.set()
    beside.join()
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout


def probed(directory: Path, toml: str, meanwhile: Meanwhile = nothing, **options: Any) -> Probed:
    """What is printed as JSON."""
    exit_code, printed = probe(directory, toml, meanwhile, **options)
    return Probed(exit_code, json.loads(printed)["probe"])


def publishing(engine: ReplayedEngine, count: int) -> Meanwhile:
    """Publish so many messages once somebody listens."""

    def publish(ended: threading.Event) -> None:
        if engine.wait_subscribers(1, 20):
            time.sleep(0.1)
            engine.publish(count)

    return publish


def repeating(publish: Callable[[], object]) -> Meanwhile:
    """Do it again and again: whoever comes in the meantime gets some of it."""

    def repeat(ended: threading.Event) -> None:
        while not ended.wait(0.05):
            publish()

    return repeat


def source(engine: ReplayedEngine, **settings: Any) -> str:
    """The table of an engine."""
    settings = {"name": "gpu-7", "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint} | settings
    return "[[sources]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
