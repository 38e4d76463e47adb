"""One rank of a simulated engine: a block manager at work, its events as one numbered stream. Pure and seeded."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import msgspec

from ..recording import RecordedMessage
from .cache import Allocation, BlockCache, CacheOptions, Cleared, Event, Held, Removed, Stored
from .chains import Identity, chain_hashes
from .wire import FORMATS, Wire, index_bytes
from .workload import Workload, WorkloadOptions

_RUNNING_MAX = 4
_STEP_BLOCKS_MAX = 6
_STEPS_MAX = 10_000
"""Steps without a single event before something is wrong: even an idle cache reports what it offloads."""


class RankOptions(msgspec.Struct, frozen=True):
    """What one rank is. `hash_bytes` 0: integer hashes. `offload_share` of steps copy blocks to the CPU tier.

    `clear_every` is in messages, on average; 0: never.
    """

    form: str = "vllm-0.32"
    hash_bytes: int = 0
    cache: CacheOptions = CacheOptions()
    workload: WorkloadOptions = WorkloadOptions()
    offload_share: float = 0.5
    clear_every: int = 0
    topic: str = ""


class _Running:
    def __init__(self, identity: Identity, contents: tuple[int, ...], hashes: list[bytes]) -> None:
        self.identity = identity
        self.contents = contents
        self.hashes = hashes
        self.allocation = Allocation()
        self.done = 0


class Rank:
    """Makes the messages of a stream. `last_seq` is that of the last one, -1 before the first of a life.

    `held` is what the engine truly holds after that message. `clock` gives seconds since the Unix epoch.
    """

    def __init__(self, options: RankOptions, rank: int, seed: int, clock: Callable[[], float] = time.time) -> None:
        form = FORMATS[options.form]
        cache = options.cache
        self._options = msgspec.structs.replace(
            options,
            cache=msgspec.structs.replace(
                cache,
                cpu_blocks=cache.cpu_blocks if form.has_tiers else 0,
                window_blocks=cache.window_blocks if form.has_groups else 0,
                copies=cache.copies and not form.sglang,
            ),
        )
        self._form = form
        self._clock = clock
        self._random = Random(f"{seed}/{rank}")
        self._workload = Workload(options.workload, self._random)
        self._wire = Wire(form, rank, options.hash_bytes)
        self._topic = options.topic.encode()
        self.clock_ahead_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self.cache = BlockCache(self._options.cache)
        self.last_seq = -1
        self._running: list[_Running] = []
        if self._form.sglang:
            self.cache.events.append(Cleared())

    def held(self) -> Held:
        """The true state."""
        return self.cache.held()

    def restart(self) -> None:
        """The engine's process ends and starts again: an empty cache, numbers from 0."""
        self._begin()

    def next_message(self) -> RecordedMessage:
        """Work until there is something to report, and report it."""
        return self.message(self.last_seq + 1, self._next_events())

    def lose_message(self) -> None:
        """Work likewise, and fail to encode the report: its number is used up and nothing is published."""
        self._next_events()
        self.last_seq += 1

    def message(self, seq: int, events: list[Event]) -> RecordedMessage:
        """The message of a number."""
        self.last_seq = seq
        now = self._clock() + self.clock_ahead_s
        payload = self._wire.batch(now, events)
        return RecordedMessage(int(now * 1e9), (self._topic, seq.to_bytes(8, "big"), payload))

    def _next_events(self) -> list[Event]:
        events = self.cache.events
        for _ in range(_STEPS_MAX):
            if events:
                break
            self._step()
        self.cache.events = []
        return _merged(events) if self._form.sglang else events

    def _step(self) -> None:
        """One step of the scheduler: admit a request, compute a part of each, end some."""
        every = self._options.clear_every
        if every and self._random.random() < 1 / every:
            self._clear()
            return
        if len(self._running) < _RUNNING_MAX:
            for _ in range(self._random.randint(1, 2)):
                self._admit()
        for request in list(self._running):
            self._advance(request)
        self._offload()

    def _clear(self) -> None:
        for request in list(self._running):
            self._finish(request)
        self.cache.clear()

    def _admit(self) -> None:
        request = self._workload.next_request()
        identity = Identity(
            request.identity.adapter if self._form.has_adapters else 0,
            request.identity.salt if self._form.has_salt else "",
        )
        contents = request.prompt + request.answer
        hashes = chain_hashes(identity, contents, index_bytes(self._options.hash_bytes))
        running = _Running(identity, contents, hashes)
        running.done = self.cache.use_prefix(running.allocation, hashes)
        self._running.append(running)

    def _advance(self, request: _Running) -> None:
        upto = request.done + self._random.randint(1, _STEP_BLOCKS_MAX)
        hashes, contents = request.hashes[:upto], request.contents[:upto]
        if request.done >= len(request.hashes) or not self.cache.store(
            request.allocation, request.identity, hashes, contents, request.done
        ):
            self._finish(request)
            return
        request.done = len(hashes)

    def _finish(self, request: _Running) -> None:
        self.cache.release(request.allocation)
        self._running.remove(request)

    def _offload(self) -> None:
        """Together with a store of the device, as a connector reports in the step in which it learned of the blocks."""
        stored = [one for event in self.cache.events if isinstance(event, Stored) for one in event.hashes]
        if self._options.cache.cpu_blocks and stored and self._random.random() < self._options.offload_share:
            self.cache.offload(stored[: self._random.randint(1, len(stored))])


def _merged(events: list[Event]) -> list[Event]:
    """Removals of one tier that follow each other become one event, as SGLang has it."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Removed) and isinstance(last, Removed) and last.tier is event.tier:
            merged[-1] = Removed(last.hashes + event.hashes, event.tier)
        else:
            merged.append(event)
    return merged
