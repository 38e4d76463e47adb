"""What the writer does for its store beside commits: frees space, and says what pins it or keeps it from writing."""

from __future__ import annotations

import time

from kvcensus.backends.errors import BackendError, BackendFull, BackendUnavailable
from kvcensus.backends.interface import IndexBackend

from .followed import now_ms
from .logs import get_logger
from .shadow import Shadow

_EVERY_S = 0.5
"""How often space is reclaimed while there is always something to write: some milliseconds each time."""
_ROOM_STEPS = 20
"""Steps of reclaiming between two attempts to write into a full store."""
_READERS_EVERY_S = 10.0
_PINNED_TRANSACTIONS = 1000
"""A reader so many transactions behind keeps every page that they freed: 20 s of a busy writer, or more."""

log = get_logger("writer")


class Upkeep:
    """Belongs to the writer's thread. `rows` are looked at in each step of reclaiming."""

    def __init__(self, backend: IndexBackend, rows: int, shadow: Shadow | None = None) -> None:
        self._backend = backend
        self._rows = rows
        self._shadow = shadow
        self.problem = ""
        """Why nothing can be written now, "" when it can."""
        self.since_ms = 0
        self._is_away = False
        self._done_s = 0.0
        self._readers_seen_s = 0.0
        self._untidy = ""

    def is_due(self) -> bool:
        """Whether the last step is so long ago that a busy writer should make one."""
        return time.monotonic() - self._done_s > _EVERY_S

    def step(self) -> None:
        """Free what cleared workers and killed readers held, and say who reads an old state for long."""
        self._done_s = time.monotonic()
        self._reclaim()
        if self._shadow is not None:
            self._shadow.reclaim(self._rows)
        if self._done_s - self._readers_seen_s >= _READERS_EVERY_S:
            self._readers_seen_s = self._done_s
            self._look()

    def _look(self) -> None:
        health = self._backend.health()
        if health.problem != self._untidy:
            self._untidy = health.problem
            if health.problem:
                log.warning("backend_untidy", backend=self._backend.name(), reason=health.problem, detail="it grows")
            else:
                log.info("backend_is_tidy", backend=self._backend.name())
        if health.oldest_reader_lag > _PINNED_TRANSACTIONS:
            log.warning(
                "reader_pins_the_index",
                reader_pid=health.oldest_reader_pid,
                transactions_behind=health.oldest_reader_lag,
                detail="no page that was freed since then can be used again: the file grows until this reader goes on",
            )

    def make_room(self) -> None:
        """Reclaim what a full store has, as far as it goes in one go."""
        for _ in range(_ROOM_STEPS):
            if not self._reclaim():
                break

    def _reclaim(self) -> bool:
        """One step, a smaller one where there is no room for that. Whether there is more to do."""
        rows = self._rows
        while rows:
            try:
                more = self._backend.reclaim(rows)
            except BackendFull:
                rows //= 8
            except BackendUnavailable as error:
                self.cannot_write(error)
                break
            else:
                if self._is_away:
                    self.can_write()
                return more
        return False

    def cannot_write(self, error: BackendError) -> None:
        """Nothing can be written; said once until something can."""
        if not self.problem:
            self.since_ms = now_ms()
            log.error(f"backend_{error.problem}", backend=self._backend.name(), detail=str(error))
        self.problem = str(error)
        self._is_away = isinstance(error, BackendUnavailable)

    def can_write(self) -> None:
        """Something was written."""
        if self.problem:
            event = "backend_is_back" if self._is_away else "backend_has_room"
            log.info(event, backend=self._backend.name())
            self.problem, self._is_away = "", False
