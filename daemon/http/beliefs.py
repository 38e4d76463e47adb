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
    """The beliefs in every worker at one moment."""

    def __init__(self, view: DaemonView) -> None:
        self._statuses = {status.worker_id: status for status in view.statuses()}
        self._now_ms = now_ms()

    def of(self, worker_id: str) -> Belief:
        """The belief in one worker; without a stream nothing keeps its blocks true."""
        status = self._statuses.get(worker_id)
        if status is None:
            return _WITHOUT_STREAM
        return Belief(status.trust, status.reason, status.last_seq, age_ms(status, self._now_ms))


def age_ms(status: StreamStatus, at_ms: int) -> int | None:
    """Milliseconds since the stream's last commit, None when there was none."""
    return max(0, at_ms - status.committed_ms) if status.committed_ms else None
