"""Captured messages of Dynamo's releases, and what was published. `captures/README.md` tells where they come from."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvcensus.translators.dynamo_envelope import Opened, open_dynamo, open_dynamo_frames, parse_subject
from kvcensus.translators.translation import Rejection

_FOLDER = Path(__file__).parent / "captures" / "dynamo"
_EXPECTED = ".expected.json"
NAMES = sorted(path.name.removesuffix(_EXPECTED) for path in _FOLDER.glob(f"*{_EXPECTED}"))


@dataclass(frozen=True)
class BusMessage:
    """A message as it was received: on a NATS subject, or as the frames of the ZMQ event plane."""

    subject: str
    payload: bytes
    frames: tuple[bytes, ...] = ()

    def open(self) -> Opened | Rejection:
        return open_dynamo_frames(list(self.frames)) if self.frames else open_dynamo(self.payload)


@dataclass(frozen=True)
class Published:
    """What was published, per rank: `steps` in order, `["life"]` where another life begins, and what each life held."""

    release: str
    steps: dict[int, list[list[Any]]]
    held: dict[int, list[dict[str, set[int]]]]


@cache
def messages_of(name: str) -> tuple[BusMessage, ...]:
    """The messages that carry events, in the order of their arrival."""
    packed = _FOLDER / f"{name}.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else (_FOLDER / f"{name}.jsonl").read_bytes()
    messages = []
    for line in map(json.loads, text.splitlines()):
        if "frames" in line:
            messages.append(BusMessage("", b"", tuple(map(bytes.fromhex, line["frames"]))))
        elif parse_subject(line["subject"]):
            messages.append(BusMessage(line["subject"], bytes.fromhex(line["hex"])))
    return tuple(messages)


@cache
def published(name: str) -> Published:
    """What the capture must come to."""
    told = json.loads((_FOLDER / f"{name}{_EXPECTED}").read_bytes())
    held = {
        int(rank): [{tier: set(hashes) for tier, hashes in life.items()} for life in lives]
        for rank, lives in told["held"].items()
    }
    return Published(told["release"], {int(rank): steps for rank, steps in told["steps"].items()}, held)
