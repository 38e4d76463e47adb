"""The thread that fills the spool: what the streams decide becomes records, in one transaction with their cursors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from kvcensus.backends.errors import BackendFull
from kvcensus.backends.model import Cursor

from ..followed import Followed, FollowedStream, now_ms
from ..frame_queue import Barrier, FrameQueue, Item
from ..logs import get_logger
from ..progress import Batched, Progress
from ..streams.delivery import Control
from ..streams.verdicts import Apply, Fence, NewEpoch
from .convention import Address
from .counters import DropCause, SpoolerCounters, StreamSpoolCounters
from .record import Position, Record
from .spool import Loss, Spool

_IDLE_WAIT_S = 0.2
_RETRY_FULL_S = 1.0
_LOG_EVERY_S = 10.0
_COMMIT_MAX_RECORDS = 1024
_COMMIT_MAX_BYTES = 1 << 20
"""A transaction takes what is queued, up to these: some milliseconds. More gains nothing, and needs more room."""

log = get_logger("spool")


class SpooledStream:
    """A followed stream, whose messages it carries, and what is counted of them."""

    def __init__(self, followed: FollowedStream, address: Address) -> None:
        self.followed = followed
        self.address = address
        self.counters = StreamSpoolCounters()


class Spooler(threading.Thread):
    """Moves the queue into the spool until the queue is closed and empty. It alone writes the spool."""

    def __init__(
        self,
        spool: Spool,
        queue: FrameQueue,
        streams: Mapping[str, SpooledStream],
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """`committed` is called from this thread after each commit that brought records."""
        super().__init__(name="spooler", daemon=True)
        self._spool = spool
        self._queue = queue
        self._streams = streams
        self._committed = committed
        self._acknowledged: tuple[int, Mapping[str, Position]] = (0, {})
        self._trimmed = 0
        self._abandon = False
        self._records: list[Record] = []
        self._bytes = 0
        self._progress = Batched()
        self._barriers: list[Barrier] = []
        self._unsaid: dict[tuple[str, DropCause], Loss] = {}
        self._said_s = 0.0
        self.counters = SpoolerCounters()
        self.error: BaseException | None = None
        self.full = ""
        self.beat_s = time.monotonic()
        """When it last was between two steps, or between two attempts at one."""

    def acknowledge(self, through: int, published: Mapping[str, Position]) -> None:
        """The bus has every record up to number `through`. Called by the publisher, which gives its map away."""
        self._acknowledged = (through, published)

    def follow(self, streams: Mapping[str, SpooledStream]) -> None:
        """These are the streams from now on. Nothing that others brought may be queued any more."""
        self._streams = streams

    def abandon(self) -> None:
        """Stop waiting for room: the deadline of a shutdown has passed."""
        self._abandon = True
        self._queue.close()

    def run(self) -> None:
        try:
            while not self._abandon and self._step():
                pass
            self._commit()
            self._say_losses(0.0)
        except BaseException as error:
            self.error = error
            log.critical("spooler_failed", error=repr(error), exc_info=True)
            self._queue.close()

    def _step(self) -> bool:
        """One transaction's worth of work. False when there will be no more."""
        self.beat_s = time.monotonic()
        items = self._queue.take(_IDLE_WAIT_S)
        if not items and self._queue.closed:
            return False
        while items:
            for item in items:
                self._gather(item)
            if self._is_much():
                break
            items = self._queue.take(0.0)
        self._commit()
        self._say_losses(_LOG_EVERY_S)
        return True

    def _gather(self, item: Item) -> None:
        stream, what = item
        if isinstance(what, Barrier):
            self._barriers.append(what)
            return
        progress = self._progress[stream]
        if isinstance(what, Apply):
            self._streams[stream.stream].counters.spooled += len(what.payloads)
            for seq, payload in enumerate(what.payloads, what.seq):
                if self._is_much() and not self._abandon:  # A burst may be larger than the file.
                    self._commit()
                    progress = self._progress[stream]
                progress.seq, progress.payload = seq, payload
                progress.messages += 1
                self._add(stream, progress, Control.NONE, payload)
        elif isinstance(what, NewEpoch):
            progress.epoch, progress.seq, progress.payload, progress.fingerprint = what.epoch, -1, None, b""
            progress.messages = 0
            self._add(stream, progress, Control.LIFE)
        elif isinstance(what, Fence):
            if what.seq != progress.seq:
                progress.seq, progress.payload, progress.fingerprint = what.seq, None, b""
            self._add(stream, progress, Control.FENCE)

    def _is_much(self) -> bool:
        return len(self._records) >= _COMMIT_MAX_RECORDS or self._bytes >= _COMMIT_MAX_BYTES

    def _add(self, stream: Followed, progress: Progress, control: Control, payload: bytes = b"") -> None:
        address = self._streams[stream.stream].address
        self._records.append(Record(address, progress.epoch, progress.seq, control, now_ms(), payload))
        self._bytes += len(payload)

    def _commit(self) -> None:
        cursors = {stream: progress.advanced() for stream, progress in self._progress.items()}
        acknowledged = self._acknowledged
        if cursors or acknowledged[0] > self._trimmed:
            if not self._write(list(cursors.values()), acknowledged):
                return
            self._trimmed = acknowledged[0]
        for stream, cursor in cursors.items():
            stream.cursor = cursor
        for barrier in self._barriers:
            barrier.committed.set()
        if self._records:
            self._committed()
        self._records, self._bytes, self._progress, self._barriers = [], 0, Batched(), []

    def _write(self, cursors: list[Cursor], acknowledged: tuple[int, Mapping[str, Position]]) -> bool:
        """Commit, making room for as long as it takes. False when told to stop meanwhile."""
        through, published = acknowledged
        while True:
            self.beat_s = time.monotonic()
            started = time.perf_counter()
            try:
                losses = self._spool.commit(self._records, cursors, through, published.items())
            except BackendFull as error:
                self.counters.commit_errors += 1
                if not self.full:
                    log.error("spool_full", detail=str(error))
                self.full = str(error)
                if self._abandon:
                    return False
                self._make_room()
                continue
            self.counters.commits += 1
            self.counters.commit_s.observe(time.perf_counter() - started)
            self._count(losses, DropCause.BOUND)
            if self.full:
                log.info("spool_has_room")
                self.full = ""
            return True

    def _make_room(self) -> None:
        """A file or disk without room: what the bus has, or the oldest records, give their pages to the newest ones."""
        for through in (self._acknowledged[0], 0):  # Forgetting much takes pages, too.
            with suppress(BackendFull):
                self._count(self._spool.make_room(through), DropCause.FULL)
                break
        self._say_losses(0.0)
        time.sleep(_RETRY_FULL_S)

    def _count(self, losses: list[Loss], cause: DropCause) -> None:
        for loss in losses:
            stream = self._streams.get(loss.stream)
            if stream is not None:
                stream.counters.dropped[cause] += loss.messages
            known = self._unsaid.setdefault((loss.stream, cause), Loss(loss.stream, 0, 0, 0, 0))
            known.messages += loss.messages
            known.bytes += loss.bytes
            known.epoch, known.seq = loss.epoch, loss.seq

    def _say_losses(self, quiet_s: float) -> None:
        if not self._unsaid or time.monotonic() - self._said_s < quiet_s:
            return
        self._said_s = time.monotonic()
        for (stream, cause), loss in self._unsaid.items():
            log.error(
                "messages_dropped",
                worker=stream,
                cause=cause,
                messages=loss.messages,
                bytes=loss.bytes,
                epoch=loss.epoch,
                seq=loss.seq,
                detail="the oldest in the spool, up to this number; whoever follows the bus fences this worker",
            )
        self._unsaid = {}
