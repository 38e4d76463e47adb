"""What is kept of a drill that diverged, so that somebody else can see it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..recording import RecordedMessage, RecordingWriter
from .plan import Plan
from .stage import Result, Sent


def keep_evidence(place: Path, plan: Plan, result: Result, sent: Mapping[str, Sent]) -> None:
    """Write into `place`, beside the daemon's configuration and log that are there already:

    `plan.json`, `result.json`, and per stream `NAME.made.jsonl.gz` (what the engine made, in order) and
    `NAME.live.jsonl.gz` (what was put on the live socket), which `kvcensus replay` reads.
    """
    (place / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
    (place / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    for stream, messages in sent.items():
        name = stream.replace("/", "-")
        _record(place / f"{name}.made.jsonl.gz", messages.made)
        _record(place / f"{name}.live.jsonl.gz", messages.live)


def _record(path: Path, messages: list[RecordedMessage]) -> None:
    path.unlink(missing_ok=True)
    with RecordingWriter(path) as writer:
        for message in messages:
            writer.write(message)
