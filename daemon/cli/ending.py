"""How a command ends: with one line on stderr and an exit code of sysexits.h, or by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

EXIT_DATA = 65
EXIT_UNAVAILABLE = 69
EXIT_IO = 74
EXIT_BUSY = 75
EXIT_CONFIG = 78


class Failure(click.ClickException):
    """Printed as `Error: message`; the process exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it once for the class


@contextmanager
def sigterm_ends() -> Iterator[None]:
    """SIGTERM leaves the block as SystemExit(0), so that files are closed: for commands that run until a signal."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_set(event: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `event`; SIGINT then leaves the block as KeyboardInterrupt."""
    interrupted = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = interrupted or number == signal.SIGINT
        event.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt
