"""`kvcensus query`: questions to a running daemon."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from .asking import Daemon, http_option, timeout_option
from .columns import columns

F = TypeVar("F", bound=Callable[..., Any])

Row = dict[str, Any]


@click.group()
def query() -> None:
    """Ask a running daemon."""


def _asked(function: F) -> F:
    """The options of every question."""
    json_option = click.option("--json", "as_json", is_flag=True, help="Print the daemon's answer as it is.")
    return http_option(timeout_option(json_option(function)))


def _scoped(function: F) -> F:
    """The options that make up a scope."""
    for option in (
        click.option("--tenant", default="", help="Tenant of the scope."),
        click.option("--adapter", help="LoRA adapter of the scope; without it, blocks of no adapter."),
        click.option("--tokenizer", help="Tokenizer of the scope. Default: the model's."),
        click.option("--model", help="Model of the scope. Without it, every scope is looked at."),
    ):
        function = option(function)
    return function


def _scope(model: str | None, tokenizer: str | None, adapter: str | None, tenant: str) -> Row | None:
    if model is None:
        if tokenizer is not None or adapter is not None or tenant:
            raise click.UsageError("--tokenizer, --adapter and --tenant need --model")
        return None
    return {"model_id": model, "tokenizer_id": tokenizer, "adapter_id": adapter, "tenant_id": tenant}


@query.command()
@click.argument("block_hashes", nargs=-1, required=True)
@_scoped
@click.option("--trusted-only", is_flag=True, help="Leave out workers that are not fresh.")
@_asked
def match(
    block_hashes: tuple[str, ...],
    model: str | None,
    tokenizer: str | None,
    adapter: str | None,
    tenant: str,
    trusted_only: bool,
    address: str,
    timeout_s: float,
    as_json: bool,
) -> None:
    """How many of these consecutive blocks each worker could serve.

    BLOCK_HASHES are hex, the first block of the prompt first; a single - reads them from the standard input.
    """
    hashes = sys.stdin.read().split() if block_hashes == ("-",) else list(block_hashes)
    body: Row = {"block_hashes": hashes, "trusted_only": trusted_only}
    if scope := _scope(model, tokenizer, adapter, tenant):
        body["scope"] = scope
    answer = Daemon(address, timeout_s).post("/v1/match", body)
    _show(answer, as_json, "workers", _match_rows)


def _match_rows(workers: list[Row]) -> tuple[Sequence[str], list[Sequence[object]]]:
    return ("WORKER", "BLOCKS", "TIERS", "ANY TIER", "TRUST", "LAST SEQ", "AGE"), [
        (
            one["worker_id"],
            one["blocks"],
            " ".join(f"{tier}={blocks}" for tier, blocks in one["tiers"].items()),
            one["blocks_any_tier"],
            one["trust"],
            one["last_seq"],
            _age(one),
        )
        for one in workers
    ]


@query.command()
@click.argument("block_hash")
@_scoped
@click.option("--group", type=click.IntRange(min=0), help="Only this KV-cache group.")
@_asked
def locate(
    block_hash: str,
    model: str | None,
    tokenizer: str | None,
    adapter: str | None,
    tenant: str,
    group: int | None,
    address: str,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Where one block is. BLOCK_HASH is hex."""
    body: Row = {"block_hash": block_hash}
    if scope := _scope(model, tokenizer, adapter, tenant):
        body["scope"] = scope
    if group is not None:
        body["group"] = group
    answer = Daemon(address, timeout_s).post("/v1/locate", body)
    _show(answer, as_json, "residencies", _residency_rows)


@query.command()
@click.argument("parent", default="root")
@_scoped
@_asked
def children(
    parent: str,
    model: str | None,
    tokenizer: str | None,
    adapter: str | None,
    tenant: str,
    address: str,
    timeout_s: float,
    as_json: bool,
) -> None:
    """The blocks that follow PARENT (hex), or that start a chain (root, the default). Needs --model."""
    scope = _scope(model, tokenizer, adapter, tenant)
    if scope is None:
        raise click.UsageError("--model is needed: children are those of one scope")
    answer = Daemon(address, timeout_s).post("/v1/children", {"scope": scope, "prefix_hash": parent})
    _show(answer, as_json, "residencies", _residency_rows)


def _residency_rows(residencies: list[Row]) -> tuple[Sequence[str], list[Sequence[object]]]:
    head = (
        "WORKER",
        "TIER",
        "BLOCK",
        "PARENT",
        "INDEX",
        "GROUP",
        "COPIES",
        "MODEL",
        "ADAPTER",
        "TENANT",
        "TRUST",
        "AGE",
    )
    keys = ("worker_id", "tier", "block_hash", "prefix_hash", "block_index", "group", "ref_count")
    scope = ("model_id", "adapter_id", "tenant_id", "trust")
    return head, [(*(one[key] for key in (*keys, *scope)), _age(one)) for one in residencies]


@query.command()
@_asked
def workers(address: str, timeout_s: float, as_json: bool) -> None:
    """Every worker, and what it holds."""
    _show(Daemon(address, timeout_s).get("/v1/workers"), as_json, "workers", _worker_rows)


def _worker_rows(workers: list[Row]) -> tuple[Sequence[str], list[Sequence[object]]]:
    return ("WORKER", "TRUST", "LAST SEQ", "AGE", "BLOCKS", "BYTES", "HOLDINGS"), [
        (
            one["worker_id"],
            _reasoned(one),
            one["last_seq"],
            _age(one),
            one["blocks"],
            one["bytes"] or None,
            " ".join(f"{held['tier']}/{held['group']}={held['blocks']}" for held in one["holdings"]),
        )
        for one in workers
    ]


@query.command()
@_asked
def streams(address: str, timeout_s: float, as_json: bool) -> None:
    """Every stream, and how far it has been followed."""
    _show(Daemon(address, timeout_s).get("/v1/streams"), as_json, "streams", _stream_rows)


def _stream_rows(streams: list[Row]) -> tuple[Sequence[str], list[Sequence[object]]]:
    head = ("STREAM", "ENDPOINT", "STATE", "TRUST", "EPOCH", "LAST SEQ", "AGE", "MESSAGES", "STORED", "REMOVED")
    return head, [
        (
            one["stream"],
            one["endpoint"],
            one["state"],
            _reasoned(one),
            one["epoch"],
            one["last_seq"],
            _age(one),
            one["messages"],
            one["blocks_stored"],
            one["blocks_removed"],
        )
        for one in streams
    ]


def _reasoned(one: Row) -> str:
    return f"{one['trust']} ({one['reason']})" if one["reason"] else str(one["trust"])


def _age(one: Row) -> str | None:
    return None if one["age_ms"] is None else f"{one['age_ms'] / 1000:.1f} s"


def _show(
    answer: bytes,
    as_json: bool,
    name: str,
    rows: Callable[[list[Row]], tuple[Sequence[str], list[Sequence[object]]]],
) -> None:
    if as_json:
        click.echo(answer)
    else:
        click.echo(columns(*rows(json.loads(answer)[name])))
