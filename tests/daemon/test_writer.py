"""The writer: what it makes of verdicts, and what it commits when the store is full."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from kvcensus.backends.errors import BackendFull
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import ApplyResult, Cursor, Operation, StoreRun
from kvcensus.daemon import writer as writer_module
from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.frame_queue import Burst, FrameQueue
from kvcensus.daemon.status import Trust
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, Fence, NewEpoch, Retire, fingerprint
from kvcensus.daemon.writer import Writer, WriterOptions
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator


def payload(*events: dict[str, object], rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1_700_000_000.5, events, rank])


def stored(*hashes: int) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None,
        "token_ids": [0] * 16 * len(hashes),
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


CLEARED: dict[str, object] = {"type": "AllBlocksCleared"}


def followed(cursor: Cursor | None = None, **options: object) -> FollowedStream:
    translator = VllmTranslator(TranslatorOptions("w"))
    return FollowedStream(
        source="w",
        stream="w",
        rank=None,
        endpoint="",
        limits=StreamLimits(),
        translator=translator,
        cursor=cursor,
        **options,  # type: ignore[arg-type]
    )


def run(backend: MemoryBackend, stream: FollowedStream, *verdicts: Apply | NewEpoch | Fence | Retire) -> Writer:
    queue = FrameQueue(1000, 1 << 20)
    writer = Writer(backend, queue, WriterOptions())
    queue.put(Burst((stream, verdict) for verdict in verdicts))
    queue.close()
    writer.run()
    assert writer.error is None
    return writer


def test_messages_and_the_cursor_of_the_last_one_are_committed_together() -> None:
    backend, stream = MemoryBackend(), followed()
    last = payload(stored(2, 3))
    run(backend, stream, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]), Apply(1, [last]))
    cursor = backend.cursors()["w"]
    assert (cursor.epoch, cursor.seq, cursor.fingerprint) == (1, 1, fingerprint(last))
    assert (cursor.messages, cursor.blocks_stored, cursor.worker_id, cursor.rank) == (2, 3, "w/0", 0)
    assert len(backend) == 3
    assert stream.cursor == cursor


def test_a_new_epoch_clears_the_worker_and_counts_anew() -> None:
    backend, stream = MemoryBackend(), followed()
    run(backend, stream, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]))
    run(backend, stream, NewEpoch(2, "restart"), Apply(0, [payload(stored(9))]))
    cursor = backend.cursors()["w"]
    assert (cursor.epoch, cursor.messages, cursor.trust) == (2, 1, Trust.FRESH)
    assert {one.key.block_hash for one in backend.snapshot()} == {(9).to_bytes(8, "big")}


@pytest.mark.parametrize(("keeps", "left"), [(False, 1), (True, 2)])
def test_a_fence_marks_the_worker_and_drops_or_keeps_its_blocks(keeps: bool, left: int) -> None:
    backend, stream = MemoryBackend(), followed(keeps_fenced=keeps)
    run(
        backend,
        stream,
        NewEpoch(1, "first"),
        Apply(0, [payload(stored(1))]),
        Fence(4, "lost"),
        Apply(5, [payload(stored(2))]),
    )
    cursor = backend.cursors()["w"]
    assert (cursor.trust, cursor.reason, cursor.seq) == (Trust.UNTRUSTED, "lost", 5)
    assert len(backend) == left


def test_a_worker_that_comes_back_in_the_batch_in_which_it_left_is_kept() -> None:
    backend, left, back = MemoryBackend(), followed(), followed()
    run(backend, left, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]))
    queue = FrameQueue(1000, 1 << 20)
    queue.put(Burst([(left, Retire()), (back, NewEpoch(1, "first")), (back, Apply(0, [payload(stored(2))]))]))
    queue.close()
    Writer(backend, queue, WriterOptions()).run()
    assert {one.key.block_hash for one in backend.snapshot()} == {(2).to_bytes(8, "big")}
    assert backend.cursors() == {"w": back.cursor}


def test_the_rank_is_that_of_the_first_message_of_a_life() -> None:
    backend, stream = MemoryBackend(), followed()
    run(backend, stream, NewEpoch(1, "first"), Apply(0, [payload(stored(1), rank=None)]))
    assert stream.cursor.worker_id == "w"
    upgraded = [payload(stored(2), rank=0), payload(stored(3), rank=None)]
    run(backend, stream, NewEpoch(2, "restart"), Apply(0, upgraded))
    assert (stream.cursor.worker_id, stream.cursor.rank, stream.cursor.messages) == ("w/0", 0, 2)
    assert [(one.worker_id, one.key.block_hash[-1]) for one in backend.snapshot()] == [("w/0", 2)]
    assert "data-parallel rank is None, this stream's is 0" in stream.cursor.reason


class ForgetsNothing(MemoryBackend):
    """The process ends, or there is no room, before a cursor is dropped."""

    def forget_stream(self, stream: str) -> None:
        raise BackendFull("no room")


def test_the_cursor_of_a_worker_that_left_says_nothing_from_the_commit_on_in_which_its_blocks_go() -> None:
    backend, left = ForgetsNothing(), followed()
    run(backend, left, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]))
    run(backend, left, Retire())
    assert len(backend) == 0
    assert backend.cursors()["w"] == Cursor(stream="w", epoch=0, seq=-1, source="w")


def test_a_clear_by_the_engine_ends_the_mistrust() -> None:
    backend, stream = MemoryBackend(), followed()
    run(backend, stream, NewEpoch(1, "first"), Fence(4, "lost"), Apply(5, [payload(CLEARED, stored(2))]))
    assert backend.cursors()["w"].trust == Trust.FRESH


class FullAtFirst(MemoryBackend):
    """Has no room for stores until something is cleared; remembers what it held meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.meanwhile: list[tuple[int, Cursor]] = []

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        if self.full and any(isinstance(one, StoreRun) for one in operations):
            raise BackendFull("no room")
        result = super().apply(operations, cursors)
        if self.full:
            self.full = False
            self.meanwhile.append((len(self), self.cursors()["w"]))
        return result


def test_a_full_store_is_cleared_first_and_the_stream_would_begin_again_if_that_were_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_FULL_S", 0.0)
    backend, stream = FullAtFirst(), followed()
    run(backend, stream, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]), Fence(0, "lost"))
    backend.full = True
    writer = run(backend, stream, Apply(1, [payload(CLEARED)]), Apply(2, [payload(stored(7))]))
    ((held, cursor),) = backend.meanwhile
    assert held == 0
    assert (cursor.seq, cursor.messages, cursor.blocks_stored, cursor.fingerprint) == (-1, 0, 0, b"")
    assert (cursor.trust, cursor.reason) == (Trust.FRESH, "")
    cursor = backend.cursors()["w"]
    assert (cursor.seq, cursor.messages, cursor.blocks_stored) == (2, 3, 2)
    assert {one.key.block_hash for one in backend.snapshot()} == {(7).to_bytes(8, "big")}
    assert writer.upkeep.problem == ""


def test_a_full_store_keeps_no_cursor_of_a_worker_that_left_and_was_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_FULL_S", 0.0)
    backend, left, back = FullAtFirst(), followed(), followed()
    run(backend, left, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]))
    backend.full = True
    queue = FrameQueue(1000, 1 << 20)
    queue.put(Burst([(left, Retire()), (back, NewEpoch(1, "first")), (back, Apply(0, [payload(stored(2))]))]))
    queue.close()
    Writer(backend, queue, WriterOptions()).run()
    assert backend.meanwhile == [(0, Cursor(stream="w", epoch=0, seq=-1, source="w"))]
    assert backend.cursors() == {"w": back.cursor}


def test_a_bad_message_among_many_costs_only_itself_and_is_named() -> None:
    backend, stream = MemoryBackend(), followed()
    run(backend, stream, NewEpoch(1, "first"), Apply(0, [payload(stored(1))]))
    writer = run(backend, stream, Apply(1, [payload(stored(2)), b"nonsense", payload(stored(3, 4))]))
    assert len(backend) == 4
    assert backend.cursors()["w"] == stream.cursor
    assert (stream.cursor.seq, stream.cursor.messages, stream.cursor.blocks_stored) == (3, 4, 4)
    assert "message 2 was refused" in stream.cursor.reason
    assert stream.applied.messages == 4
    assert sum(stream.applied.rejections.values()) == 1
    assert writer.counters.blocks_stored == 3
