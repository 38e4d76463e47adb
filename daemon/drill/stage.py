"""Carries a plan out: engines publish, faults happen, and in the end the daemon is held to the truth."""

from __future__ import annotations

import http.client
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from random import Random

import msgspec

from kvcensus.backends.lmdb.files import INDEX_FILE

from ..config import Config, OnFence
from ..recording import RecordedMessage
from ..simulate.engine import SimulatedRank, Truth
from .daemon import DaemonFailed, DaemonUnderTest
from .faults import ABOUT, Excuse, Fault
from .lies import lie
from .machine import full_disk, pinned_index
from .oracle import Outcome, WorkerReport, compare, index_of
from .plan import Plan, Step
from .target import Target, toml_text

_SUBSCRIBED_S = 15.0
_POLL_S = 0.02
_LAST_MESSAGES = 5
_FREEZE_FACTOR = 60
_PARTITION_FACTOR = 30
_CLOCK_JUMP_S = 5 * 3600.0
_LITTLE_ROOM = 256 << 10
_LEAST_MAP = 1 << 20
_FULL_WITHIN_S = 15.0
_FULL_SAID = "nothing can be written"


class Sent(msgspec.Struct):
    """What one engine made, and what it put on its live socket."""

    made: list[RecordedMessage] = []
    live: list[RecordedMessage] = []


class Result(msgspec.Struct, frozen=True):
    """How a drill ended. `recovery_ms`: from the last fault to every worker's end; `problems` of the daemon itself."""

    seed: int
    injected: dict[str, int]
    found: dict[str, int]
    workers: list[WorkerReport]
    problems: list[str]
    recovery_ms: int
    seconds: float
    messages: int

    @property
    def passed(self) -> bool:
        """Whether nothing diverged."""
        bad = (Outcome.DIVERGED, Outcome.BEHIND)
        return not self.problems and not any(worker.outcome in bad for worker in self.workers)


class _Part:
    """One stream of the drill, and what was done to it."""

    def __init__(self, one: SimulatedRank) -> None:
        self.engine = one
        self.sent = Sent()
        self.excuses: set[Excuse] = set()
        self.lasting: dict[Fault, int] = {}

    def excuse(self, excuse: Excuse) -> None:
        if excuse is not Excuse.NONE:
            self.excuses.add(excuse)

    def publish(self, count: int, *, live: bool = True) -> list[RecordedMessage]:
        messages = self.engine.publish(count, live=live)
        self.sent.made += messages
        if live:
            self.sent.live += messages
        return messages

    def send(self, messages: list[RecordedMessage]) -> None:
        self.engine.send(messages)
        self.sent.live += messages


class Stage:
    """One drill. `directory` gets the configuration, the data and the log of the daemon."""

    def __init__(self, plan: Plan, target: Target, directory: Path, deadline_s: float) -> None:
        self._plan = plan
        self._deadline_s = deadline_s
        self._random = Random(f"stage {plan.seed}")
        self._target = target
        self._data_dir = Path(target.config.data_dir)
        self._config_path = directory / "kvcensus.toml"
        self._configure(target.config)
        self.daemon = DaemonUnderTest(self._config_path, directory / "daemon.log", target.port, target.link)
        sources = {source.name: source for source in target.config.sources}
        self._keeping: set[str] = set()
        self._parts: list[_Part] = []
        for engine in target.engines:
            for one in engine.ranks:
                part = _Part(one)
                if not sources[engine.name].replay_endpoint:
                    part.excuse(Excuse.UNTRUSTED)
                if sources[engine.name].on_fence is OnFence.KEEP:
                    self._keeping.add(one.worker_id)
                self._parts.append(part)
        self._always_excused = {number for number, part in enumerate(self._parts) if part.excuses}
        self._injected: Counter[str] = Counter()
        self._start_at = 0.0

    def sent(self) -> dict[str, Sent]:
        """By stream."""
        return {part.engine.stream: part.sent for part in self._parts}

    def run(self) -> Result:
        """Do all of it. Ends the daemon, not the engines."""
        began = time.monotonic()
        problems: list[str] = []
        reports: list[WorkerReport] = []
        ended = began
        try:
            self.daemon.start()
            self.daemon.wait_until_it_answers()
            for step in self._plan.steps:
                self._do(step)
            self._end_faults()
            ended = time.monotonic()
            reports = self._settle()
        except DaemonFailed as error:
            problems.append(str(error))
        now = time.monotonic()
        try:
            self.daemon.terminate()
        except DaemonFailed as error:
            problems.append(str(error))
        return Result(
            self._plan.seed,
            dict(self._injected),
            dict(self.daemon.found),
            reports,
            problems,
            int((now - ended) * 1000),
            round(time.monotonic() - began, 2),
            sum(len(part.sent.made) for part in self._parts),
        )

    def _do(self, step: Step) -> None:
        self._start_when_due()
        part = self._parts[step.stream]
        if step.fault is None:
            part.publish(step.count)
            time.sleep(step.ms / 1000)
        else:
            self._injected[step.fault] += 1
            part.excuse(ABOUT[step.fault].excuse)
            if ABOUT[step.fault].lasts:
                self._begin(part, step.fault, step.steps)
            else:
                getattr(self, "_" + step.fault.replace("-", "_"))(part, step)
        for one in self._parts:
            self._pass_step(one)

    def _begin(self, part: _Part, fault: Fault, steps: int) -> None:
        sockets = part.engine.sockets
        for other in list(part.lasting):
            self._end(part, other)
        part.lasting[fault] = steps
        if fault is Fault.MUTE:
            sockets.ask(lambda: sockets.set_mute(True))
        else:
            sockets.answer = lie(fault, Random(self._random.random()))

    def _end(self, part: _Part, fault: Fault) -> None:
        sockets = part.engine.sockets
        del part.lasting[fault]
        sockets.ask(sockets.make_honest)

    def _pass_step(self, part: _Part) -> None:
        for fault in list(part.lasting):
            part.lasting[fault] -= 1
            if part.lasting[fault] <= 0:
                self._end(part, fault)

    def _kill(self, part: _Part, step: Step) -> None:
        self.daemon.kill()
        self._start_after(step)

    def _term(self, part: _Part, step: Step) -> None:
        self.daemon.terminate()
        self._start_after(step)

    def _start_after(self, step: Step) -> None:
        if step.wait:
            self.daemon.start()
            self.daemon.wait_until_it_answers()
        else:
            self._start_at = time.monotonic() + step.ms / 1000

    def _start_when_due(self) -> None:
        if not self.daemon.runs and time.monotonic() >= self._start_at:
            self.daemon.start()

    def _freeze(self, part: _Part, step: Step) -> None:
        self.daemon.freeze()
        part.publish(step.count * _FREEZE_FACTOR)
        time.sleep(step.ms / 1000)
        self.daemon.thaw()

    def _restart(self, part: _Part, step: Step) -> None:
        part.publish(step.count)
        part.engine.restart(while_down=lambda: time.sleep(step.ms / 1000))
        self._new_life(part)

    def _overtake(self, part: _Part, step: Step) -> None:
        """The daemon is down or has lost the engine meanwhile; either way it sees the new life late."""
        last_seq = part.engine.truth().last_seq
        if step.wait:
            self.daemon.kill()
        part.engine.restart()
        sockets = part.engine.sockets
        sockets.ask(sockets.take_down)
        part.publish(last_seq + 1 + self._random.choice((-1, 0, 1, step.count)))
        sockets.ask(sockets.bring_up)
        self._new_life(part)
        self._start_at = 0.0

    def _reset(self, part: _Part, step: Step) -> None:
        part.engine.reset()
        if not part.lasting:
            self._new_life(part)

    def _new_life(self, part: _Part) -> None:
        """What was done to the life before excuses nothing any more."""
        part.excuses.clear()
        if self._parts.index(part) in self._always_excused:
            part.excuse(Excuse.UNTRUSTED)
        for fault in part.lasting:
            part.excuse(ABOUT[fault].excuse)

    def _lose_ring(self, part: _Part, step: Step) -> None:
        sockets = part.engine.sockets
        sockets.ask(sockets.buffer.clear)

    def _drop(self, part: _Part, step: Step) -> None:
        part.publish(step.count, live=False)

    def _unpublished(self, part: _Part, step: Step) -> None:
        part.engine.lose_message()

    def _duplicate(self, part: _Part, step: Step) -> None:
        seq = part.engine.truth().last_seq
        part.send([one for one in part.engine.sockets.buffer if one.seq is not None and one.seq > seq - step.count])

    def _reorder(self, part: _Part, step: Step) -> None:
        messages = part.publish(1 + step.count, live=False)
        self._random.shuffle(messages)
        part.send(messages)

    def _malform(self, part: _Part, step: Step) -> None:
        (message,) = part.publish(1, live=False)
        topic, seq, payload = message.frames
        frames = self._random.choice([(topic, seq), (topic, seq[:4], payload), (seq,), (topic, seq, payload, b"")])
        part.send([RecordedMessage(message.received_ns, frames)])

    def _corrupt(self, part: _Part, step: Step) -> None:
        """Never so that it could still be read as something else: nobody could tell that from the truth."""
        (message,) = part.publish(1, live=False)
        topic, seq, payload = message.frames
        damaged = self._random.choice(
            [payload[: len(payload) // 2], b"", b"\xc1" + payload[1:], payload.replace(b"Block", b"Blurb")]
        )
        part.send([RecordedMessage(message.received_ns, (topic, seq, damaged))])

    def _disconnect(self, part: _Part, step: Step) -> None:
        self._down(part, step, replay=False)

    def _outage(self, part: _Part, step: Step) -> None:
        self._down(part, step, replay=True)

    def _down(self, part: _Part, step: Step, *, replay: bool) -> None:
        sockets = part.engine.sockets
        sockets.ask(lambda: sockets.take_down(replay=replay))
        part.publish(step.count, live=False)
        time.sleep(step.ms / 1000)
        sockets.ask(sockets.bring_up)

    def _clock(self, part: _Part, step: Step) -> None:
        part.engine.rank.clock_ahead_s = self._random.choice((-1, 0, 1)) * _CLOCK_JUMP_S

    def _full_map(self, part: _Part, step: Step) -> None:
        """Then it is started again with the room it had before, as somebody would who read its log."""
        self.daemon.terminate()
        index = self._target.config.index
        room = (self._data_dir / INDEX_FILE).stat().st_size + _LITTLE_ROOM
        small = msgspec.structs.replace(index, map_size_bytes=min(index.map_size_bytes, max(_LEAST_MAP, room)))
        self._configure(msgspec.structs.replace(self._target.config, index=small))
        self.daemon.start()
        self.daemon.wait_until_it_answers()
        with pinned_index(self._data_dir):
            self._publish_until_full(part, step)
        self.daemon.kill()
        self._configure(self._target.config)
        self.daemon.start()
        self.daemon.wait_until_it_answers()

    def _full_disk(self, part: _Part, step: Step) -> None:
        """It may be killed while there is no room; either way it goes on by itself once there is."""
        if not self.daemon.runs:
            self.daemon.start()
        self.daemon.wait_until_it_answers()
        with full_disk(self._data_dir):
            with pinned_index(self._data_dir) if self._target.config.backend == "lmdb" else nullcontext():
                self._publish_until_full(part, step)
            if not step.wait:
                self.daemon.kill()

    def _publish_until_full(self, part: _Part, step: Step) -> None:
        deadline = time.monotonic() + _FULL_WITHIN_S
        while time.monotonic() < deadline:
            part.publish(step.count)
            time.sleep(_POLL_S)
            ready, said = self.daemon.readiness()
            if not ready:
                if _FULL_SAID not in said:
                    raise DaemonFailed(f"without room the daemon said {said}")
                return
        raise DaemonFailed(f"without room the daemon was ready for {_FULL_WITHIN_S:g} s")

    def _partition(self, part: _Part, step: Step) -> None:
        """A link that is down for longer than a replay is waited for cannot be told from a mute replay socket."""
        for every in self._parts:
            every.excuses.add(Excuse.UNTRUSTED)
        self._target.link.cut()
        part.publish(step.count * _PARTITION_FACTOR)
        time.sleep(_PARTITION_FACTOR * step.ms / 1000)
        self._target.link.heal()

    def _configure(self, config: Config) -> None:
        self._config_path.write_text(toml_text(config))

    def _end_faults(self) -> None:
        for part in self._parts:
            for fault in list(part.lasting):
                self._end(part, fault)

    def _settle(self) -> list[WorkerReport]:
        """A little more of the usual, then wait until the daemon is where the engines are and agrees with them."""
        if not self.daemon.runs:
            self.daemon.start()
        self.daemon.wait_until_it_answers()
        for part in self._parts:
            if not part.engine.sockets.wait_subscribers(1, _SUBSCRIBED_S):
                raise DaemonFailed(f"the daemon has not subscribed to {part.engine.stream} again")
        for _ in range(_LAST_MESSAGES):
            for part in self._parts:
                part.publish(1)
            time.sleep(_POLL_S)
        truths = [part.engine.truth() for part in self._parts]
        deadline = time.monotonic() + self._deadline_s
        while True:
            reports = self._compare(truths)
            over = all(one.outcome in (Outcome.EQUAL, Outcome.UNTRUSTED) for one in reports)
            if over or time.monotonic() > deadline:
                return reports
            time.sleep(_POLL_S)

    def _compare(self, truths: list[Truth]) -> list[WorkerReport]:
        assert self.daemon.runs
        excuses = {part.engine.worker_id: part.excuses for part in self._parts}
        try:
            streams = self.daemon.streams()
            return compare(truths, streams, index_of(self.daemon.snapshot()), excuses, keeping=self._keeping)
        except (OSError, http.client.HTTPException) as error:
            return [WorkerReport("", Outcome.BEHIND, f"the daemon does not answer: {error}")]
