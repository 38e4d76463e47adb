"""`kvcensus top` against a real daemon that follows simulated engines, driven by textual's own pilot."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Static, TabbedContent

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.bench.processes import free_port
from kvcensus.daemon.cli.asking import Daemon
from kvcensus.daemon.status import Trust
from kvcensus.daemon.top.listing import Listing
from kvcensus.daemon.top.looking import Unreachable, look
from kvcensus.daemon.top.sample import Sample
from kvcensus.daemon.top.screen import Top, WorkerPage

from ..daemon.served import Bus, View, bus_status, serving, status
from .daemon_process import DaemonProcess, wait_until

KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that follows two ranks of an engine, and a third engine that is not there."""
    simulate = [*KVCENSUS, "simulate", "--ranks", "2", "--name", "gpu", "--rate", "10", "--blocks", "500"]
    engine = subprocess.Popen(simulate, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    ranks = json.loads(engine.stdout.readline())["engines"][0]["ranks"]
    flags: list[str] = []
    for number, rank in enumerate(ranks):
        flags += [
            "--engine",
            rank["endpoint"],
            "--replay-endpoint",
            rank["replay_endpoint"],
            "--worker",
            f"gpu-{number}",
        ]
    flags += ["--engine", f"tcp://127.0.0.1:{free_port()}"]
    try:
        with DaemonProcess(tmp_path_factory.mktemp("top"), *flags) as running:
            wait_until(lambda: running.streams()["gpu-1"]["messages"] > 5, "messages are applied", WAIT_S)
            yield running
    finally:
        engine.kill()
        engine.wait()


def looking_at(port: int) -> Callable[[], Sample]:
    """As the command does, without a command around it."""
    import click

    def once() -> Sample:
        with click.Context(click.Command("top")):
            try:
                return look(Daemon(f"127.0.0.1:{port}", 10).get)
            except click.ClickException as error:
                raise Unreachable(error.message) from error

    return once


async def until(pilot: Pilot[None], true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting: {what}\n{head(pilot.app)}"
        await pilot.pause(0.02)


def head(app: object) -> str:
    assert isinstance(app, Top)
    return str(app.screen_stack[0].query_one("#head", Static).render())


def table(app: object, name: str) -> Listing:
    assert isinstance(app, Top)
    return app.screen_stack[0].query_one(f"#{name}", Listing)


def test_workers_streams_and_backend_are_shown_live(daemon: DaemonProcess) -> None:
    async def drive() -> None:
        app = Top(looking_at(daemon.port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            workers = table(app, "worker_table")
            await until(pilot, lambda: len(workers.shown) == 3, "three workers")
            await until(pilot, lambda: any((row.rates and row.rates.stored) for row in workers.shown), "rates")
            await until(pilot, lambda: "3 workers   ● 2 fresh   ○ 1 stale" in head(app), "two are followed")
            assert "● ready" in head(app)
            before = head(app)
            await until(pilot, lambda: head(app) != before, "the figures move")

            await pilot.press("2")
            streams = table(app, "stream_table")
            await until(pilot, lambda: streams.has_focus, "the streams are there")
            assert {row.stream.state.value for row in streams.shown if row.stream} == {"live", "connecting"}
            await pilot.press("3")
            text = str(app.query_one("#backend_lines", Static).render())
            assert "backend       lmdb" in text
            assert "cores" in text
            await pilot.press("4")
            assert app.query_one("#tabs", TabbedContent).active == "backend"

    asyncio.run(drive())


def test_keys_filter_sort_pause_explain_and_leave(daemon: DaemonProcess) -> None:
    async def drive() -> None:
        app = Top(looking_at(daemon.port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            workers = table(app, "worker_table")
            await until(pilot, lambda: len(workers.shown) == 3, "three workers")
            await pilot.press("slash", *"stale")
            await until(pilot, lambda: len(workers.shown) == 1, "only the one that is not there")
            await pilot.press("enter", "enter")
            await until(pilot, lambda: isinstance(app.screen, WorkerPage), "all about it")
            assert "because       no connection to the engine" in str(app.screen.query_one("#text", Static).render())
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(app.screen, WorkerPage), "the tables again")
            await pilot.press("escape")
            await until(pilot, lambda: len(workers.shown) == 3, "all of them")

            names = [row.key for row in workers.shown]
            await pilot.press("r")
            assert [row.key for row in workers.shown] == names[::-1]
            await pilot.press("s")
            assert workers.sorted_by == 1

            await pilot.press("p")
            assert "paused" in head(app)
            await pilot.press("p")
            assert "paused" not in head(app)
            await pilot.press("question_mark")
            assert "all about a worker" in str(app.screen.query_one("#text", Static).render())
            await pilot.press("q", "q")
        assert app.return_code == 0

    asyncio.run(drive())


def test_a_daemon_that_is_not_there_is_told_and_tried_again(tmp_path: Path) -> None:
    port = free_port()

    async def drive() -> None:
        app = Top(looking_at(port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: "Connection refused; trying again" in head(app), "it is told")
            daemon = DaemonProcess(tmp_path, "--engine", f"tcp://127.0.0.1:{free_port()}", port=port)
            daemon.start(wait=False)
            try:
                await until(pilot, lambda: "● ready" in head(app), "it is there")
                daemon.kill()
                await until(pilot, lambda: "shown is what was" in head(app), "it is gone, and its figures stay")
                assert len(table(app, "worker_table").shown) == 1
            finally:
                daemon.kill()

    asyncio.run(drive())


def test_a_thousand_workers(tmp_path: Path) -> None:
    from kvcensus.backends.memory import MemoryBackend

    view = View(MemoryBackend(), [status(f"gpu-{number}") for number in range(1000)])

    async def drive(port: int) -> None:
        app = Top(looking_at(port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            workers = table(app, "worker_table")
            await until(pilot, lambda: workers.row_count == 1000, "a thousand rows")
            view.shown[999] = status("gpu-999", trust="untrusted", reason="lost")
            await until(pilot, lambda: workers.shown[999].trust == "untrusted", "a row has changed")
            await pilot.press("s")
            assert workers.shown[0].key == "gpu-999"
            await pilot.press("ctrl+end")
            assert workers.selected is not None
            assert workers.selected.key == "gpu-998"

    with serving(view) as client:
        asyncio.run(drive(client.port))


def test_a_bus_that_fails_says_why() -> None:
    view = View(MemoryBackend(), [status("gpu/0")])
    view.followed_buses = [Bus(bus_status("fleet", problem="nats://nats:4222: nobody answers"))]

    async def drive(port: int) -> None:
        app = Top(looking_at(port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            buses = table(app, "bus_table")
            await until(pilot, lambda: len(buses.shown) == 1, "the bus is there")
            await pilot.press("4")
            await until(pilot, lambda: buses.has_focus, "it is shown")
            await pilot.press("enter")
            assert "because       nats://nats:4222: nobody answers" in str(
                app.screen.query_one("#text", Static).render()
            )
            await pilot.press("ctrl+c")
        assert app.return_code == 0

    with serving(view) as client:
        asyncio.run(drive(client.port))


def test_what_a_peer_calls_itself_is_text() -> None:
    """Whoever may publish on a bus may choose the name of a worker."""
    names = ["[/]", "\x1b]0;mine\x07", "two\nlines"]
    view = View(MemoryBackend(), [status(name, trust=Trust.STALE, reason="\x1b[2J") for name in names])

    async def drive(port: int) -> None:
        app = Top(looking_at(port), "there", 0.2)
        async with app.run_test(size=(80, 24)) as pilot:
            workers = table(app, "worker_table")
            await until(pilot, lambda: len(workers.shown) == 3, "the workers are there")
            assert not any("\x1b" in str(workers.get_row_at(at)[0]) for at in range(3))
            workers.move_cursor(row=[row.key for row in workers.shown].index("[/]"))
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, WorkerPage), "the page is there")
            assert app.screen.query_one("#page").border_title == "\\[/]"
            assert "\x1b" not in str(app.screen.query_one("#text", Static).render())
            await pilot.press("ctrl+c")

    with serving(view) as client:
        asyncio.run(drive(client.port))
        where = ("--http", f"127.0.0.1:{client.port}")
        for command in (("query", "workers"), ("query", "streams"), ("top", "--once", "--interval", "0.2")):
            ended = kvcensus(*command, *where)
            assert (ended.returncode, "\x1b" in ended.stdout, "two\\nlines" in ended.stdout) == (0, False, True)


def kvcensus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVCENSUS, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_scripts_get_tables_or_json(daemon: DaemonProcess) -> None:
    ask = partial(kvcensus, "top", "--http", f"127.0.0.1:{daemon.port}", "--interval", "0.5")
    shown = ask("--once")
    assert shown.returncode == 0, shown.stderr
    assert "WORKER" in shown.stdout
    assert "● fresh" in shown.stdout
    printed = json.loads(ask("--json").stdout)
    assert {one["worker_id"] for one in printed["workers"]} >= {"gpu-0/0", "gpu-1/1"}
    assert printed["rates"]["streams"]["gpu-0"]["messages"] > 0
    assert "--once prints tables" in ask().stderr
    gone = kvcensus("top", "--http", "127.0.0.1:1", "--once")
    assert (gone.returncode, gone.stderr) == (69, "Error: http://127.0.0.1:1/readyz: Connection refused\n")
