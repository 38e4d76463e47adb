"""The stream state against a simulated engine that loses, repeats and swaps messages, restarts, and replays badly.

What must always hold: what has been applied since the last clear is one unbroken run of messages of one life of the
engine, and it begins with the first message of that life unless the worker was fenced. What must hold once the faults
stop: the run ends with the engine's last message.

KVCENSUS_STREAM_EXAMPLES=10000 makes it a nightly.
"""

from __future__ import annotations

import os
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcensus.backends.model import Cursor
from kvcensus.daemon.counters import IntakeCounters
from kvcensus.daemon.status import StreamState
from kvcensus.daemon.streams.state import Stream, StreamLimits
from kvcensus.daemon.streams.verdicts import Apply, AskReplay, Fence, NewEpoch, StopReplay, fingerprint

RING = 12
LIMITS = StreamLimits(
    replay_timeout_ms=1000, replay_attempts=3, hold_max_messages=6, settle_ms=500, probe_ms=10_000, lease_ms=25_000
)
END = -1


class StreamMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 0
        self.life = 0
        self.published: list[tuple[int, bytes]] = []
        self.next_seq = 0
        self.ring: deque[tuple[int, bytes]] = deque(maxlen=RING)
        self.wire: deque[object] = deque(["connected"])
        self.answers: deque[tuple[int, bytes]] | None = None
        self.mute = False
        self.lose_answers: set[int] = set()
        self.lose_end = False
        self.run: list[tuple[int, int]] = []
        self.complete = True
        self.excused = False
        self.stream = Stream(LIMITS, IntakeCounters())
        self.commit()

    # --- the engine

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            message = (self.next_seq, f"{self.life}:{self.next_seq}".encode())
            self.next_seq += 1
            self.published.append(message)
            if len(self.ring) == RING:
                self.excused = True
            self.ring.append(message)
            self.wire.append(message)

    @rule()
    def a_number_is_never_published(self) -> None:
        self.next_seq += 1
        self.excused = True

    @rule(kept=st.integers(0, 3), already=st.integers(0, 6))
    def restart(self, kept: int, already: int) -> None:
        """Some old messages are still on their way; the new life may publish before anybody reconnects."""
        self.wire = deque(list(self.wire)[:kept])
        self.wire.append("disconnected")
        self.life += 1
        self.next_seq = 0
        self.published = []
        self.ring.clear()
        if self.answers is not None:
            self.answers = deque()
        self.publish(already) if already else None
        self.wire = deque(event for event in self.wire if not (isinstance(event, tuple) and self.of_life(event)))
        self.wire.append("connected")

    def of_life(self, message: tuple[int, bytes]) -> bool:
        return message[1].startswith(f"{self.life}:".encode())

    # --- the transport

    @precondition(lambda self: any(isinstance(event, tuple) for event in self.wire))
    @rule(data=st.data(), fault=st.sampled_from(["lose", "repeat", "swap"]))
    def live_fault(self, data: st.DataObject, fault: str) -> None:
        places = [at for at, event in enumerate(self.wire) if isinstance(event, tuple)]
        at = data.draw(st.sampled_from(places))
        if fault == "lose":
            del self.wire[at]
        elif fault == "repeat":
            self.wire.insert(at, self.wire[at])
        elif at + 1 < len(self.wire) and isinstance(self.wire[at + 1], tuple):
            self.wire[at], self.wire[at + 1] = self.wire[at + 1], self.wire[at]

    @rule()
    def disconnection(self) -> None:
        self.wire = deque(["disconnected", "connected"])

    @rule(mute=st.booleans(), lost=st.sets(st.integers(0, RING), max_size=3), lose_end=st.booleans())
    def replay_faults(self, mute: bool, lost: set[int], lose_end: bool) -> None:
        self.mute, self.lose_answers, self.lose_end = mute, lost, lose_end
        if mute or lost or lose_end:
            self.excused = True

    # --- time and the daemon

    @rule(events=st.integers(1, 6))
    def receive_live(self, events: int) -> None:
        for _ in range(min(events, len(self.wire))):
            event = self.wire.popleft()
            if event == "connected":
                self.obey(self.stream.connected(self.now))
            elif event == "disconnected":
                self.obey(self.stream.disconnected(self.now))
            else:
                self.obey(self.stream.live(*event, self.now))

    @precondition(lambda self: self.answers)
    @rule(count=st.integers(1, 8))
    def receive_replay(self, count: int) -> None:
        for _ in range(count):
            if not self.answers:
                break
            seq, payload = self.answers.popleft()
            if seq == END:
                self.obey(self.stream.replay_ended(self.now))
            else:
                self.obey(self.stream.replayed(seq, payload, self.now))

    @rule(ms=st.sampled_from([10, 400, 1100, 11_000]))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        if self.answers and ms >= LIMITS.replay_timeout_ms:
            self.excused = True
        self.obey(self.stream.tick(self.now))

    @rule()
    def commit(self) -> None:
        stream = self.stream
        self.committed = (
            Cursor("s", stream.epoch, stream.applied, stream._current_fingerprint()),
            list(self.run),
            self.complete,
        )

    @rule()
    def the_daemon_is_killed_and_started_again(self) -> None:
        cursor, self.run, self.complete = self.committed[0], list(self.committed[1]), self.committed[2]
        self.stream = Stream(LIMITS, IntakeCounters(), cursor if cursor.epoch else None)
        self.answers = None
        self.wire = deque(["connected"])

    def obey(self, verdicts: list[object]) -> None:
        for verdict in verdicts:
            if isinstance(verdict, Apply):
                (payload,) = verdict.payloads
                life, seq = map(int, payload.split(b":"))
                assert seq == verdict.seq
                if self.run:
                    assert self.run[-1] == (life, seq - 1), "the run was broken"
                elif self.complete:
                    assert seq == 0, "a complete run must begin with the first message"
                self.run.append((life, seq))
            elif isinstance(verdict, NewEpoch):
                self.run, self.complete = [], True
            elif isinstance(verdict, Fence):
                self.run, self.complete = [], False
            elif isinstance(verdict, AskReplay):
                self.answer(verdict.start)
            elif isinstance(verdict, StopReplay):
                self.answers = None

    def answer(self, start: int) -> None:
        self.answers = deque()
        if self.mute or "disconnected" in self.wire:
            # The intake looks for lost connections before it reads any answer, so no new life is heard before that.
            return
        found = [message for message in self.ring if message[0] >= start]
        self.answers.extend(message for at, message in enumerate(found) if at not in self.lose_answers)
        if not self.lose_end:
            self.answers.append((END, b""))

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        if hasattr(self, "stream"):
            assert self.stream.held <= LIMITS.hold_max_messages

    def teardown(self) -> None:
        """The faults stop. Soon the stream is where the engine is."""
        if not hasattr(self, "stream"):
            return
        self.mute, self.lose_answers, self.lose_end = False, set(), False
        if not any(event == "connected" for event in self.wire) and not self.stream._connected:
            self.wire.append("connected")
        for _ in range(200):
            self.receive_live(100)
            self.receive_replay(100)
            self.time_passes(600)
        self.time_passes(11_000)
        for _ in range(20):
            self.receive_replay(100)
            self.time_passes(600)
        assert self.stream.state is StreamState.LIVE
        if self.published:
            last = self.published[-1][0]
            assert self.stream.applied == last, (self.stream.applied, last)
            if self.run:
                assert self.run[-1] == (self.life, last)
            if not self.excused:
                assert self.complete
                assert len(self.run) == last + 1


EXAMPLES = int(os.environ.get("KVCENSUS_STREAM_EXAMPLES", "300"))
StreamMachine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)
test_a_stream_never_lies_and_always_catches_up = StreamMachine.TestCase


def test_the_fingerprint_is_of_the_payload_alone() -> None:
    assert fingerprint(b"x") == fingerprint(bytearray(b"x")) != fingerprint(b"y")
    assert len(fingerprint(b"")) == 8
