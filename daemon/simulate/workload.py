"""What is asked of a simulated engine: prompts that share beginnings as real ones do.

A prompt is a chain of full blocks, each standing for its tokens by one number. Prompts are one-shot questions under a
shared system prompt, chats that come back with all that was said before, and agents whose chain grows for long.
"""

from __future__ import annotations

from random import Random

import msgspec

from .chains import Identity

_SYSTEM_BLOCKS = (2, 10)
_CONTENTS = 1 << 20


class WorkloadOptions(msgspec.Struct, frozen=True):
    """How many of what: `adapters` of LoRA and `tenants` with a cache salt beside the base model and no salt."""

    system_prompts: int = 4
    open_chats: int = 8
    agents: int = 2
    adapters: int = 2
    tenants: int = 1
    turn_blocks_max: int = 4
    chain_blocks_max: int = 40


class Request(msgspec.Struct, frozen=True):
    """A prompt and what the engine will answer: the contents of their blocks, in order."""

    identity: Identity
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class _Conversation:
    def __init__(self, identity: Identity, said: tuple[int, ...], turn_blocks_max: int) -> None:
        self.identity = identity
        self.said = said
        self.turn_blocks_max = turn_blocks_max


class Workload:
    """An endless sequence of requests, the same for the same seed."""

    def __init__(self, options: WorkloadOptions, random: Random) -> None:
        self._options = options
        self._random = random
        shared = Random(0)
        self._systems = [
            tuple(shared.randrange(_CONTENTS) for _ in range(shared.randint(*_SYSTEM_BLOCKS)))
            for _ in range(options.system_prompts)
        ]
        self._chats: list[_Conversation] = []
        self._agents: list[_Conversation] = []

    def next_request(self) -> Request:
        """The next one."""
        kind = self._random.random()
        if kind < 0.45:
            return self._turn(self._chats, self._options.open_chats, self._options.turn_blocks_max)
        if kind < 0.6:
            return self._turn(self._agents, self._options.agents, 2 * self._options.turn_blocks_max)
        return Request(self._identity(), self._system() + self._blocks(4), self._blocks(2))

    def _turn(self, going_on: list[_Conversation], most: int, turn_blocks_max: int) -> Request:
        if len(going_on) < most or self._random.random() < 0.1:
            going_on.append(_Conversation(self._identity(), self._system(), turn_blocks_max))
        one = self._random.choice(going_on)
        prompt = one.said + self._blocks(one.turn_blocks_max)
        answer = self._blocks(one.turn_blocks_max)
        one.said = prompt + answer
        if len(one.said) > self._options.chain_blocks_max or len(going_on) > most:
            going_on.remove(one)
        return Request(one.identity, prompt, answer)

    def _identity(self) -> Identity:
        adapter = self._random.randint(0, self._options.adapters) if self._random.random() < 0.3 else 0
        tenant = self._random.randint(0, self._options.tenants) if self._random.random() < 0.3 else 0
        return Identity(adapter, f"tenant-{tenant}" if tenant else "")

    def _system(self) -> tuple[int, ...]:
        return self._random.choice(self._systems)

    def _blocks(self, most: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(_CONTENTS) for _ in range(self._random.randint(1, most)))
