"""One followed stream: its pure state, its cursor, its translator and its counters, and who may touch which."""

from __future__ import annotations

import time
from typing import Protocol

from kvcensus.backends.model import Cursor
from kvcensus.translators.translation import Translator, worker_id_of

from .counters import AppliedCounters, IntakeCounters
from .status import StreamState, StreamStatus, Trust
from .streams.state import Stream, StreamLimits


class StreamView(Protocol):
    """What is shown of the state of a stream. `life_at_ms` is when its publisher last gave a sign of life.

    `proven`: nothing can have been missed since the connection was made.
    """

    @property
    def state(self) -> StreamState: ...

    @property
    def expects_life(self) -> bool: ...

    @property
    def proven(self) -> bool: ...

    life_at_ms: int


class Followed:
    """What the writer and everybody who looks know of a stream: of one publisher and rank.

    The thread that receives owns `intake`; the writer thread owns `cursor`, `translator` and `applied`.
    Every other thread only reads whole values. `rank` is the configured one; the wire may show one where it is None.
    `worker` is its NAME, default: that of the source. `engine` is the type of its source. `keeps_fenced`: the blocks of
    a fenced worker stay, marked untrusted.
    """

    def __init__(
        self,
        *,
        source: str,
        stream: str,
        rank: int | None,
        endpoint: str,
        translator: Translator,
        view: StreamView,
        intake: IntakeCounters,
        cursor: Cursor | None,
        worker: str = "",
        engine: str = "vllm",
        keeps_fenced: bool = False,
        stale_after_ms: int = 30_000,
        silent_after_ms: int = 300_000,
    ) -> None:
        self.source = source
        self.worker = worker or source
        self.engine = engine
        self.stream = stream
        self.rank = rank
        self.endpoint = endpoint
        self.translator = translator
        self.intake = intake
        self.applied = AppliedCounters()
        self.left = False
        """Whether it is followed no more, and that is committed. Set by the writer."""
        self.cursor = cursor or Cursor(stream=stream, epoch=0, seq=-1, source=source, rank=rank)
        self.keeps_fenced = keeps_fenced
        self._view = view
        self._stale_after_ms = stale_after_ms
        self._silent_after_ms = silent_after_ms
        self._opened_at_ms = monotonic_ms()
        self._shown_state = StreamState.CONNECTING
        self._state_since_ms = now_ms()

    def note_state(self) -> StreamState | None:
        """Take over the state for showing. Returns it when it has changed. Called by the intake thread."""
        state = self._view.state
        if state is self._shown_state:
            return None
        self._shown_state = state
        self._state_since_ms = now_ms()
        return state

    def worker_id(self, cursor: Cursor) -> str:
        """The worker as of a commit; before the first message it is the configured one."""
        return cursor.worker_id or worker_id_of(self.worker, self._rank(cursor))

    def _rank(self, cursor: Cursor) -> int | None:
        return cursor.rank if self.rank is None else self.rank

    def status(self, cursor: Cursor | None = None) -> StreamStatus:
        """The stream as of its last commit, or of the one that left this cursor."""
        cursor, state = cursor or self.cursor, self._shown_state
        trust, reason, since_ms = self._trust(cursor, state)
        return StreamStatus(
            stream=self.stream,
            source=self.source,
            endpoint=self.endpoint,
            worker_id=self.worker_id(cursor),
            rank=self._rank(cursor),
            epoch=cursor.epoch,
            last_seq=cursor.seq,
            state=state,
            trust=trust,
            reason=reason,
            since_ms=since_ms,
            engine_ms=cursor.engine_ms,
            committed_ms=cursor.committed_ms,
            messages=cursor.messages,
            blocks_stored=cursor.blocks_stored,
            blocks_removed=cursor.blocks_removed,
            silent=self._is_silent(),
        )

    def _is_silent(self) -> bool:
        """Whether the source has never delivered anything, although it had the time."""
        if self.intake.messages or self.intake.replayed:
            return False
        return monotonic_ms() - self._opened_at_ms > self._silent_after_ms

    def _trust(self, cursor: Cursor, state: StreamState) -> tuple[Trust, str, int]:
        if cursor.trust == Trust.UNTRUSTED:
            return Trust.UNTRUSTED, cursor.reason, cursor.since_ms
        if state is StreamState.CONNECTING or state is StreamState.DISCONNECTED:
            return Trust.STALE, "no connection to the engine", self._state_since_ms
        silence_ms = monotonic_ms() - self._view.life_at_ms
        if silence_ms > self._stale_after_ms and self._view.expects_life:
            return Trust.STALE, "no sign of life from the engine", now_ms() - silence_ms
        if state is StreamState.REPLAYING:
            return Trust.CATCHING_UP, "replaying what was missed", self._state_since_ms
        if not self._view.proven:
            return (
                Trust.STALE,
                "messages may have been missed, and nothing has proved otherwise yet",
                self._state_since_ms,
            )
        return Trust.FRESH, "", max(cursor.since_ms, self._state_since_ms)


class FollowedStream(Followed):
    """A stream that is configured, with the state that the thread that receives feeds."""

    def __init__(
        self,
        *,
        source: str,
        stream: str,
        rank: int | None,
        endpoint: str,
        limits: StreamLimits,
        translator: Translator,
        cursor: Cursor | None,
        engine: str = "vllm",
        keeps_fenced: bool = False,
        stale_after_ms: int = 30_000,
        silent_after_ms: int = 300_000,
    ) -> None:
        intake = IntakeCounters()
        self.state = Stream(limits, intake, cursor)
        super().__init__(
            source=source,
            stream=stream,
            rank=rank,
            endpoint=endpoint,
            translator=translator,
            view=self.state,
            intake=intake,
            cursor=cursor,
            engine=engine,
            keeps_fenced=keeps_fenced,
            stale_after_ms=stale_after_ms,
            silent_after_ms=silent_after_ms,
        )


def monotonic_ms() -> int:
    """The clock of the stream state, in ms."""
    return time.monotonic_ns() // 1_000_000


def now_ms() -> int:
    """Wall clock in ms since the Unix epoch."""
    return time.time_ns() // 1_000_000
