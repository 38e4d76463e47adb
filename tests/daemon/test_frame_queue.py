"""What goes to the writer: bursts, and the bounds of the queue."""

from __future__ import annotations

from kvcensus.daemon.followed import Followed, FollowedStream
from kvcensus.daemon.frame_queue import Burst, FrameQueue, Refuse
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, Fence, NewEpoch
from kvcensus.translators.translation import Rejection, RejectReason, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator


def followed(name: str) -> Followed:
    translator = VllmTranslator(TranslatorOptions(name))
    return FollowedStream(
        source=name, stream=name, rank=None, endpoint="", limits=StreamLimits(), translator=translator, cursor=None
    )


A, B = followed("a"), followed("b")


def test_messages_that_follow_one_another_become_one_item_whoever_comes_between() -> None:
    burst = Burst([(A, Apply(3, [b"3"])), (B, Apply(9, [b"nine"])), (A, Apply(4, [b"4", b"5"])), (B, Apply(10, [b""]))])
    assert burst.items == [(A, Apply(3, [b"3", b"4", b"5"])), (B, Apply(9, [b"nine", b""]))]
    assert (burst.messages, burst.payload_bytes) == (5, 7)


def test_nothing_is_joined_over_a_hole_an_epoch_or_a_fence() -> None:
    items = [
        (A, Apply(3, [b"x"])),
        (A, Apply(5, [b"x"])),
        (A, NewEpoch(2, "another life")),
        (A, Apply(6, [b"x"])),
        (A, Fence(6, "lost")),
        (A, Apply(7, [b"x"])),
    ]
    assert Burst(items).items == items


def test_what_is_refused_takes_room_too() -> None:
    refused = Refuse(-1, b"x" * 10_000, Rejection(RejectReason.PAYLOAD, "no batch"))
    assert Burst([(A, refused)]).size > 10_000


def test_a_queue_is_full_by_messages_or_by_bytes_however_few_its_items() -> None:
    queue = FrameQueue(4, 10_000)
    assert queue.offer(Burst([(A, Apply(0, [b"x"] * 3))]))
    assert queue.offer(Burst([(A, Apply(3, [b"x"]))]))
    assert queue.depth()[0] == 4
    assert not queue.offer(Burst([(A, Apply(4, [b"x"]))]))
    assert queue.take(0) == [(A, Apply(0, [b"x"] * 3))]
    assert queue.offer(Burst([(A, Apply(4, [b"x" * 10_000]))]))
    assert not queue.offer(Burst([(B, Apply(0, [b"x"]))]))
    assert [queue.take(0)[0][1].seq for _ in range(2)] == [3, 4]  # type: ignore[union-attr]
    assert queue.depth() == (0, 0)
