"""What a relayed message says: our own round trip, other people's relays, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcensus.daemon.relay.convention import (
    CONTROL,
    ENGINE,
    EPOCH,
    MAX_NAME,
    MODEL,
    RANK,
    SEQ,
    SOURCE,
    TOPIC,
    WORKER,
    Address,
    address_headers,
    delivery_of,
    every_subject,
    message_id,
    numbered,
    subject_of,
)
from kvcensus.daemon.streams.delivery import Control, Delivery

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
ranks = st.one_of(st.none(), st.integers(0, 1 << 40))
addresses = st.builds(
    Address,
    worker=names,
    rank=ranks,
    model=st.one_of(st.just(""), names),
    engine=st.sampled_from(["vllm", "sglang"]),
    topic=st.one_of(st.just(""), names),
)
controls = st.sampled_from([control for control in Control if control])


def headers_of(address: Address, epoch: int, seq: int, control: Control) -> dict[str, str]:
    return numbered(address_headers("5eed", address), epoch, seq, control)


@given(addresses, st.integers(0, 1 << 40), st.integers(0, (1 << 63) - 1), st.binary(max_size=30))
@example(Address("w", None, "_", "vllm"), 0, 0, b"")
@example(Address("-", 0, "%5F", "vllm", "a b\r\n"), 0, 0, b"")
def test_a_message_comes_back_as_it_was(address: Address, epoch: int, seq: int, payload: bytes) -> None:
    delivery = delivery_of("mapped.by.the.server", headers_of(address, epoch, seq, Control.NONE), payload)
    assert delivery == Delivery(
        worker=address.worker,
        rank=address.rank,
        lineage="5eed",
        epoch=epoch,
        seq=seq,
        payload=payload,
        engine=address.engine,
        model=address.model,
    )


@given(addresses, st.integers(0, 1 << 40), st.integers(-1, 1 << 40), controls)
def test_a_control_message_comes_back_as_it_was(address: Address, epoch: int, seq: int, control: Control) -> None:
    delivery = delivery_of(subject_of("kvevents", address), headers_of(address, epoch, seq, control), b"")
    assert isinstance(delivery, Delivery)
    assert (delivery.control, delivery.epoch, delivery.seq) == (control, epoch, seq)


@given(addresses)
def test_the_subject_alone_says_whose_a_message_is(address: Address) -> None:
    delivery = delivery_of(subject_of("kvevents", address), {}, b"payload")
    assert isinstance(delivery, Delivery)
    assert (delivery.worker, delivery.rank, delivery.model) == (address.worker, address.rank, address.model)
    assert (delivery.lineage, delivery.seq) == ("", -1)


@given(addresses)
def test_a_subject_has_four_tokens_of_safe_characters(address: Address) -> None:
    assert re.fullmatch(r"kvevents(\.[A-Za-z0-9_%-]+){3}", subject_of("kvevents", address))


@given(addresses, st.integers(0, 9), st.integers(-1, 9), st.one_of(st.just(Control.NONE), controls))
def test_every_header_is_one_line_of_ascii(address: Address, epoch: int, seq: int, control: Control) -> None:
    values = [*headers_of(address, epoch, seq, control).values(), message_id("5eed", address, epoch, seq, control)]
    assert all(re.fullmatch(r"[!-~]+", value) for value in values)


@given(st.text(max_size=40), st.dictionaries(st.sampled_from([WORKER, SEQ, EPOCH, RANK, SOURCE]), st.text(max_size=8)))
def test_anything_is_a_delivery_or_a_reason(subject: str, headers: dict[str, str]) -> None:
    delivery = delivery_of(subject, headers, b"")
    assert isinstance(delivery, str | Delivery)
    if isinstance(delivery, Delivery):
        assert delivery.worker


def test_subjects_are_written_as_the_specification_shows() -> None:
    llama = Address("pod-7.engines", 0, "meta-llama/Llama-3.1-8B")
    assert subject_of("kvevents", llama) == "kvevents.meta-llama%2FLlama-3%2E1-8B.pod-7%2Eengines.0"
    assert subject_of("kvalive", Address("pod", None)) == "kvalive._.pod.-"
    assert subject_of("kvevents", Address("wörker", None, "_")) == "kvevents.%5F.w%C3%B6rker.-"
    assert every_subject("kvevents") == "kvevents.*.*.*"


def test_message_ids_tell_a_payload_from_a_control_message_of_the_same_number() -> None:
    ranked, plain = Address("w", 3), Address("w", None)
    assert message_id("5eed", ranked, 2, 17, Control.NONE) == "5eed.w/3.2.17"
    assert message_id("5eed", plain, 2, 17, Control.FENCE) == "5eed.w.2.17.fence"


def test_a_number_without_a_source_is_of_nobody() -> None:
    delivery = delivery_of("kvevents.m.w.0", {SEQ: "7"}, b"p")
    assert isinstance(delivery, Delivery)
    assert (delivery.lineage, delivery.seq, delivery.rank) == ("", 7, 0)


def test_a_source_without_a_number_says_nothing_of_order() -> None:
    delivery = delivery_of("kvevents.m.w.-", {SOURCE: "5eed"}, b"p")
    assert isinstance(delivery, Delivery)
    assert (delivery.lineage, delivery.seq, delivery.rank) == ("", -1, None)


def test_a_header_counts_more_than_the_subject() -> None:
    delivery = delivery_of("kvevents.m.w.3", {MODEL: "other", RANK: "4"}, b"p")
    assert isinstance(delivery, Delivery)
    assert (delivery.model, delivery.worker, delivery.rank) == ("other", "w", 4)


def test_with_the_worker_in_the_headers_the_subject_does_not_count() -> None:
    delivery = delivery_of("kvevents.m.w.3", {WORKER: "v"}, b"p")
    assert isinstance(delivery, Delivery)
    assert (delivery.model, delivery.worker, delivery.rank) == ("", "v", None)


REFUSED = {
    "no worker": ("kvevents.m.w", {}, b"", "PREFIX.MODEL.WORKER.RANK"),
    "empty worker": ("kvevents.m..0", {}, b"", "names"),
    "long worker": (f"kvevents.m.{'w' * (MAX_NAME + 1)}.0", {}, b"", "characters"),
    "bad rank": ("kvevents.m.w.x", {}, b"", "rank 'x'"),
    "negative rank": ("kvevents.m.w.0", {RANK: "-1"}, b"", RANK),
    "bad escape": ("kvevents.m.w%zz.0", {}, b"", "%"),
    "not UTF-8": ("kvevents.m.w%FF.0", {}, b"", "UTF-8"),
    "no number": ("kvevents.m.w.0", {SEQ: "1e3"}, b"", SEQ),
    "a number with a sign": ("kvevents.m.w.0", {SEQ: "+1"}, b"", SEQ),
    "a number beyond 63 bits": ("kvevents.m.w.0", {SEQ: str(1 << 63)}, b"", SEQ),
    "a payload before the first": ("kvevents.m.w.0", {SEQ: "-1", SOURCE: "s"}, b"p", SEQ),
    "negative epoch": ("kvevents.m.w.0", {EPOCH: "-1"}, b"", EPOCH),
    "unknown control": ("kvevents.m.w.0", {CONTROL: "stop", SOURCE: "s"}, b"", CONTROL),
    "a control with a body": ("kvevents.m.w.0", {CONTROL: "life", SOURCE: "s"}, b"p", "body of 1 bytes"),
    "a control of nobody": ("kvevents.m.w.0", {CONTROL: "fence", SEQ: "4"}, b"", SOURCE),
    "a fence of no number": ("kvevents.m.w.0", {CONTROL: "fence", SOURCE: "s"}, b"", SEQ),
    "a control of an empty source": ("kvevents.m.w.0", {CONTROL: "life", SOURCE: ""}, b"", SOURCE),
    "unknown engine": ("kvevents.m.w.0", {ENGINE: "tgi"}, b"", ENGINE),
    "a source of two lines": ("kvevents.m.w.0", {SOURCE: "a\nb", SEQ: "1"}, b"p", SOURCE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_wrong(case: str) -> None:
    subject, headers, payload, named = REFUSED[case]
    reason = delivery_of(subject, headers, payload)
    assert isinstance(reason, str)
    assert named in reason


def test_unknown_headers_and_topics_do_not_matter() -> None:
    delivery = delivery_of("kvevents.m.w.0", {"Kv-Later": "x", TOPIC: "kv@pod"}, b"p")
    assert isinstance(delivery, Delivery)
