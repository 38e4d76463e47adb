"""The tables: what each column says of a worker, a stream or a bus, and how it is ordered. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcensus.backends.model import TIERS

from ..http.bodies import StreamReport, WorkerState
from ..status import BusStatus, StreamState, Trust
from .rates import Rates, StreamRates
from .sample import Sample
from .words import count, duration

SYMBOLS = {Trust.FRESH: "●", Trust.CATCHING_UP: "◐", Trust.STALE: "○", Trust.UNTRUSTED: "✕"}
"""Trust without colours."""
STYLES = {Trust.FRESH: "green", Trust.CATCHING_UP: "cyan", Trust.STALE: "yellow", Trust.UNTRUSTED: "bold red"}
_STATE_STYLES = {
    StreamState.LIVE: "green",
    StreamState.REPLAYING: "cyan",
    StreamState.CONNECTING: "yellow",
    StreamState.DISCONNECTED: "bold red",
}
_SHORT_TIERS = {"hbm": "hbm", "remote_hbm": "rhbm", "cpu_dram": "dram", "local_ssd": "ssd", "object_store": "obj"}
_WORST_FIRST = [Trust.UNTRUSTED, Trust.STALE, Trust.CATCHING_UP, Trust.FRESH]
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is about, and all that is known of it. `key` is its name."""

    key: str
    worker: WorkerState | None = None
    stream: StreamReport | None = None
    bus: BusStatus | None = None
    rates: StreamRates | None = None
    gaps: float = 0
    replays: float = 0
    rejections: float = 0
    bus_messages: float = 0

    @property
    def trust(self) -> Trust:
        if self.worker is not None:
            return self.worker.trust
        return self.stream.trust if self.stream is not None else Trust.UNTRUSTED


@dataclass(frozen=True)
class Column:
    """`order` is what a row is sorted by; `width` is the least, in characters; `right`: numbers."""

    title: str
    cell: Callable[[Row], str]
    order: Callable[[Row], Any]
    width: int = 0
    right: bool = False
    style: Callable[[Row], str] = lambda row: ""


def natural(text: str) -> list[Any]:
    """Numbers within a text in their order: gpu-2 before gpu-10."""
    return [int(part) if part.isdigit() else part.casefold() for part in _DIGITS.split(text)]


def trust_words(trust: Trust) -> str:
    """The symbol and the name."""
    return f"{SYMBOLS[trust]} {trust.value}"


def tiers_of(worker: WorkerState | None) -> str:
    """Blocks by tier, the fastest first."""
    blocks: dict[str, int] = defaultdict(int)
    for held in worker.holdings if worker else ():
        blocks[held.tier] += held.blocks
    return " ".join(f"{_SHORT_TIERS[tier]} {count(blocks[tier])}" for tier in TIERS if blocks[tier])


def _name(title: str) -> Column:
    return Column(title, lambda row: row.key, lambda row: natural(row.key), 8)


def _rate(title: str, field: str) -> Column:
    def value(row: Row) -> float | None:
        return None if row.rates is None else getattr(row.rates, field)

    return Column(title, lambda row: count(value(row)), lambda row: value(row) or 0.0, 5, True)


def _number(title: str, value: Callable[[Row], float], width: int = 5, style: str = "") -> Column:
    return Column(
        title, lambda row: count(value(row)), value, width, True, lambda row: style if style and value(row) else ""
    )


def _state(of: Callable[[Row], StreamReport | BusStatus]) -> Column:
    def name(row: Row) -> str:
        return of(row).state.value

    return Column("STATE", name, name, 10, style=lambda row: _STATE_STYLES[of(row).state])


def _age_s(row: Row) -> float | None:
    known = row.worker or row.stream
    return None if known is None or known.age_ms is None else known.age_ms / 1000


def _last_seq(row: Row) -> int:
    known = row.worker or row.stream
    return -1 if known is None else known.last_seq


_TRUST = Column(
    "TRUST",
    lambda row: trust_words(row.trust),
    lambda row: _WORST_FIRST.index(row.trust),
    7,
    style=lambda row: STYLES[row.trust],
)
_SEQ = Column("SEQ", lambda row: str(_last_seq(row)) if _last_seq(row) >= 0 else "-", _last_seq, 6, True)
_AGE = Column("AGE", lambda row: duration(_age_s(row)), lambda row: _age_s(row) or 0.0, 5, True)


def _of_stream(row: Row) -> StreamReport:
    assert row.stream is not None
    return row.stream


def _of_bus(row: Row) -> BusStatus:
    assert row.bus is not None
    return row.bus


def _lag_s(row: Row) -> float | None:
    return row.rates.lag_s if row.rates is not None else None


WORKERS: tuple[Column, ...] = (
    _name("WORKER"),
    _TRUST,
    _number("BLOCKS", lambda row: row.worker.blocks if row.worker else 0, 6),
    _rate("+/S", "stored"),
    _rate("-/S", "removed"),
    _SEQ,
    _AGE,
    Column("TIERS", lambda row: tiers_of(row.worker), lambda row: row.worker.blocks if row.worker else 0),
)
STREAMS: tuple[Column, ...] = (
    _name("STREAM"),
    _state(_of_stream),
    _number("EPOCH", lambda row: _of_stream(row).epoch),
    _SEQ,
    _rate("MSG/S", "messages"),
    Column("LAG", lambda row: duration(_lag_s(row)), lambda row: _lag_s(row) or 0.0, 5, True),
    _number("GAPS", lambda row: row.gaps, 4, "yellow"),
    _number("REPLAYS", lambda row: row.replays, 7),
    _number("REFUSED", lambda row: row.rejections, 7, "bold red"),
    _AGE,
    Column("ENDPOINT", lambda row: _of_stream(row).endpoint, lambda row: _of_stream(row).endpoint),
)
BUSES: tuple[Column, ...] = (
    _name("BUS"),
    _state(_of_bus),
    _number("WORKERS", lambda row: _of_bus(row).workers, 7),
    _number("MESSAGES", lambda row: row.bus_messages, 8),
    _number("POSITION", lambda row: max(0, _of_bus(row).position), 8),
    _number("PENDING", lambda row: _of_bus(row).pending, 7),
    _number("REFUSED", lambda row: _of_bus(row).refused, 7, "bold red"),
    Column(
        "FROM",
        lambda row: _of_bus(row).problem or f"{_of_bus(row).jetstream or 'core NATS'} {' '.join(_of_bus(row).servers)}",
        lambda row: _of_bus(row).problem,
        style=lambda row: "bold red" if _of_bus(row).problem else "",
    ),
)


def worker_rows(sample: Sample, rates: Rates | None) -> list[Row]:
    """A row for each worker, with its stream where it has one."""
    streams = rates.streams if rates else {}
    return [
        Row(name, worker, stream, rates=streams.get(stream.stream) if stream else None)
        for name, worker in sample.workers.items()
        for stream in [sample.stream_of.get(name)]
    ]


def stream_rows(sample: Sample, rates: Rates | None) -> list[Row]:
    """A row for each stream."""
    gaps, replays, rejections = (
        sample.figures.by(f"kvcensus_stream_{name}_total", "stream")
        for name in ("gaps", "replay_requests", "rejections")
    )
    streams = rates.streams if rates else {}
    return [
        Row(
            name,
            stream=stream,
            rates=streams.get(name),
            gaps=gaps.get(name, 0),
            replays=replays.get(name, 0),
            rejections=rejections.get(name, 0),
        )
        for name, stream in sample.streams.items()
    ]


def bus_rows(sample: Sample) -> list[Row]:
    """A row for each bus."""
    messages = sample.figures.by("kvcensus_bus_messages_total", "bus")
    return [Row(bus.bus, bus=bus, bus_messages=messages.get(bus.bus, 0)) for bus in sample.buses]


def chosen(rows: Iterable[Row], columns: Sequence[Column], words: str) -> list[Row]:
    """The rows in which every one of the words is said somewhere."""
    wanted = words.casefold().split()
    return [row for row in rows if not wanted or _says(row, columns, wanted)]


def _says(row: Row, columns: Sequence[Column], wanted: Sequence[str]) -> bool:
    known = row.worker or row.stream
    text = " ".join(
        [*(column.cell(row) for column in columns), known.trust if known else "", known.reason if known else ""]
    )
    return all(word in text.casefold() for word in wanted)


def ordered(rows: Iterable[Row], column: Column, reverse: bool) -> list[Row]:
    """Sorted by a column, and by name where it says the same."""
    by_name = sorted(rows, key=lambda row: natural(row.key))
    return sorted(by_name, key=column.order, reverse=reverse)
