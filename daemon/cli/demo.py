"""`kvcensus demo`: a recorded engine, a real daemon, and what the daemon says, each in a process of its own."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..demo import recording

_REFRESH_S = 0.5
_START_S = 20.0
_PLAIN_EVERY_S = 2.0
_WORKER = "demo-engine"


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("kvcensus-data/demo"),
    show_default=True,
    help="Where the index goes.",
)
@click.option(
    "--http", "listen", default="127.0.0.1:0", show_default=True, help="HOST:PORT of the daemon; port 0 for any."
)
@click.option("--speed", default=0.2, show_default=True, help="Times the recorded pace.")
@click.option("--seconds", type=float, help="Stop after so long.  [default: until Ctrl-C]")
def demo(data_dir: Path, listen: str, speed: float, seconds: float | None) -> None:
    """Follow a recorded vLLM engine and show the index live.

    The recording starts again when it ends, as a restarted engine would: watch the epoch.
    """
    console = Console()
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / "daemon.log"
    with (
        recording() as path,
        _engine(path, speed) as engine,
        log_path.open("wb") as output,
        _daemon(engine, data_dir, listen, output) as process,
    ):
        host, port = _where_it_listens(process, log_path)
        console.print(f"HTTP on [bold]http://{host}:{port}[/]   daemon is process {process.pid}   log in {log_path}")
        console.print(f"Try   curl http://{host}:{port}/v1/workers")
        ends = None if seconds is None else time.monotonic() + seconds
        _watch(console, process, host, port, ends)


@contextmanager
def _child(command: list[str], **pipes: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "kvcensus.daemon.cli", *command], **pipes)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def _engine(path: Path, speed: float) -> Iterator[dict[str, str]]:
    """A process that publishes the recording over ZMQ. Yields its endpoints."""
    command = ["replay", str(path), "--bind", "tcp://127.0.0.1:0", "--replay-bind", "tcp://127.0.0.1:0"]
    command += ["--speed", str(speed), "--loop", "forever", "--restart-pause-ms", "1000", "--fresh-timestamps"]
    with _child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise click.ClickException("the recorded engine did not start")
        yield json.loads(line)


@contextmanager
def _daemon(engine: dict[str, str], data_dir: Path, listen: str, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = ["run", "--engine", engine["endpoint"], "--replay-endpoint", engine["replay_endpoint"]]
    command += ["--worker", _WORKER, "--model", "tiny-llama", "--data-dir", str(data_dir), "--http", listen]
    with _child(command, stderr=output) as process:
        yield process


def _where_it_listens(process: subprocess.Popen[bytes], log_path: Path) -> tuple[str, int]:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_path.read_text().splitlines():
            if '"http_listening"' in line:
                event = json.loads(line)
                return event["host"], event["port"]
        time.sleep(0.05)
    raise click.ClickException(f"the daemon did not start:\n{log_path.read_text()[-2000:]}")


def _ask(host: str, port: int, path: str) -> Any:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def _watch(console: Console, process: subprocess.Popen[bytes], host: str, port: int, ends: float | None) -> None:
    """Show the daemon's answers until the end, live on a terminal and as lines elsewhere."""
    last: tuple[float, int] = (time.monotonic(), 0)
    try:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=4) as live:
                while process.poll() is None and (ends is None or time.monotonic() < ends):
                    table, last = _table(host, port, last)
                    live.update(table)
                    time.sleep(_REFRESH_S)
        else:
            while process.poll() is None and (ends is None or time.monotonic() < ends):
                for stream in _ask(host, port, "/v1/streams")["streams"]:
                    held = sum(worker["blocks"] for worker in _ask(host, port, "/v1/workers")["workers"])
                    click.echo(
                        f"{stream['worker_id']}  {stream['trust']}  epoch {stream['epoch']}  seq {stream['last_seq']}  "
                        f"blocks held {held}  stored {stream['blocks_stored']}  removed {stream['blocks_removed']}"
                    )
                time.sleep(min(_PLAIN_EVERY_S, max(0.1, ends - time.monotonic())) if ends else _PLAIN_EVERY_S)
    except KeyboardInterrupt:
        console.print("stopping …")
    if process.poll() is not None:
        raise click.ClickException("the daemon has ended; its log says why")


def _table(host: str, port: int, last: tuple[float, int]) -> tuple[Group, tuple[float, int]]:
    streams = _ask(host, port, "/v1/streams")["streams"]
    workers = {worker["worker_id"]: worker for worker in _ask(host, port, "/v1/workers")["workers"]}
    table = Table(title="Streams", title_justify="left")
    for heading in ("worker", "trust", "state", "epoch", "last seq", "blocks held", "stored", "removed", "age"):
        table.add_column(heading, justify="left" if heading in ("worker", "trust", "state") else "right")
    total = 0
    for stream in streams:
        total += stream["blocks_stored"] + stream["blocks_removed"]
        colour = {"fresh": "green", "untrusted": "red"}.get(stream["trust"], "yellow")
        age = "-" if stream["age_ms"] is None else f"{stream['age_ms']:,} ms"
        table.add_row(
            stream["worker_id"],
            Text(stream["trust"], style=colour),
            stream["state"],
            str(stream["epoch"]),
            str(stream["last_seq"]),
            f"{workers.get(stream['worker_id'], {}).get('blocks', 0):,}",
            f"{stream['blocks_stored']:,}",
            f"{stream['blocks_removed']:,}",
            age,
        )
    now = time.monotonic()
    rate = max(0, total - last[1]) / max(0.001, now - last[0])
    return Group(table, Text(f"{rate:,.0f} blocks/s applied   Ctrl-C stops")), (now, total)
