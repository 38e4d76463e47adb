"""What we tell the service manager that started us: ready, reloading, stopping, how it goes, and that we are alive.

The protocol is that of sd_notify(3): lines in one datagram to the socket that NOTIFY_SOCKET names. Without that
variable nobody is told.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from .logs import get_logger

_FEEDS_PER_PERIOD = 4
"""systemd wants two at least; one that comes late must not cost us the process."""

log = get_logger("service_manager")


class Watchdog:
    """When the watchdog may be told that we are alive: while the thread that writes makes progress, and only then."""

    def __init__(self, period_s: float) -> None:
        """`period_s` without a word is our end; 0 for no watchdog."""
        self._period_s = period_s
        self._fed_s = float("-inf")

    def is_due(self, now_s: float, beat_s: float) -> bool:
        """Whether to tell it now. `beat_s` is when the writer last was between two steps, in the same clock."""
        if not self._period_s or now_s - self._fed_s < self._period_s / _FEEDS_PER_PERIOD:
            return False
        if now_s - beat_s > self._period_s / 2:
            return False
        self._fed_s = now_s
        return True


class ServiceManager:
    """Speaks to the one that started this process, if it listens."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._status = ""
        self.watchdog = Watchdog(_watchdog_s(environ) if self._address else 0)

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return bool(self._address)

    def ready(self) -> None:
        """We answer: from the start, and again after a reload."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again, until the next `ready`."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def extend(self, more_s: float) -> None:
        """What we are at (a start, a stop) may take so long from now, if its timeout is over before."""
        self._tell(_extension(more_s))

    def stopping(self, within_s: float) -> None:
        """The end has begun. It may take so long, whatever its timeout says."""
        self._tell("STOPPING=1", _extension(within_s))

    def status(self, text: str) -> None:
        """One line on how it goes, for people."""
        if text != self._status:
            self._status = text
            self._tell(f"STATUS={' '.join(text.split())}")

    def alive(self) -> None:
        """Another period for the watchdog."""
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # A leading @ is that of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.sendto("\n".join(lines).encode(errors="backslashreplace"), socket.MSG_DONTWAIT, address)
        except OSError as error:
            log.warning("service_manager_not_told", what=lines[0], error=str(error))


def _extension(more_s: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={round(more_s * 1e6)}"


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """The period in seconds; 0 where there is none, or where it watches another process (sd_watchdog_enabled(3))."""
    with suppress(ValueError):
        if int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid():
            return max(0, int(environ.get("WATCHDOG_USEC") or 0)) / 1e6
    return 0.0
