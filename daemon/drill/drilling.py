"""Seeds, one after the other or several at a time, and what came of them."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from kvcensus.backends.errors import BackendError

from ..config import Config, OnHole
from .evidence import keep_evidence
from .faults import Fault
from .machine import Link, Unavailable, separate_network, small_disk
from .oracle import Outcome
from .plan import make_plan
from .stage import Result, Stage
from .target import forget_indexes, make_target

_WITHOUT_FILES = {"memory", "valkey"}


class Order(msgspec.Struct, frozen=True):
    """What to drill. `base` without sources: engines and sources of our own. `deadline_s` is for catching up."""

    base: Config
    faults: tuple[Fault, ...]
    messages: int
    keep: Path
    backend: str | None = None
    deadline_s: float = 30.0


class Summary(msgspec.Struct, frozen=True):
    """Figures over all seeds. Times in ms."""

    drills: int
    diverged: int
    messages: int
    injected: dict[str, int]
    found: dict[str, int]
    workers: dict[str, int]
    recovery_ms_p50: int
    recovery_ms_max: int


def impossible(base: Config, faults: Sequence[Fault], backend: str | None) -> dict[Fault, str]:
    """Which of the faults cannot be injected here, or would prove nothing, and why."""
    reasons: dict[Fault, str] = {}
    backend = backend or base.backend
    if backend != "lmdb":
        reasons[Fault.FULL_MAP] = f"the {backend} backend does not map its index"
    if backend in _WITHOUT_FILES:
        reasons[Fault.FULL_DISK] = f"the {backend} backend has no file"
    if "valkey" in (backend, base.shadow.backend):
        reasons[Fault.PARTITION] = "a daemon in a network of its own would not reach the valkey server"
    if any(source.on_hole is OnHole.TOLERATE for source in base.sources):
        reasons[Fault.UNPUBLISHED] = "a source tolerates holes, so it believes what cannot be known"
    with tempfile.TemporaryDirectory(prefix="kvcensus-drill-") as place:
        for fault, borrowed in ((Fault.FULL_DISK, small_disk(Path(place))), (Fault.PARTITION, separate_network())):
            if fault not in faults or fault in reasons:
                continue
            try:
                with borrowed:
                    pass
            except Unavailable as error:
                reasons[fault] = str(error)
    return {fault: reason for fault, reason in reasons.items() if fault in faults}


def drill_seed(order: Order, seed: int) -> Result:
    """One drill. What reproduces a divergence is left in `order.keep`/seed-N."""
    place = Path(tempfile.mkdtemp(prefix=f"kvcensus-drill-{seed}-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        (place / "data").mkdir(mode=0o700)
        if Fault.FULL_DISK in order.faults:
            stack.enter_context(small_disk(place / "data"))
        link = stack.enter_context(separate_network()) if Fault.PARTITION in order.faults else Link()
        target = make_target(order.base, seed, place, order.backend, link)
        try:
            streams = sum(len(engine.ranks) for engine in target.engines)
            plan = make_plan(seed, streams, order.messages, order.faults)
            stage = Stage(plan, target, place, order.deadline_s)
            try:
                result = stage.run()
            finally:
                stage.daemon.kill()
                with suppress(BackendError):  # a server that is away has failed the drill already
                    forget_indexes(target.config)
        finally:
            for engine in target.engines:
                engine.stop()
        if not result.passed:
            keep_evidence(place, plan, result, stage.sent())
            kept = order.keep / f"seed-{seed}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept, ignore=shutil.ignore_patterns("data"))
        return result


def drill_seeds(order: Order, seeds: Sequence[int], jobs: int) -> Iterator[Result]:
    """Drill each seed, `jobs` at a time; results in the order of the seeds."""
    if jobs == 1:
        yield from (drill_seed(order, seed) for seed in seeds)
        return
    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(lambda seed: drill_seed(order, seed), seeds)
    finally:
        pool.shutdown(cancel_futures=True)


def summed(results: Sequence[Result]) -> Summary:
    """Figures over these results."""
    injected: Counter[str] = Counter()
    found: Counter[str] = Counter()
    workers: Counter[str] = Counter(dict.fromkeys(Outcome, 0))
    for result in results:
        injected.update(result.injected)
        found.update(result.found)
        workers.update(worker.outcome for worker in result.workers)
    recoveries = sorted(result.recovery_ms for result in results) or [0]
    return Summary(
        drills=len(results),
        diverged=sum(not result.passed for result in results),
        messages=sum(result.messages for result in results),
        injected=dict(injected),
        found=dict(found),
        workers=dict(workers),
        recovery_ms_p50=recoveries[len(recoveries) // 2],
        recovery_ms_max=recoveries[-1],
    )
