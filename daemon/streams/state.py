"""The state of one stream of one publisher and rank. See the package for the theory.

Times are monotonic milliseconds given by the caller. Every method returns verdicts, to be carried out in order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import islice
from operator import itemgetter

import msgspec

from kvcensus.backends.model import Cursor

from ..counters import IntakeCounters
from ..status import StreamState, Trust
from .verdicts import Apply, AskReplay, Fence, NewEpoch, StopReplay, Verdict, fingerprint

RECENT_MESSAGES = 8192
"""Messages remembered, and at times twice as many, to tell a duplicate from a restart. The overlap of a replay with
live messages fits."""


class StreamLimits(msgspec.Struct, frozen=True):
    """What a stream waits for and how long. `replay` False: there is no replay socket.

    `lease_ms` 0: a worker whose engine is gone is never cleared. `tolerate_holes`: go on past a number that the engine
    never published as if it had been empty.
    """

    replay: bool = True
    replay_timeout_ms: int = 5_000
    replay_attempts: int = 5
    hold_max_messages: int = 10_000
    settle_ms: int = 500
    probe_ms: int = 10_000
    lease_ms: int = 0
    tolerate_holes: bool = False


class _Replay:
    """One request to the replay socket and what it must show."""

    __slots__ = ("deadline_ms", "is_probe", "verify")

    def __init__(self, verify: bool, is_probe: bool, deadline_ms: int) -> None:
        self.verify = verify
        self.is_probe = is_probe
        self.deadline_ms = deadline_ms


class Stream:
    """Decides what each message of a stream is: the next one, a duplicate, a sign of a gap, or of a restart."""

    def __init__(self, limits: StreamLimits, counters: IntakeCounters, cursor: Cursor | None = None) -> None:
        self._limits = limits
        self._counters = counters
        self.epoch = cursor.epoch if cursor else 0
        self.applied = cursor.seq if cursor else -1
        self._fingerprint = cursor.fingerprint if cursor else b""
        self._last_payload: bytes | None = None
        self._last_live: int | None = None
        self._recent: dict[int, int] = {}
        self._held: deque[tuple[int, bytes]] = deque()
        self._replay: _Replay | None = None
        self._attempts = 0
        self._connected = False
        self._verified = False
        self._doubted = cursor is not None and cursor.trust == Trust.UNTRUSTED
        self._probe_at_ms = 0
        self._gone_at_ms: int | None = None
        self.life_at_ms = 0
        """When the publisher last gave a sign of life: a connection, a message or an answer."""

    @property
    def state(self) -> StreamState:
        """What the stream is doing. A probe of an idle stream does not show."""
        if not self._connected:
            return StreamState.CONNECTING if self.epoch == 0 else StreamState.DISCONNECTED
        if self._replay is not None and not self._replay.is_probe:
            return StreamState.REPLAYING
        return StreamState.LIVE

    @property
    def proven(self) -> bool:
        """Whether nothing can have been missed while it is live. Without a replay only the next message tells."""
        return self._limits.replay or self._verified or self.epoch == 0

    @property
    def expects_life(self) -> bool:
        """Whether a silent publisher would have been heard of: only its replay socket answers when it has no news."""
        return self._limits.replay

    @property
    def held(self) -> int:
        """Live messages waiting for the end of a replay."""
        return len(self._held)

    def connected(self, now_ms: int) -> list[Verdict]:
        """The live socket has reached the publisher."""
        self._connected = True
        self._verified = False
        self._gone_at_ms = None
        self.life_at_ms = now_ms
        self._counters.connected = 1
        self._last_live = None
        self._held.clear()
        self._attempts = 0
        if self._limits.replay:
            return self._ask(now_ms)
        return []

    def disconnected(self, now_ms: int) -> list[Verdict]:
        """The live socket has lost the publisher. What was held can be asked for again."""
        if not self._connected:
            return []
        self._connected = False
        self._gone_at_ms = now_ms
        self._verified = False
        self._counters.connected = 0
        self._counters.disconnects += 1
        self._last_live = None
        self._held.clear()
        return self._stop_replay()

    def live(self, seq: int, payload: bytes, now_ms: int) -> list[Verdict]:
        """A message of the live socket."""
        self.life_at_ms = now_ms
        verdicts: list[Verdict] = [] if self._connected else self.connected(now_ms)
        backwards = self._last_live is not None and seq <= self._last_live
        if backwards and (self._is_recent(seq, payload) or self._is_held(seq, payload)):
            self._counters.duplicates += 1
            return verdicts
        self._last_live = seq
        if self._replay is not None and self._replay.is_probe and not backwards and seq == self.applied + 1:
            verdicts += self._stop_replay()
        if self._replay is not None:
            if backwards:
                self._held.clear()
            self._hold(seq, payload)
            if backwards:
                self._attempts = 0
                verdicts += self._ask(now_ms)
            return verdicts
        self._probe_at_ms = now_ms + self._limits.probe_ms
        if not backwards and seq == self.applied + 1 and self._verified:
            verdicts.append(self._accept(seq, [payload]))
            return verdicts
        return verdicts + self._judge(seq, payload, now_ms)

    def live_all(self, seqs: list[int], payloads: list[bytes], now_ms: int) -> list[Verdict]:
        """Messages of the live socket: what `live` comes to for each in turn. The list of payloads is given away."""
        first = self.applied + 1
        undisturbed = self._connected and self._verified and self._replay is None
        forwards = self._last_live is None or self._last_live < first
        if seqs and undisturbed and forwards and seqs == [*range(first, first + len(seqs))]:
            self.life_at_ms = now_ms
            self._probe_at_ms = now_ms + self._limits.probe_ms
            self._last_live = seqs[-1]
            return [self._accept(first, payloads)]
        verdicts: list[Verdict] = []
        for seq, payload in zip(seqs, payloads):
            verdicts += self.live(seq, payload, now_ms)
        return verdicts

    def replayed(self, seq: int, payload: bytes, now_ms: int) -> list[Verdict]:
        """An answer of the replay socket to the last request."""
        replay = self._replay
        if replay is None:
            return []
        self.life_at_ms = now_ms
        replay.deadline_ms = now_ms + self._limits.replay_timeout_ms
        if replay.verify:
            if seq < self.applied:
                return []
            replay.verify = False
            if seq == self.applied:
                expected = self._current_fingerprint()
                if expected and fingerprint(payload) != expected:
                    return self._another_life("the engine's message of the last applied number is another one", now_ms)
                self._verified = True
                return []
            self._verified = False
            return self._hole(seq, payload, now_ms)
        if seq <= self.applied:
            self._counters.duplicates += 1
            return []
        if self.epoch == 0 or (self.applied < 0 and not self._verified):
            return self._first_of_history(seq, payload)
        if seq > self.applied + 1:
            return self._hole(seq, payload, now_ms)
        self._attempts = 0
        self._counters.replayed += 1
        return [self._accept(seq, [payload])]

    def replay_ended(self, now_ms: int) -> list[Verdict]:
        """The end marker of the last request. It proves nothing about completeness; the numbers do."""
        replay = self._replay
        if replay is None:
            return []
        self.life_at_ms = now_ms
        if replay.verify:
            return self._another_life("the engine no longer has the last applied message", now_ms)
        self._replay = None
        self._verified = True
        self._probe_at_ms = now_ms + (self._limits.probe_ms if replay.is_probe else self._limits.settle_ms)
        verdicts: list[Verdict] = [StopReplay()]
        if self.epoch == 0:
            verdicts.append(self._new_epoch("first contact"))
            self._verified = True
        return verdicts + self._release(now_ms)

    def tick(self, now_ms: int) -> list[Verdict]:
        """Time has passed. Call it at least every 100 ms or so."""
        replay = self._replay
        if not self._connected:
            return self._check_lease(now_ms)
        if replay is None:
            if self._limits.replay and 0 < self._probe_at_ms <= now_ms:
                return self._ask(now_ms, is_probe=True)
            return []
        if now_ms < replay.deadline_ms:
            return []
        self._counters.replay_failures += 1
        if self._attempts < self._limits.replay_attempts:
            return self._ask(now_ms, is_probe=replay.is_probe)
        return self._replay_failed(replay, now_ms)

    def _check_lease(self, now_ms: int) -> list[Verdict]:
        """An engine that is gone for longer than its lease holds nothing any more. If it comes back it starts over."""
        if self._gone_at_ms is None:
            self._gone_at_ms = now_ms
        if not self._limits.lease_ms or now_ms - self._gone_at_ms < self._limits.lease_ms or self.applied < 0:
            return []
        return [self._new_epoch("the engine was gone for longer than its lease")]

    def _replay_failed(self, replay: _Replay, now_ms: int) -> list[Verdict]:
        """The replay socket stays mute. Without it nothing proves that the blocks known so far are still right."""
        self._replay = None
        self._attempts = 0
        self._probe_at_ms = now_ms + self._limits.probe_ms
        verdicts: list[Verdict] = [StopReplay()]
        if replay.is_probe and self._verified and not self._held:
            return verdicts
        verdicts += self._start_over("the replay socket does not answer")
        return verdicts + self._release(now_ms)

    def _start_over(self, reason: str) -> list[Verdict]:
        """Stop believing what was applied, and go on with what is held."""
        following = self._held[0][0] if self._held else self.applied + 1
        verdicts: list[Verdict] = []
        if following <= self.applied:
            self._counters.restarts += 1
            verdicts.append(self._new_epoch(reason))
        self._verified = True
        return verdicts + self._fence_before(following, reason)

    def _judge(self, seq: int, payload: bytes, now_ms: int) -> list[Verdict]:
        """A live message that is not simply the next one of a verified stream."""
        if seq <= self.applied and self._is_recent(seq, payload):
            self._counters.duplicates += 1
            return []
        if seq > self.applied + 1 and self.applied >= 0:
            self._counters.gaps += 1
            self._counters.missing += seq - self.applied - 1
        if self._limits.replay:
            self._hold(seq, payload)
            return self._ask(now_ms)
        return self._judge_alone(seq, payload)

    def _judge_alone(self, seq: int, payload: bytes) -> list[Verdict]:
        """The same without a replay socket to ask: what cannot be proved is not believed."""
        verdicts: list[Verdict] = []
        if self.epoch == 0:
            verdicts.append(self._new_epoch("first message"))
        elif seq <= self.applied:
            self._counters.restarts += 1
            verdicts.append(self._new_epoch(f"sequence number went back from {self.applied} to {seq}"))
        elif seq == self.applied + 1 and seq > 0 and not self._verified:
            verdicts.append(self._fence(self.applied, "reconnected without a replay socket to prove continuity"))
        if seq > self.applied + 1:
            verdicts += self._fence_before(seq, "messages were missed and there is no replay socket")
        self._verified = True
        verdicts.append(self._accept(seq, [payload]))
        return verdicts

    def _first_of_history(self, seq: int, payload: bytes) -> list[Verdict]:
        """The first message of a life, as far as the replay reaches back."""
        verdicts: list[Verdict] = []
        if self.epoch == 0:
            verdicts.append(self._new_epoch("first message"))
        elif seq == 0 and self._doubted:
            verdicts.append(self._new_epoch("the replay brings all of a life of which nothing was believed"))
        if seq > 0:
            verdicts += self._fence_before(seq, "the engine's replay does not reach back to its start")
        self._verified = True
        self._attempts = 0
        self._counters.replayed += 1
        verdicts.append(self._accept(seq, [payload]))
        return verdicts

    def _hole(self, seq: int, payload: bytes, now_ms: int) -> list[Verdict]:
        """The replay goes on at `seq`, past the next number. Engines do lose messages of a replay: ask again first."""
        if self._attempts < self._limits.replay_attempts:
            return self._ask(now_ms)
        self._attempts = 0
        verdicts: list[Verdict] = []
        if self._limits.tolerate_holes and self._verified and self.applied >= 0:
            self._counters.unrecovered += seq - 1 - self.applied
        else:
            verdicts += self._fence_before(seq, "the engine's replay has a hole")
        self._verified = True
        return [*verdicts, self._accept(seq, [payload])]

    def _another_life(self, reason: str, now_ms: int) -> list[Verdict]:
        self._counters.restarts += 1
        self._attempts = 0
        verdict = self._new_epoch(reason)
        return [verdict, *self._ask(now_ms)]

    def _release(self, now_ms: int) -> list[Verdict]:
        """Let the held messages go, as far as they continue what was applied."""
        verdicts: list[Verdict] = []
        while self._held:
            seq, payload = self._held[0]
            if seq <= self.applied:
                differs = seq in self._recent and not self._is_recent(seq, payload)
                if differs and self._attempts < self._limits.replay_attempts:
                    return verdicts + self._ask(now_ms)
                self._counters.duplicates += 1
            elif seq == self.applied + 1:
                verdicts.append(self._accept(seq, [payload]))
            elif self._limits.replay and self._attempts < self._limits.replay_attempts:
                return verdicts + self._ask(now_ms)
            else:
                verdicts += self._fence_before(seq, "the engine's replay has a hole")
                continue
            self._held.popleft()
        self._attempts = 0
        self._counters.held = 0
        return verdicts

    def _ask(self, now_ms: int, *, is_probe: bool = False) -> list[Verdict]:
        if self.applied < 0:
            # Nothing proves a life: what is held may be of a former one. This replay brings all of the present one.
            self._held.clear()
        self._attempts += 1
        self._counters.replay_requests += 1
        self._replay = _Replay(self.applied >= 0, is_probe, now_ms + self._limits.replay_timeout_ms)
        return [AskReplay(max(self.applied, 0))]

    def _stop_replay(self) -> list[Verdict]:
        if self._replay is None:
            return []
        self._replay = None
        return [StopReplay()]

    def _hold(self, seq: int, payload: bytes) -> None:
        if len(self._held) >= self._limits.hold_max_messages:
            self._counters.held_dropped += 1
            return
        self._held.append((seq, payload))
        self._counters.held = len(self._held)

    def _accept(self, seq: int, payloads: list[bytes]) -> Apply:
        """Messages from this number on are applied."""
        self.applied = seq + len(payloads) - 1
        self._last_payload = payloads[-1]
        self._recent.update(enumerate(map(hash, payloads), seq))
        surplus = len(self._recent) - RECENT_MESSAGES
        if surplus > RECENT_MESSAGES:
            self._recent = dict(islice(self._recent.items(), surplus, None))
        return Apply(seq, payloads)

    def _is_held(self, seq: int, payload: bytes) -> bool:
        """What is held has ascending numbers: the first one that does not ascend empties it."""
        at = bisect_left(self._held, seq, key=itemgetter(0))
        return at < len(self._held) and self._held[at] == (seq, payload)

    def _is_recent(self, seq: int, payload: bytes) -> bool:
        return self._recent.get(seq) == hash(payload)

    def _current_fingerprint(self) -> bytes:
        return self._fingerprint if self._last_payload is None else fingerprint(self._last_payload)

    def _new_epoch(self, reason: str) -> NewEpoch:
        self.epoch += 1
        self.applied = -1
        self._last_payload = None
        self._fingerprint = b""
        self._recent.clear()
        self._verified = False
        self._doubted = False
        return NewEpoch(self.epoch, reason)

    def _fence_before(self, seq: int, reason: str) -> list[Verdict]:
        """Give up the numbers between the last applied one and `seq`."""
        verdicts: list[Verdict] = []
        if self.epoch == 0:
            verdicts.append(self._new_epoch("first message"))
            self._verified = True
        self._counters.unrecovered += max(0, seq - 1 - self.applied)
        verdicts.append(self._fence(seq - 1, reason))
        return verdicts

    def _fence(self, seq: int, reason: str) -> Fence:
        self._doubted = True
        if seq != self.applied:
            self.applied = seq
            self._last_payload = None
            self._fingerprint = b""
        return Fence(seq, reason)
