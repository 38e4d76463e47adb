"""How far what the index says of a worker can be believed, now."""

from __future__ import annotations

from typing import NamedTuple

from ..followed import now_ms
from ..status import DaemonView, StreamStatus, Trust

NO_STREAM = "no stream is configured for this worker"


class Belief(NamedTuple):
    """Trust in a worker's blocks, and how far its stream has been committed."""

    trust: Trust
    reason: str
    last_seq: int
    age_ms: int | None


_WITHOUT_STREAM = Belief(Trust.UNTRUSTED, NO_STREAM, -1, None)


class Beliefs:
    """The beliefs in every worker at one moment.

    What is read of the index after that has all that was committed up to their numbers.
    """

    def __init__(self, view: DaemonView) -> None:
        self._standings = view.standings()
        self._now_ms = now_ms()
        self._known: dict[str, Belief] = {}

    def of(self, worker_id: str) -> Belief:
        """The belief in one worker; without a stream nothing keeps its blocks true."""
        belief = self._known.get(worker_id)
        if belief is None:
            belief = self._known[worker_id] = self._formed(worker_id)
        return belief

    def _formed(self, worker_id: str) -> Belief:
        standing = self._standings.get(worker_id)
        if standing is None:
            return _WITHOUT_STREAM
        status = standing()
        return Belief(status.trust, status.reason, status.last_seq, age_ms(status, self._now_ms))


def age_ms(status: StreamStatus, at_ms: int) -> int | None:
    """Milliseconds since the stream's last commit, None when there was none."""
    return max(0, at_ms - status.committed_ms) if status.committed_ms else None
