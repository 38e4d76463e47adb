"""A second backend that is driven by the same stream, and asked the same questions now and then.

The writer's thread applies to it what it has committed, and compares answers between two commits, when both have the
same content. Whatever goes wrong with the shadow ends the shadow, until the next start, and nothing else.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from operator import methodcaller

from kvcensus.backends.errors import BackendError
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import Cursor, IdentityScope, Operation, RemoveBlocks, StoreRun

from .counters import Question, ShadowCounters
from .logs import get_logger
from .moving.copying import copy
from .moving.location import Content

_RECENT_RUNS = 256
_MATCH_BLOCKS = 64
_PER_COMMIT = 16
"""Most questions between two commits: some milliseconds."""
_SHOWN = 4
"""Most of either side in a line of the log."""

log = get_logger("shadow")


class Shadow:
    """The second backend, which is opened when it begins. Used by one thread at a time; anybody reads `counters`."""

    def __init__(self, name: str, opener: Callable[[], IndexBackend], sample_per_s: int) -> None:
        self._opener = opener
        self._backend: IndexBackend | None = None
        self._rate = sample_per_s
        self._due = 0.0
        self._asked_s = time.monotonic()
        self._recent: deque[tuple[IdentityScope | None, tuple[bytes, ...]]] = deque(maxlen=_RECENT_RUNS)
        self._chance = random.Random()  # noqa: S311 - which blocks are asked for is no secret
        self.counters = ShadowCounters(name)

    def begin(self, main: IndexBackend) -> None:
        """Open the shadow and make it equal: it goes on if both stopped at one point, and is copied anew if not."""
        try:
            shadow = self._backend = self._opener()
            if not _at_one_point(main, shadow):
                started = time.monotonic()
                shadow.clear()
                for stream in shadow.cursors():
                    shadow.forget_stream(stream)
                copy(Content(main.snapshot, main.cursors(), main.holdings()), shadow, lambda records: None)
                seconds = round(time.monotonic() - started, 3)
                log.info("shadow_copied", backend=self.counters.backend, records=len(shadow), seconds=seconds)
        except Exception as error:  # noqa: BLE001 - a shadow never stops the daemon, whatever is wrong with it
            self._broken("begin", error)
            return
        self.counters.following = 1
        self.counters.records = len(shadow)

    def follow(self, operations: Sequence[Operation], cursors: Sequence[Cursor], forgotten: Sequence[str]) -> None:
        """Apply what the main backend has committed, and forget the streams that it has forgotten."""
        if not self.counters.following or self._backend is None:
            return
        started = time.perf_counter()
        try:
            self._backend.apply(operations, cursors)
            for stream in forgotten:
                self._backend.forget_stream(stream)
            self.counters.records = len(self._backend)
        except Exception as error:  # noqa: BLE001 - as above
            self._broken("apply", error)
            return
        self.counters.commits += 1
        self.counters.commit_s.observe(time.perf_counter() - started)
        for operation in operations[-_RECENT_RUNS:]:
            if isinstance(operation, StoreRun | RemoveBlocks) and operation.block_hashes:
                scope = operation.scope if isinstance(operation, StoreRun) else None
                self._recent.append((scope, operation.block_hashes))

    def reclaim(self, rows: int) -> None:
        """Let the shadow free space as the main backend does."""
        if self.counters.following and self._backend is not None:
            try:
                self._backend.reclaim(rows)
            except Exception as error:  # noqa: BLE001 - as above
                self._broken("reclaim", error)

    def compare(self, main: IndexBackend) -> None:
        """Ask both for blocks that were stored or removed of late. Nobody writes to either meanwhile."""
        now = time.monotonic()
        self._due = min(_PER_COMMIT, self._due + (now - self._asked_s) * self._rate)
        self._asked_s = now
        while self._due >= 1 and self._recent and self.counters.following:
            self._due -= 1
            scope, hashes = self._chance.choice(self._recent)
            at = self._chance.randrange(len(hashes))
            if self._chance.random() < 1 / 2:
                question, answer = Question.LOCATE, methodcaller("find", hashes[at])
            else:
                question, answer = Question.MATCH, methodcaller("match", scope, hashes[at : at + _MATCH_BLOCKS])
            self._ask(question, main, answer, hashes[at])

    def _ask(
        self, question: Question, main: IndexBackend, answer: Callable[[IndexBackend], list[object]], block: bytes
    ) -> None:
        """Compare one answer of both. The order of the holders of a block is not part of it."""
        assert self._backend is not None
        try:
            ours = answer(main)
        except BackendError:
            return  # what is wrong with the index is found, and told, elsewhere
        try:
            theirs = answer(self._backend)
        except Exception as error:  # noqa: BLE001 - as above
            self._broken(question, error)
            return
        self.counters.questions[question] += 1
        only_main = [one for one in ours if one not in theirs]
        only_shadow = [one for one in theirs if one not in ours]
        if only_main or only_shadow or len(ours) != len(theirs):
            self.counters.disagreements[question] += 1
            log.error(
                "shadow_disagrees",
                backend=self.counters.backend,
                question=question.value,
                block_hash=block.hex(),
                only_main=[repr(one) for one in only_main[:_SHOWN]],
                only_shadow=[repr(one) for one in only_shadow[:_SHOWN]],
            )

    def _broken(self, doing: str, error: Exception) -> None:
        self.counters.following = 0
        self.counters.errors += 1
        log.error(
            "shadow_broken",
            backend=self.counters.backend,
            doing=doing,
            error=repr(error),
            detail="it is not used any more, and made anew at the next start; the index is not concerned",
        )

    def close(self) -> None:
        """Release the shadow. The next start takes it up where the index is at the same point."""
        if self._backend is not None:
            try:
                self._backend.close()
            except Exception as error:  # noqa: BLE001 - as above
                self._broken("close", error)
            self._backend = None


def _at_one_point(a: IndexBackend, b: IndexBackend) -> bool:
    """Whether two backends that were fed by one daemon have the same content: places, counts and cursors are the same.

    With the counts: a worker that was dropped leaves no cursor.
    """
    return a.cursors() == b.cursors() and Counter(map(repr, a.holdings())) == Counter(map(repr, b.holdings()))
