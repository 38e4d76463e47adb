"""What a stream makes of live messages, replays, restarts and silence. No socket, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import Cursor
from kvcensus.daemon.counters import IntakeCounters
from kvcensus.daemon.status import StreamState
from kvcensus.daemon.streams.state import RECENT_MESSAGES, Stream, StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, AskReplay, Fence, NewEpoch, StopReplay, Verdict, fingerprint

LIMITS = StreamLimits(replay_timeout_ms=1000, replay_attempts=3, hold_max_messages=5)


def body(seq: int, life: str = "a") -> bytes:
    return f"{life}{seq}".encode()


def cursor(seq: int, life: str = "a") -> Cursor:
    return Cursor(stream="s", epoch=4, seq=seq, fingerprint=fingerprint(body(seq, life)))


def stream(at: Cursor | None = None, *, replay: bool = True) -> Stream:
    limits = StreamLimits(
        replay=replay, replay_timeout_ms=1000, replay_attempts=3, hold_max_messages=5, settle_ms=500, probe_ms=10_000
    )
    return Stream(limits, IntakeCounters(), at)


def followed(upto: int) -> Stream:
    """A stream that is live, with messages 0 to `upto` applied."""
    s = stream()
    s.connected(0)
    s.replay_ended(0)
    for seq in range(upto + 1):
        assert s.live(seq, body(seq), 0) == [Apply(seq, [body(seq)])]
    return s


def kinds(verdicts: list[object]) -> list[str]:
    return [type(verdict).__name__ for verdict in verdicts]


def test_a_first_contact_asks_for_everything_the_engine_still_has() -> None:
    s = stream()
    assert s.state is StreamState.CONNECTING
    assert s.connected(0) == [AskReplay(0)]
    assert s.state is StreamState.REPLAYING
    assert s.replayed(0, body(0), 1) == [NewEpoch(1, "first message"), Apply(0, [body(0)])]
    assert s.replayed(1, body(1), 1) == [Apply(1, [body(1)])]
    assert s.replay_ended(2) == [StopReplay()]
    assert s.state is StreamState.LIVE
    assert s.live(2, body(2), 3) == [Apply(2, [body(2)])]


def test_a_history_that_does_not_reach_back_to_the_start_is_marked() -> None:
    s = stream()
    s.connected(0)
    verdicts = s.replayed(7, body(7), 1)
    assert kinds(verdicts) == ["NewEpoch", "Fence", "Apply"]
    assert verdicts[1].seq == 6


def test_a_restart_of_the_daemon_goes_on_after_the_cursor_when_the_engine_proves_its_identity() -> None:
    s = stream(cursor(41))
    assert s.connected(0) == [AskReplay(41)]
    assert s.replayed(41, body(41), 1) == []
    assert s.replayed(42, body(42), 1) == [Apply(42, [body(42)])]
    assert s.replay_ended(2) == [StopReplay()]
    assert s.epoch == 4


def test_another_payload_under_the_last_applied_number_is_another_life() -> None:
    s = stream(cursor(41))
    s.connected(0)
    assert kinds(s.replayed(41, body(41, "b"), 1)) == ["NewEpoch", "AskReplay"]
    assert s.replayed(0, body(0, "b"), 2) == [Apply(0, [body(0, "b")])]
    assert s.epoch == 5


def test_an_engine_that_has_not_yet_published_as_much_as_was_applied_is_another_life() -> None:
    s = stream(cursor(41))
    s.connected(0)
    verdicts = s.replay_ended(1)
    assert kinds(verdicts) == ["NewEpoch", "AskReplay"]
    assert verdicts[1] == AskReplay(0)


def test_a_ring_that_no_longer_reaches_back_fences_after_asking_again() -> None:
    s = stream(cursor(41))
    s.connected(0)
    assert s.replayed(50, body(50), 1) == [AskReplay(41)]
    assert s.replayed(50, body(50), 2) == [AskReplay(41)]
    verdicts = s.replayed(50, body(50), 3)
    assert kinds(verdicts) == ["Fence", "Apply"]
    assert verdicts[0].seq == 49


def test_live_messages_are_held_while_a_replay_runs_so_that_nothing_is_applied_out_of_order() -> None:
    s = followed(3)
    assert s.live(6, body(6), 10) == [AskReplay(3)]
    assert s.live(7, body(7), 11) == []
    assert s.held == 2
    assert s.replayed(3, body(3), 12) == []
    assert s.replayed(4, body(4), 12) == [Apply(4, [body(4)])]
    assert s.replayed(5, body(5), 12) == [Apply(5, [body(5)])]
    assert s.replay_ended(13) == [StopReplay(), Apply(6, [body(6)]), Apply(7, [body(7)])]


def test_what_a_replay_already_brought_is_not_applied_again_when_it_comes_live() -> None:
    s = followed(3)
    s.live(5, body(5), 10)
    for seq in (3, 4, 5, 6):
        s.replayed(seq, body(seq), 11)
    assert s.replay_ended(12) == [StopReplay()]
    assert s.live(6, body(6), 13) == []
    assert s.live(7, body(7), 14) == [Apply(7, [body(7)])]


def test_a_hole_in_the_replay_is_asked_for_again_and_then_given_up() -> None:
    s = followed(3)
    s.live(6, body(6), 10)
    s.replayed(3, body(3), 11)
    for attempt in range(2):
        assert s.replayed(5, body(5), 12 + attempt) == [AskReplay(3)]
        assert s.replayed(3, body(3), 12 + attempt) == []
    verdicts = s.replayed(5, body(5), 20)
    assert verdicts == [Fence(4, "the engine's replay has a hole"), Apply(5, [body(5)])]
    assert s.replay_ended(21) == [StopReplay(), Apply(6, [body(6)])]


def test_an_end_marker_does_not_prove_that_a_replay_was_complete() -> None:
    s = followed(3)
    s.live(6, body(6), 10)
    s.replayed(3, body(3), 11)
    assert s.replay_ended(12) == [StopReplay(), AskReplay(3)]


def test_a_mute_replay_socket_ends_in_a_fence_not_in_a_hang() -> None:
    s = followed(3)
    assert s.live(6, body(6), 10) == [AskReplay(3)]
    assert s.tick(900) == []
    assert s.tick(1010) == [AskReplay(3)]
    assert s.tick(2010) == [AskReplay(3)]
    assert s.tick(3010) == [StopReplay(), Fence(5, "the replay socket does not answer"), Apply(6, [body(6)])]
    assert s.live(7, body(7), 3011) == [Apply(7, [body(7)])]


def test_a_worker_of_which_nothing_is_believed_is_believed_again_once_a_replay_brings_all_of_its_life() -> None:
    s = stream()
    s.connected(0)
    for now in (1010, 2020, 3030):
        s.tick(now)
    assert s.epoch == 1
    s.disconnected(4000)
    s.connected(4001)
    assert kinds(s.replayed(0, body(0), 4002)) == ["NewEpoch", "Apply"]


def test_a_number_that_goes_backwards_is_a_restart_once_the_replay_says_so() -> None:
    s = followed(10)
    assert s.live(0, body(0, "b"), 10) == [AskReplay(10)]
    assert kinds(s.replay_ended(11)) == ["NewEpoch", "AskReplay"]
    assert s.replayed(0, body(0, "b"), 12) == [Apply(0, [body(0, "b")])]
    assert s.replayed(1, body(1, "b"), 12) == [Apply(1, [body(1, "b")])]
    assert s.replay_ended(13) == [StopReplay()]
    assert s.live(1, body(1, "b"), 14) == []
    assert s.live(2, body(2, "b"), 14) == [Apply(2, [body(2, "b")])]


def test_a_duplicated_live_message_is_dropped_without_asking() -> None:
    s = followed(5)
    assert s.live(5, body(5), 10) == []
    assert s.live(3, body(3), 10) == []
    assert s.live(6, body(6), 11) == [Apply(6, [body(6)])]


def test_a_held_message_that_comes_again_does_not_start_the_replay_again() -> None:
    s = stream(cursor(41))
    s.connected(0)
    for seq in (43, 44, 46):
        assert s.live(seq, body(seq), 1) == []
    for seq in (44, 43, 46):
        assert s.live(seq, body(seq), 2) == []
    assert s.held == 3
    assert s.live(44, body(44, life="b"), 3) == [AskReplay(41)]


def test_a_stray_old_message_is_not_a_restart_when_the_engine_still_knows_the_last_one() -> None:
    s = stream(cursor(41))
    s.connected(0)
    s.replayed(41, body(41), 1)
    s.replay_ended(1)
    s.live(42, body(42), 2)
    assert s.live(7, body(7), 3) == [AskReplay(42)]
    assert s.replayed(42, body(42), 4) == []
    assert s.replay_ended(5) == [StopReplay()]
    assert s.live(43, body(43), 6) == [Apply(43, [body(43)])]


def test_more_live_messages_than_can_be_held_are_fetched_again() -> None:
    s = followed(0)
    s.live(2, body(2), 1)
    for seq in range(3, 10):
        s.live(seq, body(seq), 2)
    assert s.held == 5
    s.replayed(0, body(0), 3)
    s.replayed(1, body(1), 3)
    verdicts = s.replay_ended(4)
    assert [v.seq for v in verdicts if isinstance(v, Apply)] == [2, 3, 4, 5, 6]
    assert s.live(10, body(10), 5) == [AskReplay(6)]


def test_a_reconnection_is_not_believed_to_be_continuous() -> None:
    s = followed(5)
    assert s.disconnected(10) == []
    assert s.state is StreamState.DISCONNECTED
    assert s.connected(20) == [AskReplay(5)]
    assert s.live(6, body(6), 21) == []
    s.replayed(5, body(5), 22)
    assert s.replay_ended(23) == [StopReplay(), Apply(6, [body(6)])]


def test_messages_held_before_a_disconnection_are_forgotten() -> None:
    s = followed(5)
    s.live(8, body(8), 10)
    assert s.disconnected(11) == [StopReplay()]
    assert s.held == 0


def test_an_idle_stream_is_probed_so_that_a_lost_last_message_is_found() -> None:
    s = followed(5)
    assert s.tick(9_000) == []
    assert s.tick(10_000) == [AskReplay(5)]
    assert s.state is StreamState.LIVE
    s.replayed(5, body(5), 10_050)
    assert s.replayed(6, body(6), 10_050) == [Apply(6, [body(6)])]
    assert s.replay_ended(10_051) == [StopReplay()]


def test_a_probe_does_not_hold_up_live_messages() -> None:
    s = followed(5)
    s.tick(10_000)
    assert s.live(6, body(6), 10_001) == [StopReplay(), Apply(6, [body(6)])]


def test_a_probe_that_nobody_answers_costs_nothing() -> None:
    s = followed(5)
    s.tick(10_000)
    for at in (11_000, 12_000):
        assert s.tick(at) == [AskReplay(5)]
    assert s.tick(13_000) == [StopReplay()]
    assert s.live(6, body(6), 13_001) == [Apply(6, [body(6)])]


def test_answers_of_an_abandoned_replay_are_ignored() -> None:
    s = followed(5)
    assert s.replayed(6, body(6), 1) == []
    assert s.replay_ended(1) == []


def test_without_a_replay_socket_the_first_message_begins_an_epoch() -> None:
    s = stream(replay=False)
    assert s.connected(0) == []
    assert s.live(0, body(0), 1) == [NewEpoch(1, "first message"), Apply(0, [body(0)])]


@pytest.mark.parametrize("seq", [43, 60])
def test_without_a_replay_socket_a_gap_or_an_unproved_continuity_fences(seq: int) -> None:
    s = stream(cursor(42), replay=False)
    s.connected(0)
    verdicts = s.live(seq, body(seq), 1)
    assert kinds(verdicts) == ["Fence", "Apply"]
    assert s.live(seq + 1, body(seq + 1), 2) == [Apply(seq + 1, [body(seq + 1)])]


def test_without_a_replay_socket_nothing_is_proven_between_a_connection_and_the_next_message() -> None:
    s = stream(cursor(42), replay=False)
    s.connected(0)
    assert not s.proven
    s.live(43, body(43), 1)
    assert s.proven
    s.disconnected(2)
    s.connected(3)
    assert not s.proven


def test_a_connection_made_before_the_former_one_is_lost_proves_nothing_either() -> None:
    """An engine that connects to us was restarted, and its old connection has not timed out yet."""
    s = stream(cursor(42), replay=False)
    s.connected(0)
    s.live(43, body(43), 1)
    s.connected(2)
    assert not s.proven
    assert kinds(s.live(44, body(44, "b"), 3)) == ["Fence", "Apply"]


def test_without_a_replay_socket_the_first_message_after_the_lease_begins_a_life() -> None:
    s = Stream(StreamLimits(replay=False, lease_ms=1_000), IntakeCounters())
    s.connected(0)
    s.live(0, body(0), 1)
    s.disconnected(2)
    assert kinds(s.tick(2_000)) == ["NewEpoch"]
    s.connected(3_000)
    assert s.live(0, body(0, "b"), 3_001) == [Apply(0, [body(0, "b")])]


def test_who_has_never_said_anything_has_been_missed_by_nobody() -> None:
    s = stream(replay=False)
    s.connected(0)
    assert s.proven


def test_without_a_replay_socket_a_number_that_goes_backwards_begins_an_epoch() -> None:
    s = stream(cursor(42), replay=False)
    s.connected(0)
    s.live(43, body(43), 1)
    assert kinds(s.live(0, body(0, "b"), 2)) == ["NewEpoch", "Apply"]
    assert s.epoch == 5


def leased(at: Cursor | None = None) -> Stream:
    return Stream(StreamLimits(lease_ms=60_000), IntakeCounters(), at)


def test_an_engine_that_is_gone_for_longer_than_its_lease_holds_nothing_any_more() -> None:
    s = leased(cursor(41))
    s.connected(0)
    s.replayed(41, body(41), 1)
    s.replay_ended(1)
    s.disconnected(1_000)
    assert s.tick(60_999) == []
    assert s.tick(61_000) == [NewEpoch(5, "the engine was gone for longer than its lease")]
    assert s.tick(200_000) == []
    assert s.state is StreamState.DISCONNECTED
    assert s.connected(200_001) == [AskReplay(0)]
    assert s.replayed(0, body(0), 200_002) == [Apply(0, [body(0)])]


def test_the_lease_of_an_engine_that_was_never_seen_runs_from_the_start_of_the_daemon() -> None:
    s = leased(cursor(41))
    assert s.tick(10) == []
    assert s.tick(60_009) == []
    assert kinds(s.tick(60_010)) == ["NewEpoch"]


def test_a_number_that_was_never_published_can_be_tolerated() -> None:
    counters = IntakeCounters()
    s = Stream(StreamLimits(replay_attempts=1, tolerate_holes=True), counters)
    s.connected(0)
    s.replayed(0, body(0), 1)
    s.replay_ended(1)
    assert s.live(2, body(2), 2) == [AskReplay(0)]
    assert s.replayed(0, body(0), 3) == []
    assert s.replayed(2, body(2), 3) == [Apply(2, [body(2)])]
    assert counters.unrecovered == 1


def test_what_a_replay_does_not_reach_back_to_is_not_tolerated() -> None:
    """The last applied message is not among the answers: the ring has gone on, and what it lost was published."""
    s = Stream(StreamLimits(replay_attempts=1, tolerate_holes=True), IntakeCounters())
    s.connected(0)
    s.replayed(0, body(0), 1)
    s.replay_ended(1)
    assert s.live(5, body(5), 2) == [AskReplay(0)]
    assert kinds(s.replayed(3, body(3), 3)) == ["Fence", "Apply"]


def test_a_hole_before_the_first_message_of_a_life_is_not_tolerated() -> None:
    s = Stream(StreamLimits(replay_attempts=1, tolerate_holes=True), IntakeCounters())
    s.connected(0)
    s.replay_ended(1)
    assert s.live(4, body(4), 2) == [AskReplay(0)]
    assert kinds(s.replayed(2, body(2), 3)) == ["Fence", "Apply"]


def test_an_answer_or_a_message_is_a_sign_of_life() -> None:
    s = followed(1)
    s.tick(20_000)
    s.replayed(1, body(1), 20_050)
    assert s.life_at_ms == 20_050
    s.replay_ended(20_060)
    assert s.life_at_ms == 20_060
    s.live(2, body(2), 20_070)
    assert s.life_at_ms == 20_070


def test_messages_held_of_a_former_life_do_not_follow_a_replay_of_the_new_one() -> None:
    s = stream()
    s.connected(0)
    s.live(4, body(4), 1)
    assert s.tick(1_100) == [AskReplay(0)]
    for seq in range(4):
        s.replayed(seq, body(seq, "b"), 1_200)
    assert s.replay_ended(1_300) == [StopReplay()]
    assert s.applied == 3


def flat(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts with each message on its own."""
    return [
        one
        for verdict in verdicts
        for one in (
            [Apply(seq, [payload]) for seq, payload in enumerate(verdict.payloads, verdict.seq)]
            if isinstance(verdict, Apply)
            else [verdict]
        )
    ]


STEPS = st.one_of(st.just(1), st.just(1), st.just(1), st.integers(-3, 3))
HAPPENINGS = st.one_of(
    st.lists(st.tuples(STEPS, st.sampled_from("aaab")), max_size=6),
    st.sampled_from(["connected", "disconnected", "replay_ended", "tick", "replayed"]),
)


@given(st.booleans(), st.lists(HAPPENINGS, max_size=12))
def test_a_burst_is_what_its_messages_are_one_by_one(replay: bool, happenings: list[object]) -> None:
    together, alone = stream(replay=replay), stream(replay=replay)
    now, seq = 0, -1
    for happening in happenings:
        now += 300
        if isinstance(happening, str):
            arguments = (max(seq, 0), body(max(seq, 0)), now) if happening == "replayed" else (now,)
            assert getattr(together, happening)(*arguments) == getattr(alone, happening)(*arguments)
            continue
        seqs: list[int] = []
        for step, _ in happening:
            seq = max(0, seq + step)
            seqs.append(seq)
        payloads = [body(at, life) for at, (_, life) in zip(seqs, happening)]
        expected = [verdict for at, payload in zip(seqs, payloads) for verdict in alone.live(at, payload, now)]
        assert flat(together.live_all(seqs, payloads, now)) == expected
        assert (together.applied, together.epoch, together.held) == (alone.applied, alone.epoch, alone.held)


def test_duplicates_are_known_of_many_messages_and_not_of_all() -> None:
    s = followed(-1)
    for first in range(0, 3 * RECENT_MESSAGES, 512):
        s.live_all([*range(first, first + 512)], [body(seq) for seq in range(first, first + 512)], 0)
    assert RECENT_MESSAGES <= len(s._recent) <= 2 * RECENT_MESSAGES
    early = s.applied - RECENT_MESSAGES + 1
    assert s.live(early, body(early), 1) == []
