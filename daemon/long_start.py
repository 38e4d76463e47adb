"""A start that takes long: the service manager is asked for more time while it works, and only then.

systemd ends a start at TimeoutStartSec. One that reads a large index which is suspected of damage may need more, and
what it needs depends on the index, the disk and the backend. Its progress is seen from outside, the same for every
backend: time of the processor and blocks read from a disk, of all threads but the one that looks.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from .logs import get_logger
from .service_manager import ServiceManager

LOOK_EVERY_S = 5.0
EXTENSION_S = 60.0
"""What is asked for each time: so long may a start that has worked stand still."""
LONGEST_S = 3600.0
"""Nothing is asked for after this, whatever it does. A longer start is for TimeoutStartSec to allow."""

_IDLE_SHARE = 0.01
"""A process that waits uses less of a processor than this."""

log = get_logger("start")


class Work(msgspec.Struct, frozen=True):
    """What a process has done so far: seconds of processors, blocks read from disks."""

    processor_s: float
    blocks_read: int


def work_so_far() -> Work:
    """Of every thread but this one."""
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    return Work(time.process_time() - time.thread_time(), blocks)


class StartTime:
    """Whether a start that began at `began_s` has earned more time."""

    def __init__(self, began_s: float, work: Work, longest_s: float = LONGEST_S) -> None:
        self._ends_s = began_s + longest_s
        self._looked_s = began_s
        self._work = work

    def is_earned(self, now_s: float, work: Work) -> bool:
        """Whether anything was done since the last look, and the end is not reached."""
        waited_s, self._looked_s = now_s - self._looked_s, now_s
        before, self._work = self._work, work
        worked = work.processor_s - before.processor_s > waited_s * _IDLE_SHARE
        return now_s < self._ends_s and (worked or work.blocks_read > before.blocks_read)


@contextmanager
def long_start(
    manager: ServiceManager, *, every_s: float = LOOK_EVERY_S, work: Callable[[], Work] = work_so_far
) -> Iterator[None]:
    """Ask for more time while the body works. It runs in this thread, and the asking in another."""
    if not manager.listens:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_ask, args=(manager, ended, every_s, work), name="start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _ask(manager: ServiceManager, ended: threading.Event, every_s: float, work: Callable[[], Work]) -> None:
    began_s = time.monotonic()
    earned = StartTime(began_s, work())
    asked = True
    while not ended.wait(every_s):
        now_s = time.monotonic()
        manager.status(f"starting for {now_s - began_s:.0f} s: reading what is stored")
        before, asked = asked, earned.is_earned(now_s, work())
        if asked:
            manager.extend(EXTENSION_S)
        elif before:
            log.warning("start_stands_still", after_s=round(now_s - began_s), detail="no more time is asked for")
