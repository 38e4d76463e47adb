"""Running a target over many inputs, and what is reported of it."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec

from .decoders import Target
from .mutation import Mutator

CORPUS = Path(__file__).parent / "corpus"

HANG_S = 10.0
"""Processor time for one input, after which it is given up as a hang."""
SLOW_S = 0.5
"""… and after which it is reported as slow."""
_WARM_UP = 20
"""One in so many of the inputs may fill caches before the memory is looked at."""
_SHOWN_MAX = 5


class Hang(Exception):
    """An input took longer than HANG_S of processor time."""


class Slow(Exception):
    """An input took longer than SLOW_S. It does not fail a campaign, because machines have their moods."""


class Report(msgspec.Struct):
    """What became of a campaign. Sizes in bytes, times in seconds."""

    target: str
    seed: int
    inputs: int = 0
    input_bytes: int = 0
    seconds: float = 0.0
    exceptions: int = 0
    hangs: int = 0
    slow: int = 0
    slowest_s: float = 0.0
    rss_before: int = 0
    rss_after: int = 0
    shown: list[str] = []

    @property
    def failed(self) -> bool:
        return bool(self.exceptions or self.hangs)


def rss_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@contextmanager
def _hangs_raise() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, end)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(name: str, target: Target, seed: int, inputs: int, minutes: float, corpus: Path | None = CORPUS) -> Report:
    """Feed `target` mutated inputs until there were `inputs` of them or `minutes` have passed; 0 is no limit of that
    kind. An input that fails is written to `corpus`.
    """
    report = Report(name, seed, rss_before=rss_bytes())
    mutator = Mutator(target.seeds, target.lies, seed, packed=target.packed)
    begun = time.monotonic()
    ends = begun + minutes * 60 if minutes else float("inf")
    with _hangs_raise():
        while (not inputs or report.inputs < inputs) and time.monotonic() < ends:
            data = mutator.next()
            failure = tried(target, data, report)
            if failure is not None:
                _keep(name, data, failure, report, corpus)
            if report.inputs == max(1, inputs // _WARM_UP):
                report.rss_before = rss_bytes()
    report.seconds = time.monotonic() - begun
    report.rss_after = rss_bytes()
    return report


def tried(target: Target, data: bytes, report: Report) -> BaseException | None:
    """Feed one input. Returns what it raised, and counts it in `report`."""
    report.inputs += 1
    report.input_bytes += len(data)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    begun = time.thread_time()
    failure: BaseException | None = None
    try:
        target.run(data)
    except Hang as hang:
        report.hangs += 1
        failure = hang
    except Exception as error:  # noqa: BLE001 - any exception is what is looked for
        report.exceptions += 1
        failure = error
    took = time.thread_time() - begun
    if took > SLOW_S:
        report.slow += 1
        failure = failure or Slow(f"{took:.2f} s")
    report.slowest_s = max(report.slowest_s, took)
    return failure


def _keep(name: str, data: bytes, failure: BaseException, report: Report, corpus: Path | None) -> None:
    digest = hashlib.sha256(data).hexdigest()[:16]
    if len(report.shown) < _SHOWN_MAX:
        report.shown.append(f"{digest}: {type(failure).__name__}: {str(failure)[:300]}")
        if corpus is not None:
            (corpus / name).mkdir(parents=True, exist_ok=True)
            (corpus / name / digest).write_bytes(data)
