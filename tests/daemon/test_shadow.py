"""The shadow: equal to the index from the first moment, believed in nothing, and never in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
import structlog

from kvcensus.backends.errors import BackendFull
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ApplyResult, CacheResidency, Cursor, IdentityScope, WorkerMatch
from kvcensus.backends.registry import open_backend
from kvcensus.daemon.counters import Question
from kvcensus.daemon.frame_queue import Burst, FrameQueue
from kvcensus.daemon.moving.differing import differences
from kvcensus.daemon.moving.location import Content
from kvcensus.daemon.shadow import Shadow
from kvcensus.daemon.streams.verdicts import Apply, NewEpoch, Retire
from kvcensus.daemon.writer import Writer, WriterOptions
from tests.backends.building import block, store
from tests.captures_reader import load_capture

from .test_writer import followed

CAPTURE = load_capture("vllm-0.32.0-evict").messages
MANY = 1_000_000
"""Questions a second: as many as may be asked between two commits."""


def shadow_of(backend: IndexBackend, sample_per_s: int = MANY) -> Shadow:
    return Shadow(backend.name(), lambda: backend, sample_per_s)


def write(main: IndexBackend, shadow: Shadow, *, retire: bool = False) -> Writer:
    """A whole capture, some messages a commit."""
    queue = FrameQueue(10_000, 1 << 30)
    writer = Writer(main, queue, WriterOptions(commit_max_blocks=64), shadow=shadow)
    stream = followed()
    queue.put(Burst([(stream, NewEpoch(1, "first"))]))
    for start in range(0, len(CAPTURE), 10):
        queue.put(Burst([(stream, Apply(one.seq, [one.payload])) for one in CAPTURE[start : start + 10]]))
        writer._step()
    if retire:
        queue.put(Burst([(stream, Retire())]))
    queue.close()
    writer.run()
    assert writer.error is None
    return writer


def equal(a: IndexBackend, b: IndexBackend, folder: Path) -> bool:
    folder.mkdir(parents=True)
    left, right = (Content(one.snapshot, one.cursors(), one.holdings()) for one in (a, b))
    return not list(differences(left, right, folder, cursors=True))


class Forgetful(MemoryBackend):
    """Says of nothing that anybody holds it."""

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        return []

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        return [msgspec.structs.replace(one, blocks=one.blocks + 1) for one in super().match(scope, block_hashes)]


class Failing(MemoryBackend):
    """Fails at the given call."""

    def __init__(self, call: str, error: Exception) -> None:
        super().__init__()

        def fail(*_: object) -> NoReturn:
            raise error

        setattr(self, call, fail)


@pytest.mark.parametrize("name", ["memory", "filesystem", "lmdb"])
@pytest.mark.parametrize("retire", [False, True])
def test_it_has_what_the_index_has_and_answers_alike(name: str, retire: bool, tmp_path: Path) -> None:
    main, other = MemoryBackend(), open_backend(name, tmp_path / "data")
    shadow = shadow_of(other)
    shadow.begin(main)

    write(main, shadow, retire=retire)

    assert equal(main, other, tmp_path / "sorted")
    counters = shadow.counters
    assert (counters.following, counters.errors, counters.records) == (1, 0, len(main))
    assert counters.commits > 10
    assert min(counters.questions.values()) > 10
    assert set(counters.disagreements.values()) == {0}
    shadow.close()


def test_a_disagreement_is_counted_and_logged_with_the_block() -> None:
    main, shadow = MemoryBackend(), shadow_of(Forgetful())
    shadow.begin(main)
    with structlog.testing.capture_logs() as logged:
        write(main, shadow)

    counters = shadow.counters
    assert 0 < counters.disagreements[Question.LOCATE] <= counters.questions[Question.LOCATE]
    assert 0 < counters.disagreements[Question.MATCH] <= counters.questions[Question.MATCH]
    said = [line for line in logged if line["event"] == "shadow_disagrees"]
    assert len(said) == sum(counters.disagreements.values())
    hashes = {one.payload for one in CAPTURE}
    for line in said:
        assert any(bytes.fromhex(line["block_hash"]) in payload for payload in hashes)
        assert line["only_main"]
        assert bool(line["only_shadow"]) is (line["question"] == "match")
    assert counters.following == 1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("clear", RuntimeError("a bug")),
        ("apply", BackendFull("no room")),
        ("find", RuntimeError("a bug")),
        ("match", OSError("gone")),
        ("reclaim", RuntimeError("a bug")),
    ],
)
def test_whatever_fails_in_it_ends_it_and_nothing_else(call: str, error: Exception, tmp_path: Path) -> None:
    main, alone, other = MemoryBackend(), MemoryBackend(), Failing(call, error)
    main.apply([store(block(1), worker="other")])
    alone.apply([store(block(1), worker="other")])
    shadow = shadow_of(other)
    with structlog.testing.capture_logs() as logged:
        shadow.begin(main)
        shadow.reclaim(10)
        write(main, shadow)
    write(alone, shadow_of(MemoryBackend()))

    assert equal(main, alone, tmp_path / "sorted")
    assert (shadow.counters.following, shadow.counters.errors) == (0, 1)
    (line,) = [one for one in logged if one["event"] == "shadow_broken"]
    assert line["error"] == repr(error)
    shadow.close()


def test_one_that_cannot_be_opened_is_broken_from_the_start() -> None:
    def opener() -> IndexBackend:
        raise BackendFull("no room")

    main, shadow = MemoryBackend(), Shadow("lmdb", opener, 10)
    shadow.begin(main)
    write(main, shadow)
    shadow.close()
    assert (shadow.counters.following, shadow.counters.errors, shadow.counters.commits) == (0, 1, 0)
    assert len(main) > 0


def _ahead(one: IndexBackend) -> ApplyResult:
    return one.apply([store(block(1), worker="v")], [Cursor("v", 1, 7)])


def _cleared(one: IndexBackend) -> int:
    return one.clear_worker("w/0")


@pytest.mark.parametrize("change", [_ahead, _cleared, lambda one: one.apply([store(worker="z", rank=4)])])
def test_where_the_two_are_not_at_one_point_it_begins_anew(
    change: Callable[[IndexBackend], object], tmp_path: Path
) -> None:
    for number, changed in enumerate(("main", "shadow")):
        main, other = MemoryBackend(), MemoryBackend()
        first = shadow_of(other)
        first.begin(main)
        write(main, first)
        change(main if changed == "main" else other)
        again = shadow_of(other)
        with structlog.testing.capture_logs() as logged:
            again.begin(main)
        assert [line["event"] for line in logged] == ["shadow_copied"]
        assert equal(main, other, tmp_path / str(number))


def test_where_they_are_it_goes_on() -> None:
    main, other = MemoryBackend(), MemoryBackend()
    first = shadow_of(other)
    first.begin(main)
    write(main, first)
    with structlog.testing.capture_logs() as logged:
        shadow_of(other).begin(main)
    assert logged == []


def test_questions_are_no_more_than_were_asked_for() -> None:
    main, shadow = MemoryBackend(), shadow_of(MemoryBackend(), sample_per_s=0)
    shadow.begin(main)
    write(main, shadow)
    assert set(shadow.counters.questions.values()) == {0}
    assert shadow.counters.commits > 10
