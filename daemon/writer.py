"""The writer: the one thread that owns the backend.

It takes verdicts from the queue, translates their payloads, and applies what they come to together with the cursors of
their streams, many messages a transaction. A commit that finds no room, or no server, is tried again until it succeeds:
nothing is skipped, and the full queue stops the intake meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import msgspec

from kvcensus.backends.errors import BackendFull, BackendUnavailable
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import ApplyResult, ClearBlocks, Cursor, Operation, RemoveBlocks, StoreRun
from kvcensus.translators.translation import Rejection, RejectReason, Translation, worker_id_of

from .counters import WriterCounters
from .followed import Followed, now_ms
from .frame_queue import Advance, Barrier, FrameQueue, Item, Refuse
from .logs import get_logger
from .progress import Batched, Progress, never_followed
from .quarantine import Quarantine
from .shadow import Shadow
from .status import Trust
from .streams.verdicts import Apply, Fence, NewEpoch, Retire
from .upkeep import Upkeep

_IDLE_WAIT_S = 0.2
_RETRY_FULL_S = 1.0
_LOG_EVERY_S = 10.0

_HARMLESS = {RejectReason.MEDIUM}
"""Rejections that cannot leave a block in the index that the worker has dropped: none was ever stored there."""

log = get_logger("writer")


class WriterOptions(msgspec.Struct, frozen=True):
    """When a transaction closes: after so many blocks or so many ms. `reclaim_rows` are looked at in each idle step."""

    commit_max_blocks: int = 16_384
    commit_max_ms: int = 20
    reclaim_rows: int = 5_000


class Writer(threading.Thread):
    """Applies the queue to the backend until the queue is closed and empty."""

    def __init__(
        self,
        backend: IndexBackend,
        queue: FrameQueue,
        options: WriterOptions,
        quarantine: Quarantine | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._shadow = shadow
        self._quarantine = quarantine
        self._backend = backend
        self._queue = queue
        self._options = options
        self._abandon = False
        self._operations: list[Operation] = []
        self._progress = Batched()
        self._retired: list[Followed] = []
        self._barriers: list[Barrier] = []
        self._blocks = 0
        self._muffled: dict[tuple[str, str], tuple[float, int]] = {}
        self.counters = WriterCounters()
        self.error: BaseException | None = None
        self.upkeep = Upkeep(backend, options.reclaim_rows, shadow)
        self.beat_s = time.monotonic()
        """When it last was between two steps, or between two attempts at one."""

    def abandon(self) -> None:
        """Stop without applying what is still queued: the deadline of a shutdown has passed."""
        self._abandon = True
        self._queue.close()

    def run(self) -> None:
        try:
            while not self._abandon and self._step():
                pass
        except BaseException as error:
            self.error = error
            log.critical("writer_failed", error=repr(error), exc_info=True)
            self._queue.close()

    def _step(self) -> bool:
        """Gather one transaction's worth of work and commit it. False when there will be no more."""
        self.beat_s = time.monotonic()
        deadline = None
        wait_s = _IDLE_WAIT_S
        while True:
            items = self._queue.take(wait_s)
            self._gather(items)
            now = time.monotonic()
            if deadline is None:
                if not items:
                    if self._queue.closed:
                        return False
                    self.upkeep.step()
                    if self._quarantine is not None:
                        self._quarantine.flush()
                    return True
                deadline = now + self._options.commit_max_ms / 1000
            wait_s = deadline - now
            if self._blocks >= self._options.commit_max_blocks or wait_s <= 0 or self._barriers:
                break
        self._commit()
        if self.upkeep.is_due():
            self.upkeep.step()
        return True

    def _make_room(self) -> None:
        """Apply the clears of the batch that finds no room, and reclaim.

        The batch still has them: cleared twice is cleared once, and what was stored before a clear goes with it. Should
        the process end before the batch is applied, these streams begin again before their first message, with nothing
        to be mistrusted.
        """
        clears = [one for one in self._operations if isinstance(one, ClearBlocks) and one.tier is None]
        cleared = {clear.worker_id for clear in clears}
        cursors = [
            msgspec.structs.replace(
                stream.cursor,
                seq=-1,
                fingerprint=b"",
                messages=0,
                blocks_stored=0,
                blocks_removed=0,
                trust=Trust.FRESH,
                reason="",
                since_ms=now_ms(),
            )
            for stream in self._progress
            if stream.cursor.epoch and stream.cursor.worker_id in cleared
        ]
        try:
            if clears:
                self._backend.apply(clears, [*self._left(cursors), *cursors])
        except (BackendFull, BackendUnavailable):
            pass
        self.upkeep.make_room()

    def _gather(self, items: list[Item]) -> None:
        for stream, what in items:
            if isinstance(what, Apply):
                self._apply(stream, what)
            else:
                self._obey(stream, what)

    def _obey(self, stream: Followed, what: NewEpoch | Fence | Barrier | Retire | Advance | Refuse) -> None:
        if isinstance(what, NewEpoch):
            self._begin_epoch(stream, what)
        elif isinstance(what, Fence):
            self._fence(stream, what)
        elif isinstance(what, Barrier):
            self._barriers.append(what)
        elif isinstance(what, Retire):
            self._retire(stream)
        elif isinstance(what, Advance):
            progress = self._progress[stream]
            progress.seq, progress.life = what.position, what.life
        elif isinstance(what, Refuse):
            self._reject(stream, self._progress[stream], what.seq, what.payload, what.rejection)

    def _clear(self, progress: Progress) -> None:
        if progress.worker_id:
            self._operations.append(ClearBlocks(progress.worker_id))

    def _begin_epoch(self, stream: Followed, new: NewEpoch) -> None:
        progress = self._progress[stream]
        self._clear(progress)
        progress.epoch, progress.seq, progress.payload, progress.fingerprint = new.epoch, -1, None, b""
        progress.life = new.life
        progress.messages = progress.stored = progress.removed = progress.facts = 0
        progress.set_trust(Trust.FRESH, "")

    def _fence(self, stream: Followed, fence: Fence) -> None:
        progress = self._progress[stream]
        if not stream.keeps_fenced:
            self._clear(progress)
        if fence.seq != progress.seq:
            progress.seq, progress.payload, progress.fingerprint = fence.seq, None, b""
        progress.set_trust(Trust.UNTRUSTED, fence.reason)

    def _retire(self, stream: Followed) -> None:
        progress = self._progress[stream]
        del self._progress[stream]
        self._clear(progress)
        self._retired.append(stream)

    def _left(self, followed: Iterable[Cursor]) -> list[Cursor]:
        """What is committed of the retired streams before they are forgotten, but for those that are followed again."""
        again = {cursor.stream for cursor in followed}
        return [never_followed(stream.cursor) for stream in dict.fromkeys(self._retired) if stream.stream not in again]

    def _apply(self, stream: Followed, message: Apply) -> None:
        progress = self._progress[stream]
        payloads = message.payloads
        together = stream.translator.translate_all(payloads, progress.facts) if progress.worker_id else None
        if together is not None and together.translation.rank == progress.rank:
            self._take(stream, progress, together.translation)
            progress.engine_ms += together.times_ms
            progress.messages += len(payloads)
        else:
            for seq, payload in enumerate(payloads, message.seq):
                self._apply_one(stream, progress, seq, payload)
        progress.seq = message.after - 1
        progress.payload = payloads[-1]
        stream.applied.messages += len(payloads)
        self._blocks += len(payloads)

    def _apply_one(self, stream: Followed, progress: Progress, seq: int, payload: bytes) -> None:
        """A message that is not taken together with others: what is refused of it has its number."""
        translation = stream.translator.translate(payload, progress.facts)
        if translation.rank != progress.rank or not progress.worker_id or translation.rejections:
            self._check_rank(stream, progress, translation, payload)
        self._take(stream, progress, translation)
        progress.messages += 1
        if translation.engine_ms:
            progress.engine_ms.append(translation.engine_ms)
        for rejection in translation.rejections:
            self._reject(stream, progress, seq, payload, rejection)

    def _take(self, stream: Followed, progress: Progress, translation: Translation) -> None:
        """Put the operations of one or more messages on the batch."""
        operations, applied = translation.operations, stream.applied
        stored = sum([len(one.block_hashes) for one in operations if isinstance(one, StoreRun)])
        removed = sum([len(one.block_hashes) for one in operations if isinstance(one, RemoveBlocks)])
        progress.facts = translation.facts
        progress.stored += stored
        progress.removed += removed
        applied.blocks_stored += stored
        applied.blocks_removed += removed
        applied.events["stored"] += translation.stored_events
        applied.events["removed"] += translation.removed_events
        applied.events["cleared"] += translation.cleared_events
        if any(isinstance(one, ClearBlocks) and one.tier is None for one in operations):
            progress.set_trust(Trust.FRESH, "")
        self._blocks += stored + removed
        self._operations += operations

    def _check_rank(self, stream: Followed, progress: Progress, translation: Translation, payload: bytes) -> None:
        """A stream is of one rank: the configured one, or that of the first message of a life."""
        if not translation.operations and any(rejection.event is None for rejection in translation.rejections):
            return
        rank = translation.rank
        is_open = not progress.worker_id or (stream.rank is None and not progress.messages)
        if is_open and (stream.rank is None or rank == stream.rank):
            progress.rank = rank
            progress.worker_id = worker_id_of(stream.worker, rank)
        expected = stream.rank if stream.rank is not None else progress.rank
        if rank != expected:
            translation.operations.clear()
            translation.rejections.append(
                Rejection(
                    RejectReason.RANK,
                    f"data-parallel rank is {rank}, this stream's is {expected}",
                    field="data_parallel_rank",
                    raw=payload,
                )
            )

    def _reject(self, stream: Followed, progress: Progress, seq: int, payload: bytes, rejection: Rejection) -> None:
        stream.applied.rejections[rejection.reason] += 1
        if self._quarantine is not None:
            self._quarantine.add(stream, progress.rank, progress.epoch, seq, payload, rejection)
        if rejection.reason not in _HARMLESS and progress.trust != Trust.UNTRUSTED:
            progress.set_trust(Trust.UNTRUSTED, f"message {seq} was refused: {rejection.detail}"[:300])
        now = time.monotonic()
        key = (stream.stream, rejection.reason)
        quiet_until, muffled = self._muffled.get(key, (0.0, 0))
        if now < quiet_until:
            self._muffled[key] = (quiet_until, muffled + 1)
            return
        self._muffled[key] = (now + _LOG_EVERY_S, 0)
        log.warning(
            "event_refused" if rejection.event is not None else "message_refused",
            source=stream.source,
            stream=stream.stream,
            epoch=progress.epoch,
            seq=seq,
            reason=rejection.reason,
            field=rejection.field,
            detail=rejection.detail,
            not_logged=muffled,
        )

    def _commit(self) -> None:
        cursors = {stream: progress.advanced() for stream, progress in self._progress.items()}
        if self._quarantine is not None:
            # Before the cursors: a crash in between brings the same messages again, never loses one.
            self._quarantine.flush()
        started = time.perf_counter()
        left = self._left(cursors.values())
        result = self._apply_until_done([*left, *cursors.values()])
        if result is None:
            return
        gone = [cursor.stream for cursor in left]
        for name in gone:
            self._forget(name)
        self.counters.commits += 1
        self.counters.commit_s.observe(time.perf_counter() - started)
        self._count(result)
        committed_s = time.time()
        for stream, cursor in cursors.items():
            stream.cursor = cursor
            lags = [max(0.0, committed_s - engine_ms / 1000) for engine_ms in self._progress[stream].engine_ms]
            stream.applied.lag_s.observe_all(lags)
        for stream in self._retired:
            stream.left = True
        for barrier in self._barriers:
            barrier.committed.set()
        if self._shadow is not None:
            self._shadow.follow(self._operations, list(cursors.values()), gone)
            self._shadow.compare(self._backend)
        self._operations = []
        self._progress = Batched()
        self._retired = []
        self._barriers = []
        self._blocks = 0

    def _forget(self, stream: str) -> None:
        """What finds no room or no server stays, and goes at the next start as the cursor of an unconfigured stream."""
        try:
            self._backend.forget_stream(stream)
        except (BackendFull, BackendUnavailable) as error:
            log.warning("stream_not_forgotten", stream=stream, detail=str(error))

    def _apply_until_done(self, cursors: list[Cursor]) -> ApplyResult | None:
        """Apply the batch, waiting for room or for the server as long as it takes. None when told to stop meanwhile."""
        while True:
            self.beat_s = time.monotonic()
            try:
                result = self._backend.apply(self._operations, cursors)
            except (BackendFull, BackendUnavailable) as error:
                self.counters.commit_errors += 1
                self.upkeep.cannot_write(error)
                if self._abandon:
                    return None
                if isinstance(error, BackendFull):
                    self._make_room()
                time.sleep(_RETRY_FULL_S)
                continue
            self.upkeep.can_write()
            return result

    def _count(self, result: ApplyResult) -> None:
        counters = self.counters
        counters.blocks_stored += result.stored
        counters.copies_added += result.copies_added
        counters.refreshed += result.refreshed
        counters.blocks_removed += result.removed
        counters.copies_removed += result.copies_removed
        counters.unknown_removals += result.unknown_removals
        counters.blocks_cleared += result.cleared
