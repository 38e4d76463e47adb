"""What `kvcensus tap` makes of messages: the operations of the index, rejections, missing numbers, and their lines."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.config import NatsConfig, SourceConfig
from kvcensus.daemon.config.source import SourceType
from kvcensus.daemon.relay.convention import Address, address_headers, numbered, subject_of
from kvcensus.daemon.streams.delivery import Control
from kvcensus.daemon.tap.decoding import EVENTS, Kind, Seen, Tap
from kvcensus.daemon.tap.inbox import Inbox, Incoming
from kvcensus.daemon.tap.wording import Wanted, json_of, line_of

from .. import dynamo_captures
from ..captures_reader import capture_names, load_capture

SOURCE = SourceConfig(endpoint="tcp://engine:5557", name="gpu", model="m")
STORED = {
    "type": "BlockStored",
    "block_hashes": [0xAB, 0xCD],
    "parent_block_hash": None,
    "token_ids": list(range(32)),
    "block_size": 16,
    "lora_id": None,
    "medium": "GPU",
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [0xAB], "medium": "CPU"}
CLEARED = {"type": "AllBlocksCleared"}
ODD = {**STORED, "medium": "TAPE"}


def payload(*events: dict[str, Any], rank: int | None = None) -> bytes:
    return msgspec.msgpack.encode([1_700_000_000.5, list(events), rank])


def frames(seq: int, *events: dict[str, Any], endpoint: str = "", rank: int | None = None) -> Incoming:
    return Incoming(1_700_000_001_000, [b"kv", seq.to_bytes(8, "big"), payload(*events, rank=rank)], endpoint)


def seen(tap: Tap, *messages: Incoming) -> list[Seen]:
    return [one for message in messages for one in tap.see(message)]


def test_events_are_the_operations_that_the_index_would_apply() -> None:
    store, remove, clear = seen(Tap(SOURCE), frames(7, STORED, REMOVED, CLEARED))
    assert (store.kind, store.worker, store.seq, store.engine_ms) == (Kind.STORE, "gpu", 7, 1_700_000_000_500)
    assert (store.tier, store.model, store.parent, store.token_count) == ("hbm", "m", "root", 16)
    assert store.block_hashes == ["00000000000000ab", "00000000000000cd"]
    assert (remove.kind, remove.tier, remove.block_hashes) == (Kind.REMOVE, "cpu_dram", ["00000000000000ab"])
    assert (clear.kind, clear.tier) == (Kind.CLEAR, None)


def test_what_is_refused_is_shown_with_reason_and_field_beside_what_is_not() -> None:
    rejected, store = seen(Tap(SOURCE), frames(0, ODD, STORED))
    assert (rejected.kind, rejected.reason, rejected.field) == (Kind.REJECTED, "medium", "events[0].medium")
    assert "TAPE" in line_of(rejected)
    assert store.kind is Kind.STORE


def test_what_is_no_message_of_an_engine_is_refused() -> None:
    (rejected,) = seen(Tap(SOURCE), Incoming(0, [b"one frame"]))
    assert (rejected.kind, rejected.reason) == (Kind.REJECTED, "payload")


def test_a_rank_that_is_not_that_of_the_stream_is_refused() -> None:
    tap = Tap(SourceConfig(endpoint="tcp://engine:5557", name="gpu", ranks=2))
    (store,) = seen(tap, frames(0, STORED, endpoint="tcp://engine:5558", rank=1))
    assert (store.worker, store.rank) == ("gpu/1", 1)
    (rejected,) = seen(tap, frames(1, STORED, endpoint="tcp://engine:5558", rank=0))
    assert (rejected.reason, rejected.field) == ("rank", "data_parallel_rank")


def test_missing_numbers_and_numbers_that_go_backwards_are_noted() -> None:
    found = seen(Tap(SOURCE), *(frames(seq, CLEARED) for seq in (3, 4, 8, 0)))
    assert [one.kind for one in found] == ["clear", "clear", "gap", "clear", "backwards", "clear"]
    assert found[2].missing == (5, 7)
    assert "3 messages did not come: 5 to 7" in line_of(found[2])


UNCOUNTED = "vllm-0.32.0-fullreport"
"""Reports the same copy more than once: only an index that knows of `count_copies = false` can add it up."""


@pytest.mark.parametrize("name", [one for one in capture_names("*") if one != UNCOUNTED])
def test_what_is_shown_of_a_captured_engine_adds_up_to_its_cache(name: str) -> None:
    engine = SourceType(name.partition("-")[0])
    for stage in load_capture(name).stages:
        tap, held = Tap(SourceConfig(endpoint="tcp://engine:5557", type=engine)), Counter[tuple[str, int | None]]()
        for message in (*stage.missed, *stage.messages):
            wire = [message.topic, message.seq.to_bytes(8, "big"), message.payload]
            for one in tap.see(Incoming(0, wire)):
                assert one.kind in (Kind.STORE, Kind.REMOVE, Kind.CLEAR)
                if one.kind is Kind.CLEAR:
                    held.clear()
                for block in one.block_hashes:
                    held[block, one.group] += 1 if one.kind is Kind.STORE else -1
        copies = {block: count if engine is SourceType.VLLM else 1 for block, count in held.items() if count > 0}
        assert copies == {(block.hex(), group): count for (block, group), count in stage.copies.items()}


@pytest.mark.parametrize("name", dynamo_captures.NAMES)
def test_every_captured_event_of_dynamo_is_shown(name: str) -> None:
    messages = dynamo_captures.messages_of(name)
    config: SourceConfig | NatsConfig = (
        SourceConfig(endpoint="tcp://engine:5557", type=SourceType.DYNAMO)
        if messages[0].frames
        else NatsConfig(name="fleet", type=SourceType.DYNAMO)
    )
    tap = Tap(config)
    incoming = [Incoming(0, list(one.frames) or [one.payload], "", one.subject) for one in messages]
    shown = seen(tap, *incoming)
    blocks = Counter(one.kind.value for one in shown for _ in one.block_hashes or [""] if one.kind in EVENTS)
    steps = dynamo_captures.published(name).steps.values()
    assert blocks == Counter(step[0] for rank in steps for step in rank if step[0] != "life")
    assert {one.kind for one in shown}.isdisjoint({Kind.REJECTED, Kind.GAP})


def bus_message(worker: str, seq: int, data: bytes, control: Control = Control.NONE) -> Incoming:
    address = Address(worker, 0, "m", "vllm")
    headers = numbered(address_headers("5eed", address), 1, seq, control)
    return Incoming(0, [data], "", subject_of("kvevents", address), headers)


def test_each_worker_of_a_bus_has_numbers_of_its_own() -> None:
    tap = Tap(NatsConfig(name="fleet", type=SourceType.VLLM))
    found = seen(tap, *(bus_message(worker, seq, payload(CLEARED, rank=0)) for worker, seq in
                        (("a", 1), ("b", 9), ("a", 2), ("b", 11))))  # fmt: skip
    assert [(one.worker, one.kind) for one in found] == [
        ("a/0", "clear"), ("b/0", "clear"), ("a/0", "clear"), ("b/0", "gap"), ("b/0", "clear")
    ]  # fmt: skip


def test_a_relay_that_lost_something_is_told() -> None:
    tap = Tap(NatsConfig(name="fleet", type=SourceType.VLLM))
    life, fence = seen(tap, bus_message("a", 0, b"", Control.LIFE), bus_message("a", 5, b"", Control.FENCE))
    assert (life.kind, fence.kind) == (Kind.LIFE, Kind.FENCE)


def test_raw_is_the_payload_as_it_was_sent() -> None:
    (message,) = seen(Tap(SOURCE, raw=True), frames(1, {**REMOVED, "block_hashes": [b"\x01\xff"]}))
    assert message.kind is Kind.MESSAGE
    assert json.loads(json_of(message))["payload"][1][0]["block_hashes"] == ["0x01ff"]
    (odd,) = seen(Tap(SOURCE, raw=True), Incoming(0, [b"", bytes(8), b"\xc1"]))
    assert odd.payload_hex == "c1"


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (Wanted(), ["store", "remove", "clear", "rejected"]),
        (Wanted(events=("remove",)), ["remove", "rejected"]),
        (Wanted(hashes="00000000000000c"), ["store", "rejected"]),
        (Wanted(tier="cpu_dram"), ["remove", "clear", "rejected"]),
        (Wanted(worker="gpu"), ["store", "remove", "clear", "rejected"]),
        (Wanted(worker="other"), []),
        (Wanted(rank=3), []),
    ],
)
def test_filters_choose_events_and_never_hide_what_was_refused_of_a_worker(wanted: Wanted, kinds: list[str]) -> None:
    found = sorted(seen(Tap(SOURCE), frames(0, STORED, REMOVED, CLEARED, ODD)), key=lambda one: one.kind == "rejected")
    assert [one.kind for one in found if wanted.wants(one)] == kinds


def test_a_terminal_gets_nothing_that_it_would_obey() -> None:
    line = line_of(Seen(0, Kind.REJECTED, "w", reason="medium", detail="\x1b[2J"))
    assert "\x1b" not in line
    assert "\\x1b[2J" in line


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits() -> None:
    inbox = Inbox(messages_max=2, bytes_max=1000)
    for size in (10, 2000, 10, 10):
        inbox.put(Incoming(0, [bytes(size)]))
    assert (inbox.dropped(), inbox.dropped()) == (2, 0)
    assert [len(one.frames[0]) for one in (inbox.get(0), inbox.get(0)) if one] == [10, 10]
    assert inbox.get(0) is None
    inbox.fail(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        inbox.get(0)
