"""`python -m tests.screenshots.page`: pictures of the status page over simulated engines, into docs/images."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..browser import browsing
from ..end_to_end.daemon_process import DaemonProcess, wait_until
from ..end_to_end.test_status_page import Tab

IMAGES = Path(__file__).parents[2] / "docs" / "images"
ENGINES = 6
DEAD = '[[sources]]\nname = "engine-away"\nendpoint = "tcp://127.0.0.1:9"\nmodel = "tiny-llama"\n'
WORKERS = "#workers-table tbody th button"
LOOKS = 15


@contextmanager
def fleet(directory: Path) -> Iterator[DaemonProcess]:
    """A daemon that follows simulated engines, and one that is not there."""
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "simulate", "--rate", "20", "--name", "engine"]
    command += ["--engines", str(ENGINES), "--cpu-blocks", "1500", "--blocks", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as engines:
        try:
            assert engines.stdout is not None
            config = directory / "kvcensus.toml"
            config.write_text("\n".join(map(_source, json.loads(engines.stdout.readline())["engines"])) + DEAD)
            with DaemonProcess(directory, "--config", str(config)) as daemon:
                yield daemon
        finally:
            engines.kill()


def _source(engine: dict[str, Any]) -> str:
    rank = engine["ranks"][0]
    return (
        f'[[sources]]\nname = "{engine["name"]}"\nendpoint = "{rank["endpoint"]}"\n'
        f'replay_endpoint = "{rank["replay_endpoint"]}"\nmodel = "tiny-llama"\n'
    )


def deep_block(daemon: DaemonProcess) -> str:
    """A block inside a chain that as many workers hold as any."""
    records = daemon.snapshot()
    parents = {one["prefix_hash"] for one in records}
    inner = [one["block_hash"] for one in records if one["block_hash"] in parents and (one["block_index"] or 0) > 1]
    return str(Counter(inner).most_common(1)[0][0])


def picture(tab: Tab, name: str) -> None:
    path = IMAGES / f"page-{name}.png"
    tab.driver.save_screenshot(str(path))
    print(path, path.stat().st_size)


def theme(tab: Tab, wanted: str) -> None:
    while wanted not in tab.text("#theme"):
        tab.find("#theme").click()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, fleet(Path(directory)) as daemon:
        with browsing(1440, 1000) as driver:
            tab = Tab(driver)
            tab.open(daemon.port)
            theme(tab, "light")
            points = "return document.querySelector('.line polyline')?.getAttribute('points').split(' ').length ?? 0"
            wait_until(lambda: driver.execute_script(points) >= LOOKS, "there is a line", 120)
            block = deep_block(daemon)
            tab.open(daemon.port, f"#hash={block}")
            tab.wait("#found h3", block)
            wait_until(lambda: driver.execute_script(points) >= LOOKS, "there is a line", 120)
            tab.find(WORKERS).click()
            picture(tab, "light")
            theme(tab, "dark")
            tab.find(WORKERS).click()
            picture(tab, "dark")
            tab.find("#explorer").screenshot(str(IMAGES / "page-explorer.png"))
        with browsing(500, 900) as driver:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": 380, "height": 900, "deviceScaleFactor": 1, "mobile": True},
            )
            tab = Tab(driver)
            tab.open(daemon.port)
            tab.wait("#workers-shown", f"{ENGINES + 1} of")
            wait_until(lambda: driver.execute_script(points) > 1, "there are rates", 60)
            picture(tab, "narrow")
            wide = driver.execute_script("return document.documentElement.scrollWidth")
            print("narrow: page is", wide, "px wide")


if __name__ == "__main__":
    main()
