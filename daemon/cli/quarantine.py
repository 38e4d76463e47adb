"""`kvcensus quarantine`: what was refused, looked at, tried again and dropped, whether or not the daemon runs."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from kvcensus.translators.translation import RejectReason, Translator, TranslatorOptions

from ..config import Config, ConfigError, NatsConfig, SourceConfig, load_config
from ..engines import translator_of
from ..printable import printable
from ..quarantine import WHOLE_PAYLOAD, Entry, KeptEntries, QuarantineError
from ..unpacked import unpacked
from .columns import columns
from .ending import EXIT_CONFIG, EXIT_IO, EXIT_UNAVAILABLE, Failure

F = TypeVar("F", bound=Callable[..., Any])

_BYTES_PER_LINE = 16


@click.group()
def quarantine() -> None:
    """Look at frames and events that were refused, try them again, drop them."""


def _placed(function: F) -> F:
    """The options that say whose quarantine."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--data-dir", metavar="DIR", help="Data directory of the daemon, over that of the file."),
        click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="TOML file."),
    ):
        function = option(function)
    return function


def _chosen(function: F) -> F:
    """Some entries or all of them."""
    function = click.option("--all", "everything", is_flag=True, help="Every entry.")(function)
    return click.argument("ids", nargs=-1, type=int, metavar="[ID]...")(function)


@quarantine.command(name="list")
@_placed
def list_entries(path: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Every entry, the oldest first."""
    with _ending():
        entries = _kept(_config(path, data_dir)).listed()
    if as_json:
        click.echo(json.dumps({"entries": [_as_json(entry) for entry in entries]}))
        return
    head = ("ID", "TIME", "STREAM", "EPOCH", "SEQ", "EVENT", "REASON", "FIELD", "BYTES", "DETAIL")
    rows = [
        (one.id, _time(one), one.stream, one.epoch, one.seq, _event(one), one.reason, one.field, one.raw_bytes)
        for one in entries
    ]
    click.echo(columns(head, [(*row, one.detail) for row, one in zip(rows, entries)]))


@quarantine.command()
@click.argument("entry_id", metavar="ID", type=int)
@_placed
def show(entry_id: int, path: Path | None, data_dir: str | None, as_json: bool) -> None:
    """One entry: where it came from, why it was refused, its bytes, and what msgpack makes of them."""
    with _ending():
        kept = _kept(_config(path, data_dir))
        found = list(kept.whole(_ids(kept, (entry_id,), everything=False)))
    if not found:
        raise _not_there([entry_id])
    (entry,) = found
    decoded, problem = unpacked(entry.raw)
    if as_json:
        more = {"raw_hex": entry.raw.hex(), "decoded": decoded, "undecodable": problem}
        click.echo(json.dumps({**_as_json(entry), **more}))
        return
    facts = {**_as_json(entry), "time": _time(entry), "event": _event(entry)}
    del facts["at_ms"]
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name.ljust(width)}  {'-' if value is None or value == '' else printable(str(value))}")
    size = f"the first {entry.kept_bytes} of {entry.raw_bytes}" if entry.cut else str(entry.raw_bytes)
    click.echo(f"\nbytes ({size}):")
    for line in _hex_lines(entry.raw):
        click.echo(line)
    click.echo(f"\nmsgpack: {problem}" if problem else f"\nmsgpack:\n{json.dumps(decoded, indent=2)}")


@quarantine.command()
@_chosen
@click.option("--drop-translated", is_flag=True, help="Drop those that can be translated now.")
@_placed
def retry(
    ids: tuple[int, ...],
    everything: bool,
    drop_translated: bool,
    path: Path | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Translate entries again, as this version and this configuration would. The index is not changed.

    What matters of the configuration are the sources (media, ranks), so give the daemon's own with --config.
    """
    config = _config(path, data_dir)
    with _ending():
        kept = _kept(config)
        results = list(_retried(kept, _ids(kept, ids, everything), config))
        translated = [one.id for one in results if one.verdict == "translated"]
        dropped = kept.drop(translated) if drop_translated else []
    if as_json:
        click.echo(json.dumps({"entries": msgspec.to_builtins(results), "dropped": dropped}))
        return
    head = ("ID", "STREAM", "EPOCH", "SEQ", "EVENT", "RESULT", "OPERATIONS", "REASON", "FIELD", "DETAIL")
    rows = [
        (one.id, one.stream, one.epoch, one.seq, one.event, one.verdict, one.operations, one.reason, one.field)
        for one in results
    ]
    click.echo(columns(head, [(*row, printable(one.detail)) for row, one in zip(rows, results)]))
    click.echo(f"{len(translated)} of {len(results)} can be translated now, {len(dropped)} dropped", err=True)
    for source in sorted({one.source for one in results if not one.configured}):
        click.echo(f"warning: source {source} is not in this configuration; the defaults were used", err=True)
    if translated and not drop_translated:
        click.echo("--drop-translated drops them; the index was not changed by this command", err=True)


@quarantine.command()
@_chosen
@_placed
def drop(ids: tuple[int, ...], everything: bool, path: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Drop entries."""
    with _ending():
        kept = _kept(_config(path, data_dir))
        dropped = kept.drop(_ids(kept, ids, everything))
    click.echo(json.dumps({"dropped": dropped}) if as_json else f"{len(dropped)} dropped")


class Retried(msgspec.Struct, frozen=True):
    """What became of an entry. `verdict` is translated, refused (again), or cut: too little of it was kept to say."""

    id: int
    source: str
    stream: str
    epoch: int
    seq: int
    event: int | None
    verdict: str
    configured: bool
    operations: int = 0
    reason: str = ""
    field: str = ""
    detail: str = ""


def _retried(kept: KeptEntries, ids: list[int], config: Config) -> Iterator[Retried]:
    sources: dict[str, SourceConfig | NatsConfig] = {source.name: source for source in config.sources}
    sources.update((bus.name, bus) for bus in config.nats)
    ranks = {stream.stream: stream.rank for _, stream in config.streams()}

    @functools.cache
    def made_for(source_name: str, engine: str, stream: str, rank: int | None) -> Translator | None:
        source = sources.get(source_name)
        name = stream if rank is None else stream.removesuffix(f"/{rank}")
        options = source.options_of(name) if source else TranslatorOptions(worker=name)
        known = source.type if isinstance(source, SourceConfig) else engine
        return translator_of(known, options, name, rank)

    for entry in kept.whole(ids):
        rank = ranks.get(entry.stream)
        translator = made_for(entry.source, entry.engine, entry.stream, entry.rank)
        verdict = _verdict(entry, translator, entry.rank if rank is None else rank)
        yield Retried(
            id=entry.id,
            source=entry.source,
            stream=entry.stream,
            epoch=entry.epoch,
            seq=entry.seq,
            event=_event(entry),
            configured=entry.source in sources,
            **verdict,
        )


def _verdict(entry: Entry, translator: Translator | None, rank: int | None) -> dict[str, Any]:
    """How the writer would judge the entry in a stream of this rank; None when its stream had not shown one."""
    if entry.cut:
        return {"verdict": "cut", "detail": f"only {entry.kept_bytes} of {entry.raw_bytes} bytes were kept"}
    if translator is None:
        return {"verdict": "refused", "detail": f"this version does not translate {entry.engine}"}
    payload = entry.raw
    if entry.event != WHOLE_PAYLOAD:
        clock = msgspec.msgpack.encode(entry.at_ms / 1000)
        payload = b"\x93" + clock + b"\x91" + entry.raw + msgspec.msgpack.encode(rank)
    translation = translator.translate(payload, 0)
    for one in translation.rejections:
        return {"verdict": "refused", "reason": one.reason, "field": one.field, "detail": one.detail}
    if translation.rank != rank and (rank is not None or entry.reason == RejectReason.RANK):
        detail = f"data-parallel rank is {translation.rank}, this stream's is {rank}"
        return {"verdict": "refused", "reason": RejectReason.RANK, "field": "data_parallel_rank", "detail": detail}
    return {"verdict": "translated", "operations": len(translation.operations)}


def _config(path: Path | None, data_dir: str | None) -> Config:
    try:
        return load_config(path, os.environ, {"data_dir": data_dir} if data_dir is not None else {})
    except ConfigError as error:
        raise Failure(str(error), EXIT_CONFIG) from error


def _kept(config: Config) -> KeptEntries:
    directory = Path(config.data_dir)
    if not directory.is_dir():
        raise Failure(f"{directory}: there is no data directory here", EXIT_UNAVAILABLE)
    return KeptEntries(directory)


def _ids(kept: KeptEntries, ids: tuple[int, ...], everything: bool) -> list[int]:
    if everything == bool(ids):
        raise click.UsageError("give the IDs of entries, or --all")
    there = [entry.id for entry in kept.listed()]
    missing = sorted(set(ids) - set(there))
    if missing:
        raise _not_there(missing)
    return there if everything else list(dict.fromkeys(ids))


def _not_there(ids: list[int]) -> Failure:
    return Failure(f"no entry {', '.join(map(str, ids))}: see kvcensus quarantine list", EXIT_UNAVAILABLE)


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    except QuarantineError as error:
        raise Failure(str(error), EXIT_IO) from error


def _as_json(entry: Entry) -> dict[str, Any]:
    facts = {name: getattr(entry, name) for name in entry.__struct_fields__ if name != "raw"}
    return {**facts, "event": _event(entry), "time": _time(entry), "cut": entry.cut}


def _event(entry: Entry) -> int | None:
    return None if entry.event == WHOLE_PAYLOAD else entry.event


def _time(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _hex_lines(raw: bytes) -> Iterator[str]:
    for at in range(0, len(raw), _BYTES_PER_LINE):
        part = raw[at : at + _BYTES_PER_LINE]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        yield f"{at:08x}  {part.hex(' ').ljust(3 * _BYTES_PER_LINE)} |{text}|"
