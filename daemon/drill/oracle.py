"""The comparison at the end: what the daemon says of each worker, beside what its engine really holds. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from kvcensus.backends.model import CacheTier

from ..simulate.cache import Held
from ..simulate.engine import Truth
from ..status import StreamState, Trust
from .faults import Excuse

_SHOWN = 3


class Outcome(StrEnum):
    """How a worker came out."""

    EQUAL = "equal"
    UNTRUSTED = "untrusted"
    BEHIND = "behind"
    DIVERGED = "diverged"


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker at the end. `problem` is "" unless it diverged or never caught up; `reason` is the daemon's."""

    worker_id: str
    outcome: Outcome
    problem: str = ""
    reason: str = ""
    blocks: int = 0


def index_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Held]:
    """The lines of a snapshot by worker, as a truth is written."""
    held: dict[str, Held] = {}
    for row in rows:
        key = (bytes.fromhex(row["block_hash"]), row["group"])
        held.setdefault(row["worker_id"], {}).setdefault(CacheTier(row["tier"]), {})[key] = row["ref_count"]
    return held


def compare(
    truths: Sequence[Truth],
    streams: Mapping[str, Mapping[str, Any]],
    index: Mapping[str, Held],
    excuses: Mapping[str, set[Excuse]],
    *,
    keeping: Collection[str] = (),
) -> list[WorkerReport]:
    """`streams` are those of `/v1/streams` by worker. `keeping`: workers whose blocks are kept when they are untrusted.

    `excuses` are what was done to each worker in the life of its engine.
    """
    reports = [
        _worker(
            truth,
            streams.get(truth.worker_id),
            index.get(truth.worker_id, {}),
            excuses.get(truth.worker_id, set()),
            truth.worker_id in keeping,
        )
        for truth in truths
    ]
    strangers = index.keys() - {truth.worker_id for truth in truths}
    return reports + [WorkerReport(one, Outcome.DIVERGED, "there is no such worker") for one in sorted(strangers)]


def _worker(
    truth: Truth,
    stream: Mapping[str, Any] | None,
    index: Held,
    excused: set[Excuse],
    keeps: bool,
) -> WorkerReport:
    blocks = sum(len(held) for held in truth.held.values())
    if stream is None:
        return WorkerReport(truth.worker_id, Outcome.BEHIND, "the daemon has no such stream", blocks=blocks)

    def report(outcome: Outcome, problem: str = "") -> WorkerReport:
        return WorkerReport(truth.worker_id, outcome, problem, stream["reason"], blocks)

    if stream["last_seq"] != truth.last_seq or stream["state"] != StreamState.LIVE:
        where = f"{stream['state']} at message {stream['last_seq']} of {truth.last_seq}"
        return report(Outcome.BEHIND, where)
    invented, missing = _difference(index, truth.held), _difference(truth.held, index)
    if stream["trust"] != Trust.UNTRUSTED:
        if invented or missing:
            problem = f"{stream['trust']}, but {_told(invented)} not there and {_told(missing)} missing"
            return report(Outcome.DIVERGED, problem)
        return report(Outcome.EQUAL)
    refused = "was refused" in stream["reason"]
    if refused and Excuse.REFUSED in excused:
        return report(Outcome.UNTRUSTED)
    if refused or Excuse.UNTRUSTED not in excused:
        return report(Outcome.DIVERGED, "untrusted, and no fault excuses it")
    if invented and not keeps and Excuse.REFUSED not in excused:
        return report(Outcome.DIVERGED, f"untrusted, but {_told(invented)} claimed and not there")
    return report(Outcome.UNTRUSTED)


def _difference(some: Held, others: Held) -> list[str]:
    """Copies that `some` has beyond those of `others`."""
    return [
        f"{tier}:{block.hex()}" + (f":{group}" if group else "")
        for tier, held in some.items()
        for (block, group), copies in held.items()
        if copies > others.get(tier, {}).get((block, group), 0)
    ]


def _told(blocks: Sequence[str]) -> str:
    if not blocks:
        return "none"
    return f"{len(blocks)} ({', '.join(blocks[:_SHOWN])}{', …' if len(blocks) > _SHOWN else ''})"
