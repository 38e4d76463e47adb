"""What there is to say of the daemon, of its backend and of one worker, as lines with styles. Pure."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime

from rich.text import Text

from ..printable import printable
from ..status import BusStatus, Trust
from .rates import Rates
from .rows import STYLES, SYMBOLS, trust_words
from .sample import Sample
from .words import count, duration, share, size

_LABEL = 14


def headline(sample: Sample, rates: Rates | None) -> list[Text]:
    """The lines above every table."""
    ready = sample.readiness.ready
    blocks = sample.figures.value("kvcensus_backend_records")
    queued = sample.figures.value("kvcensus_queue_messages") or 0
    queued_bytes = sample.figures.value("kvcensus_queue_bytes")
    first = Text.assemble(
        ("● ready" if ready else "✕ not ready", "green" if ready else "bold red"),
        f"   up {duration(sample.uptime_s)}   {sample.backend or 'no index'}   blocks ",
        (f"{blocks:,.0f}" if blocks is not None else "-", "bold"),
        f"   queue {count(queued)} ({size(queued_bytes)})",
    )
    second = Text.assemble(
        "stored ",
        (f"{count(rates.stored if rates else None)}/s", "bold"),
        "   removed ",
        (f"{count(rates.removed if rates else None)}/s", "bold"),
        "   messages ",
        (f"{count(rates.messages if rates else None)}/s", "bold"),
        "   lag ",
        (duration(rates.lag_s if rates else None), "bold"),
    )
    trusts = Counter(worker.trust for worker in sample.workers.values())
    workers = len(sample.workers)
    third = Text(f"{workers} worker" if workers == 1 else f"{workers} workers")
    for trust in Trust:
        if trusts[trust]:
            third.append(f"   {SYMBOLS[trust]} {trusts[trust]} {trust.value}", STYLES[trust])
    problems = [Text(f"! {printable(problem)}", "bold red", no_wrap=True) for problem in sample.readiness.problems]
    return [first, second, third, *problems]


def backend_lines(sample: Sample, rates: Rates | None) -> Text:
    """The index, the process, and the shadow where there is one."""
    figures = sample.figures

    def value(name: str) -> float | None:
        return figures.value(f"kvcensus_backend_{name}")

    live, limit = value("live_bytes") or 0.0, value("limit_bytes") or 0.0
    tiers = figures.by("kvcensus_backend_tier_records", "tier")
    lines = [
        ("backend", f"{sample.backend}" + ("" if value("up") else ": cannot be read")),
        ("records", f"{value('records') or 0:,.0f}"),
        ("by tier", "   ".join(f"{tier} {number:,.0f}" for tier, number in tiers.items() if number) or "-"),
        ("their bytes", size(value("resident_bytes")) if value("resident_bytes") else "not known: see bytes_per_block"),
        ("file", f"{size(value('file_bytes'))}, of which {size(live)} in use"),
        ("limit", f"{size(limit)}, {share(live, limit)} used" if limit else "none"),
        (
            "readers",
            f"{count(value('readers'))}, the oldest {count(value('oldest_reader_lag_transactions'))} commits ago",
        ),
        ("commits", f"{count(rates.commits if rates else None)}/s   errors {count(value('commit_errors_total'))}"),
        ("commit takes", _commit_times(rates)),
        ("written", f"{size(rates.written_bytes if rates else None)}/s to the store"),
        ("unknown", f"{count(figures.value('kvcensus_writer_unknown_removals_total'))} removals of blocks not known"),
        ("quarantine", f"{count(figures.value('kvcensus_quarantine_entries'))} entries"),
        ("process", _process(sample, rates)),
        *_shadow(sample),
    ]
    return labelled(lines)


def worker_lines(sample: Sample, rates: Rates | None, name: str) -> Text:
    """One worker: why it is not trusted, what it holds, and how its stream is followed."""
    worker, stream = sample.workers.get(name), sample.stream_of.get(name)
    known = worker or stream
    if known is None:
        return Text("This worker is gone.", "yellow")
    lines = [("trust", trust_words(known.trust))]
    if known.trust is not Trust.FRESH:
        lines.append(("because", known.reason or "-"))
    lines += [("since", _moment(known.since_ms, sample.wall_s))]
    if worker is not None:
        lines.append(("blocks", f"{worker.blocks:,}" + (f", {size(worker.bytes)}" if worker.bytes else "")))
        for held in worker.holdings:
            spec = held.spec
            window = f", window of {spec.window} tokens" if spec.window else ""
            blocks_of = f", blocks of {spec.block_size} tokens" if spec.block_size else ""
            lines.append(
                ("", f"{held.blocks:>11,}  {held.tier}, group {held.group}: {spec.kind.value}{blocks_of}{window}")
            )
    if stream is None:
        lines.append(("stream", "none is configured"))
        return labelled(lines)
    figures, stream_rates = sample.figures, rates.streams.get(stream.stream) if rates else None

    def total(what: str) -> str:
        return count(figures.by(f"kvcensus_stream_{what}_total", "stream").get(stream.stream, 0))

    refused = figures.of_stream("kvcensus_stream_rejections_total", stream.stream, "reason")
    lines += [
        ("stream", f"{stream.stream} of source {stream.source}, {stream.state.value}"),
        ("endpoint", stream.endpoint),
        ("epoch", f"{stream.epoch}, last number {stream.last_seq if stream.last_seq >= 0 else 'none'}"),
        ("committed", _moment(stream.committed_ms, sample.wall_s)),
        ("engine's time", _moment(stream.engine_ms, sample.wall_s)),
        (
            "applied",
            f"{stream.messages:,} messages, {stream.blocks_stored:,} stored, {stream.blocks_removed:,} removed",
        ),
        (
            "gaps",
            f"{total('gaps')}, {total('missing_messages')} messages missing, {total('unrecovered_messages')} given up",
        ),
        (
            "replays",
            f"{total('replay_requests')}, {total('replayed_messages')} messages, {total('replay_failures')} failed",
        ),
        ("restarts", total("restarts")),
        ("refused", ", ".join(f"{number:.0f} {reason}" for reason, number in refused.items()) or "nothing"),
    ]
    if stream_rates is not None:
        rate = f"{count(stream_rates.messages)} messages, {count(stream_rates.stored)} stored, "
        lines.append(("a second", f"{rate}{count(stream_rates.removed)} removed, lag {duration(stream_rates.lag_s)}"))
    return labelled(lines)


def bus_lines(bus: BusStatus) -> Text:
    """One bus, with the whole of its problem."""
    lines = [
        ("state", bus.state.value),
        *([("because", bus.problem)] if bus.problem else []),
        ("events of", bus.type),
        ("servers", " ".join(bus.servers)),
        ("stream", f"{bus.jetstream}, read up to {bus.position}, {bus.pending} left" if bus.jetstream else "core NATS"),
        ("workers", f"{bus.workers}, {bus.refused} messages of others refused"),
    ]
    return labelled(lines)


def labelled(lines: list[tuple[str, str]]) -> Text:
    """Lines under each other, each behind its label."""
    text = Text()
    for label, words in lines:
        style = next((STYLES[trust] for trust in Trust if words == trust_words(trust)), "")
        shown = printable(words)
        text.append(f"{label:<{_LABEL}}", "dim").append(shown, "bold red" if label == "because" else style).append("\n")
    return text


def _commit_times(rates: Rates | None) -> str:
    if rates is None or rates.commit_mean_s is None:
        return "-"
    bounds = [
        f"{name} {'more than measured' if math.isinf(bound) else f'within {duration(bound)}'}"
        for name, bound in (("half", rates.commit_p50_s), ("99 %", rates.commit_p99_s))
        if bound is not None
    ]
    return ", ".join([f"{duration(rates.commit_mean_s)} on average", *bounds])


def _process(sample: Sample, rates: Rates | None) -> str:
    memory = sample.figures.value("process_resident_memory_bytes")
    if memory is None:
        return "not known"
    return f"{size(memory)}" + (f", {rates.cpu:.2f} cores" if rates else "")


def _shadow(sample: Sample) -> list[tuple[str, str]]:
    figures = sample.figures
    name = figures.label("kvcensus_shadow_up", "backend")
    if not name:
        return []
    followed = "followed" if figures.value("kvcensus_shadow_up") else "broken"
    differed = count(figures.value("kvcensus_shadow_disagreements_total"))
    return [
        ("shadow", f"{name}, {followed}, {count(figures.value('kvcensus_shadow_records'))} records, {differed} differ")
    ]


def _moment(at_ms: int, now_s: float) -> str:
    if not at_ms:
        return "never"
    at = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{at}, {duration(max(0.0, now_s - at_ms / 1000))} ago"
