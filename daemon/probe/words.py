"""What a probe found, in plain words: one block for each stream and bus. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from .findings import MOST_SHOWN, BusFinding, Numbers, Payloads, ProbeFindings, Replay, StreamFinding, Worker
from .releases import Releases

_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "dynamo": "Dynamo"}
_LABEL_WIDTH = 10
_FEW_MS = 50
"""Less than this is no difference of clocks that anybody sees."""

_NO_REPLAY = "none configured: what was missed stays missed, and an idle engine tells nothing"
_NO_REPLAY_SGLANG = (
    "none configured: SGLang's first message clears everything and leaves before anybody can be there: the "
    "worker stays untrusted"
)

Line = tuple[str, str]


def report(findings: ProbeFindings) -> str:
    """Every block, and a last line that says whether everything was reached."""
    blocks = [stream_block(one) for one in findings.streams] + [bus_block(one) for one in findings.buses]
    reached = [one.reached for one in findings.streams] + [one.reached for one in findings.buses]
    end = f"{sum(reached)} of {len(reached)} reached" if reached else "nothing to look at"
    return "\n\n".join([*blocks, end])


def stream_block(found: StreamFinding) -> str:
    """One stream of an engine."""
    lines: list[Line] = []
    if found.publishers:
        lines += [("messages", _messages(found)), *_payloads(found.payloads, found.type)]
    if found.replay is not None:
        lines.append(("replay", _replay(found.replay)))
    elif found.publishers:
        lines.append(("replay", _NO_REPLAY_SGLANG if found.type == "sglang" else _NO_REPLAY))
    head = f"stream {found.stream} ({_engine(found.type)}) at {found.endpoint}: "
    return _block(head + _reached(found.publishers > 0, found.connected_ms, found.bind), lines, found)


def bus_block(found: BusFinding) -> str:
    """One bus."""
    lines: list[Line] = []
    if found.server:
        security = "TLS" if found.tls else "without TLS"
        lines.append(("server", f"{found.server}, nats-server {found.version}, {security}, as {found.identity}"))
    if found.subscribed:
        lines.append(("subjects", _listed(found.subscribed)))
    if found.jetstream is not None:
        lines += _jetstream(found)
    if found.reached or found.messages:
        lines += [("messages", _bus_messages(found)), *_bus_contents(found)]
    where = f"{found.transport} at {', '.join(found.endpoints)}"
    head = f"bus {found.bus} ({_engine(found.type)}) over {where}: "
    return _block(head + _reached(found.connected_ms is not None, found.connected_ms, False), lines, found)


def releases(found: dict[str, list[Releases]]) -> str:
    """Which releases, as in `vLLM 0.10.2 to 0.13.0 or SGLang 0.5.9 to 0.5.17`."""
    return " or ".join(
        f"{_engine(engine)} {' or '.join(map(_range, ranges))}" for engine, ranges in found.items() if ranges
    )


def _block(head: str, lines: Iterable[Line], found: StreamFinding | BusFinding) -> str:
    rest = [("problem", found.problem)] if found.problem else []
    rest += [("warning", one) for one in found.warnings]
    return "\n".join([head, *(f"  {label:<{_LABEL_WIDTH}} {text}" for label, text in [*lines, *rest])])


def _reached(reached: bool, connected_ms: int | None, bind: bool) -> str:
    if not reached:
        return "not reached"
    return f"the engine connected after {connected_ms} ms" if bind else f"reached in {connected_ms} ms"


def _messages(found: StreamFinding) -> str:
    if not found.messages:
        return f"none in {found.seconds:g} s: an idle engine publishes nothing"
    parts = [f"{found.messages} in {found.seconds:g} s"]
    if found.numbers is not None:
        parts.append(_numbers(found.numbers))
    if found.payloads.ranks:
        parts.append(f"rank {_joined(found.payloads.ranks)}")
    if found.topics:
        parts.append(f"topic {_listed(found.topics)}")
    return ", ".join(parts)


def _numbers(numbers: Numbers) -> str:
    missing = f"{numbers.missing} missing" if numbers.missing else "none missing"
    return f"numbers {numbers.first} to {numbers.last}, {missing}"


def _payloads(found: Payloads, wanted: str) -> list[Line]:
    if not found.messages:
        return []
    lines = [("events", _events(found))] if found.form else []
    if found.releases:
        fits = "" if found.fits else f", and not {_engine(wanted)}"
        lines.append(("engine", releases(found.releases) + fits))
    elif found.form:
        lines.append(("engine", "of no release that is known here"))
    if found.behind_ms is not None:
        lines.append(("clock", _clock(found.behind_ms)))
    return lines


def _events(found: Payloads) -> str:
    parts = [f"{' and '.join(found.form)}: {found.stored} stored, {found.removed} removed, {found.cleared} cleared"]
    if found.hashes:
        parts.append(f"hashes are {' and '.join(found.hashes)}")
    if found.block_sizes:
        parts.append(f"blocks of {_joined(found.block_sizes)} tokens")
    if found.media:
        parts.append(f"media {_listed(found.media)}")
    if found.groups:
        parts.append(f"groups {_joined(found.groups)}")
    if found.adapters:
        parts.append(f"adapters {_listed(found.adapters)}")
    if found.tenants:
        parts.append(f"{found.tenants} cache salts")
    return "; ".join(parts)


def _clock(behind_ms: int) -> str:
    if abs(behind_ms) < _FEW_MS:
        return "the same as ours"
    if behind_ms < 0:
        return f"{_duration(-behind_ms)} ahead of ours"
    return f"{_duration(behind_ms)} behind ours, or its messages took so long"


def _duration(ms: float) -> str:
    for unit, size in (("days", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)):
        if ms >= 2 * size:
            return f"{ms / size:.0f} {unit}"
    return f"{ms:.0f} ms"


def _replay(found: Replay) -> str:
    if not found.reached:
        return f"{found.endpoint}: {found.problem}"
    framing = "with" if found.topic else "without"
    parts = f"{found.endpoint} answers in {found.answered_ms} ms, {framing} the topic"
    if found.problem:
        return f"{parts}; {found.problem}"
    if found.oldest is None:
        return f"{parts}; it has no messages: the engine published nothing yet"
    newest = "an unknown number" if found.newest is None else found.newest
    return f"{parts}; it has numbers {found.oldest} to {newest}"


def _jetstream(found: BusFinding) -> list[Line]:
    stream = found.jetstream
    assert stream is not None
    kept = f"{stream.name} of {_listed(stream.subjects)}: "
    if not stream.messages:
        kept += f"no messages, the last one was {stream.last}"
    else:
        kept += f"{stream.messages} messages, {stream.first} to {stream.last}"
        if stream.oldest_s is not None:
            kept += f", the oldest of {_duration(1000 * stream.oldest_s)} ago"
    leader = f", led by {stream.leader}" if stream.leader else ""
    return [("stream", kept), ("replicas", f"{stream.replicas}{leader}")]


def _bus_messages(found: BusFinding) -> str:
    if found.jetstream is not None:
        return f"the last {found.jetstream.looked_at} were looked at"
    if not found.messages:
        return f"none in {found.seconds:g} s: idle engines publish nothing"
    return f"{found.messages} in {found.seconds:g} s"


def _bus_contents(found: BusFinding) -> list[Line]:
    lines: list[Line] = []
    if found.formats:
        publishers = f", {found.publishers} publishers" if found.publishers else ""
        lines.append(("format", "; ".join(found.formats) + publishers))
    if found.releases:
        lines.append(("release", releases(found.releases) or "of no release that is known here"))
    if found.behind_ms is not None:
        lines.append(("clock", _clock(found.behind_ms)))
    lines += [("worker", _worker(one)) for one in found.workers[:MOST_SHOWN]]
    if len(found.workers) > MOST_SHOWN:
        lines.append(("worker", f"… and {len(found.workers) - MOST_SHOWN} more"))
    return lines


def _worker(found: Worker) -> str:
    name = found.worker if found.rank is None else f"{found.worker}/{found.rank}"
    parts = [f"{_quoted(name)}"]
    if found.model:
        parts.append(f"model {_quoted(found.model)}")
    parts.append(f"{found.messages} messages")
    if found.numbers is not None:
        parts.append(_numbers(found.numbers))
    if found.messages:
        parts.append(f"{found.stored} stored, {found.removed} removed, {found.cleared} cleared")
    if found.media:
        parts.append(f"media {_listed(found.media)}")
    if found.releases:
        parts.append(releases(found.releases))
    if found.alive:
        parts.append("its relay is alive")
    return ", ".join(parts)


def _engine(engine: str) -> str:
    return _ENGINES.get(engine, engine)


def _range(one: Releases) -> str:
    first, last = one
    if not last:
        return f"{first} or later"
    return first if first == last else f"{first} to {last}"


def _listed(values: Sequence[str]) -> str:
    shown = ", ".join(map(_quoted, values[:MOST_SHOWN]))
    return shown + (", …" if len(values) > MOST_SHOWN else "")


def _quoted(text: str) -> str:
    """What a peer says, with nothing in it that a terminal would obey."""
    return json.dumps(text)


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:MOST_SHOWN])) + (", …" if len(values) > MOST_SHOWN else "")
