"""The captured engines: what they published, and what they had in their cache when they stopped.

`captures/README.md` tells where the files come from.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CAPTURES = Path(__file__).parent / "captures"


@dataclass(frozen=True)
class Message:
    """One ZMQ message as received."""

    received_ns: int
    topic: bytes
    seq: int
    payload: bytes


@dataclass(frozen=True)
class Probe:
    """A prompt as its block hashes, and how many of them in a row the engine itself would have found cached."""

    block_hashes: tuple[bytes, ...]
    prefix_blocks: int
    lora: str | None
    cache_salt: str | None


@dataclass(frozen=True)
class Stage:
    """One life of an engine: its messages, the copies of each (hash, group) in its cache at the end, and probes.

    `missed` are the messages before the first one that was received, as far as the engine's replay still had them.
    """

    messages: tuple[Message, ...]
    copies: dict[tuple[bytes, int], int]
    probes: tuple[Probe, ...]
    truth: dict[str, Any]
    missed: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A capture with its stages: two of them when the engine was restarted."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        """Every message of every stage."""
        return tuple(message for stage in self.stages for message in stage.messages)


def capture_names(engine: str) -> list[str]:
    """The captures of an engine: "vllm", "vllm-0.32.0", "sglang"."""
    return sorted(path.name.removesuffix(".jsonl.gz") for path in CAPTURES.glob(f"{engine}-*.jsonl.gz"))


@cache
def load_capture(name: str) -> Capture:
    """A capture by its name, as in `vllm-0.32.0-basic`."""
    truth = json.loads(gzip.decompress((CAPTURES / f"{name}.json.gz").read_bytes()))
    lives = _lives(_messages(CAPTURES / f"{name}.jsonl.gz"))
    assert len(lives) == len(truth["stages"])
    replays = truth.get("replay_raw") or [[]] * len(lives)
    return Capture(name, tuple(map(_stage, lives, truth["stages"], replays)))


def _messages(path: Path) -> list[Message]:
    messages = []
    for line in gzip.decompress(path.read_bytes()).splitlines():
        recorded = json.loads(line)
        topic, seq, payload = map(base64.b64decode, recorded["frames"])
        messages.append(Message(recorded["t"], topic, int.from_bytes(seq, "big"), payload))
    return messages


def _lives(messages: list[Message]) -> list[tuple[Message, ...]]:
    """A restart is a sequence number that goes backwards."""
    starts = [at for at in range(len(messages)) if at == 0 or messages[at].seq <= messages[at - 1].seq]
    return [tuple(messages[start:end]) for start, end in zip(starts, [*starts[1:], len(messages)])]


def _stage(messages: tuple[Message, ...], truth: dict[str, Any], replays: list[dict[str, Any]]) -> Stage:
    missed = _missed(messages[0], replays)
    if "trees" in truth:
        probes = tuple(_tree_probe(found, truth["block_size"]) for tree in truth["trees"] for found in tree["seqs"])
        held = {block_hash for probe in probes for block_hash in probe.block_hashes[: probe.prefix_blocks]}
        return Stage(messages, {(block_hash, 0): 1 for block_hash in held}, probes, truth, missed)
    copies = {
        (_hash(block["hash"]), block["group"]): block["n_copies"]
        for block in truth.get("cached_block_hashes_at_end", ())
    }
    probes = tuple(_probe(probe, truth["block_size"]) for probe in truth.get("probes", ()))
    return Stage(messages, copies, probes, truth, missed)


def _missed(first: Message, replays: list[dict[str, Any]]) -> tuple[Message, ...]:
    """What the replay from 0 has before the first message. A reply ends in sequence number and payload."""
    missed = []
    for reply in next((replay["replies"] for replay in replays if replay["name"] == "dealer_from_0"), []):
        *_, seq, payload = map(base64.b64decode, reply)
        if (number := int.from_bytes(seq, "big")) < first.seq:
            missed.append(Message(first.received_ns, first.topic, number, payload))
    return tuple(missed)


def _probe(probe: dict[str, Any], block_size: int) -> Probe:
    hit = probe.get("engine_hit_tokens")
    prefix = probe["cached_prefix_blocks"] if hit is None else hit // block_size
    return Probe(tuple(map(_hash, probe["block_hashes"])), prefix, probe["lora"], probe["cache_salt"])


def _tree_probe(found: dict[str, Any], page_size: int) -> Probe:
    """A walk of the radix tree. The wire has the first 8 bytes of a page's digest, of which the tree knows its own."""
    assert found["cache_salt"] is None
    digests = _page_digests(found["toks"], page_size)
    matched = found["matched_tokens"] // page_size
    assert [digest.hex() for digest in digests[:matched]] == found["hash_values"][:matched]
    return Probe(tuple(digest[:8] for digest in digests), matched, None, None)


def _page_digests(tokens: list[int], page_size: int) -> list[bytes]:
    """As SGLang makes them since 0.5.6: SHA-256 of the digest before, if any, and each token as 32 bits."""
    digests: list[bytes] = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + page_size])
        digests.append(hashlib.sha256(b"".join(digests[-1:]) + page).digest())
    return digests


def _hash(recorded: dict[str, Any]) -> bytes:
    if "b" in recorded:
        return base64.b64decode(recorded["b"])
    value: int = recorded["i"]
    return (value % 2**64).to_bytes(8, "big")
