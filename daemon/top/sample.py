"""All that one look at a daemon brings. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from ..http.bodies import StreamsAnswer, WorkersAnswer
from ..status import Readiness
from .figures import Figures


class NotUnderstood(Exception):
    """An answer that this version cannot read."""


class Sample:
    """A daemon at one moment. `at_s` is on our monotonic clock, `wall_s` in seconds since the Unix epoch."""

    def __init__(
        self,
        at_s: float,
        wall_s: float,
        readiness: Readiness,
        workers: WorkersAnswer,
        streams: StreamsAnswer,
        figures: Figures,
    ) -> None:
        self.at_s = at_s
        self.wall_s = wall_s
        self.readiness = readiness
        self.workers = {one.worker_id: one for one in workers.workers}
        self.streams = {one.stream: one for one in streams.streams}
        self.stream_of = {one.worker_id: one for one in streams.streams}
        self.buses = streams.buses
        self.figures = figures

    @classmethod
    def read(cls, at_s: float, wall_s: float, answers: dict[str, bytes]) -> Sample:
        """From the answers of `/readyz`, `/v1/workers`, `/v1/streams` and `/metrics`. Raises NotUnderstood."""
        return cls(
            at_s,
            wall_s,
            _decoded(answers, "/readyz", Readiness),
            _decoded(answers, "/v1/workers", WorkersAnswer),
            _decoded(answers, "/v1/streams", StreamsAnswer),
            _figures(answers["/metrics"]),
        )

    @property
    def version(self) -> str:
        """The release of the daemon."""
        return self.figures.label("kvcensus_build_info", "version")

    @property
    def backend(self) -> str:
        """The name of its backend."""
        return self.figures.label("kvcensus_backend_up", "backend")

    @property
    def started_s(self) -> float | None:
        """When the process was started, in seconds since the Unix epoch."""
        return self.figures.value("process_start_time_seconds")

    @property
    def uptime_s(self) -> float | None:
        """By our clock, so wrong by as much as it differs from the daemon's."""
        started = self.started_s
        return None if started is None else max(0.0, self.wall_s - started)


def _decoded(answers: dict[str, bytes], path: str, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(answers[path], type=kind)
    except msgspec.DecodeError as error:
        raise NotUnderstood(f"{path}: not the answer of a kvcensus of this version: {error}") from error


def _figures(text: bytes) -> Figures:
    try:
        return Figures.parse(text.decode())
    except (ValueError, KeyError) as error:
        raise NotUnderstood(f"/metrics: not the answer of a kvcensus of this version: {error}") from error
