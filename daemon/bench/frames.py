"""Synthetic messages in vLLM's present wire format: chains of blocks with random hashes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from struct import Struct

import msgspec

TOKENS_PER_BLOCK = 16
CHAIN_BLOCKS = 512
"""Blocks from the root to the end of a chain: a prompt of 8,192 tokens."""

_FIRST_MS = 1_700_000_000_000


class Workload(msgspec.Struct, frozen=True):
    """`messages` are payloads in order; `chains` are the block hashes of some chains, from the root."""

    blocks: int
    blocks_per_message: int
    messages: list[bytes]
    chains: list[list[bytes]]


def make_workload(blocks: int, blocks_per_message: int, seed: int = 1) -> Workload:
    """Messages that store `blocks` new blocks, `blocks_per_message` in each."""
    encode = msgspec.msgpack.Encoder().encode
    tokens = _token_runs(blocks_per_message, seed)
    messages = []
    chains: list[list[bytes]] = []
    chain: list[int] = []
    for start in range(0, blocks, blocks_per_message):
        if len(chain) + blocks_per_message > CHAIN_BLOCKS:
            if len(chains) < 2_000:
                chains.append([value.to_bytes(8, "big") for value in chain])
            chain = []
        hashes = list(Struct(f">{blocks_per_message}Q").unpack(os.urandom(8 * blocks_per_message)))
        event = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": chain[-1] if chain else None,
            "token_ids": next(tokens),
            "block_size": TOKENS_PER_BLOCK,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None] * blocks_per_message,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        messages.append(encode([(_FIRST_MS + start) / 1000, [event], 0]))
        chain += hashes
    if len(chain) >= 64:
        chains.append([value.to_bytes(8, "big") for value in chain])
    return Workload(len(messages) * blocks_per_message, blocks_per_message, messages, chains)


def _token_runs(blocks_per_message: int, seed: int) -> Iterator[list[int]]:
    """Token ids of a message, as long on the wire as those of a vocabulary of 128k."""
    generator = random.Random(seed)  # noqa: S311
    runs = [[generator.randrange(128_000) for _ in range(blocks_per_message * TOKENS_PER_BLOCK)] for _ in range(64)]
    while True:
        yield from runs
