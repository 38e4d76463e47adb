"""Opening in passing what differs only in number and payload: never another answer than opening it in full."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from kvcensus.daemon.config import SourceType
from kvcensus.daemon.relay.convention import CONTROL, ENGINE, EPOCH, MESSAGE_ID, MODEL, RANK, SEQ, SOURCE, WORKER
from kvcensus.daemon.sources.nats_headers import Headers
from kvcensus.daemon.sources.opening import Opening, open_message
from kvcensus.daemon.sources.plain_messages import PlainMessages
from kvcensus.daemon.streams.delivery import Delivery

SUBJECT = "kvevents.m.w.0"
Lines = list[tuple[str, str]]

numbers = st.one_of(st.integers(0, 30).map(str), st.sampled_from(["", "-1", "007", "x", "9" * 18, "9" * 20]))
odd_lines = st.one_of(
    st.tuples(st.sampled_from([SEQ, RANK]), numbers),
    st.tuples(st.sampled_from([SOURCE, WORKER, MODEL, EPOCH, ENGINE]), st.sampled_from(["a", "%41", "1", "vllm"])),
    st.tuples(st.just(CONTROL), st.sampled_from(["fence", "life"])),
    st.tuples(st.just(MESSAGE_ID), st.sampled_from(["a.0.1", f"x\r\n{SEQ}: 9"])),
)
usual: Lines = [(SOURCE, "a"), (WORKER, "w"), (EPOCH, "1"), (SEQ, "3")]
lines: st.SearchStrategy[Lines] = st.lists(odd_lines, max_size=2).flatmap(lambda odd: st.permutations(usual + odd))


def headers(*said: tuple[str, str]) -> Headers:
    text = "".join(f"{name}: {value}\r\n" for name, value in said)
    return Headers(f"NATS/1.0\r\n{text}\r\n".encode())


def renumbered(said: Lines, number: str) -> Lines:
    """The same, as the next message of its relay would say it."""
    return [(name, number if name == SEQ else f"id.{number}" if name == MESSAGE_ID else value) for name, value in said]


def opened(said: Headers, payload: bytes) -> Opening:
    return open_message(SourceType.VLLM, "p-", SUBJECT, said, payload)


def in_passing(plain: PlainMessages, said: Headers, payload: bytes) -> Opening | None:
    found = plain.open(SUBJECT.encode(), said.raw)
    if found is None:
        return None
    known, seq = found
    assert (known.seq, known.payload) == (-1, b"")
    return Opening(
        [
            Delivery(
                known.worker,
                known.rank,
                known.lineage,
                known.epoch,
                seq,
                payload,
                engine=known.engine,
                model=known.model,
            )
        ],
        [],
    )


@given(st.lists(st.tuples(lines, numbers, st.sampled_from([b"", b"x"])), max_size=3))
@example([([(SOURCE, "a"), (WORKER, "a"), (EPOCH, "1"), (SEQ, "3"), (MESSAGE_ID, "a.3")], "4", b"x")])
def test_what_is_opened_in_passing_says_what_it_says_in_full(messages: list[tuple[Lines, str, bytes]]) -> None:
    plain = PlainMessages()
    for said, next_number, payload in messages:
        for message in (headers(*said), headers(*renumbered(said, next_number)), headers(*said)):
            found = in_passing(plain, message, payload)
            assert found is None or found == opened(message, payload)
            plain.note(SUBJECT.encode(), message.raw, opened(message, payload))


def test_the_messages_of_a_relay_are_opened_in_full_once() -> None:
    plain = PlainMessages()
    said = [(SOURCE, "a"), (WORKER, "w"), (EPOCH, "1"), (SEQ, "0"), (MESSAGE_ID, "a.w.1.0")]
    first = headers(*said)
    assert in_passing(plain, first, b"") is None
    plain.note(SUBJECT.encode(), first.raw, opened(first, b""))
    for number in ("0", "1", "17"):
        message = headers(*renumbered(said, number))
        assert in_passing(plain, message, b"p") == opened(message, b"p")
    assert in_passing(plain, headers(*said, (EPOCH, "2")), b"") is None


def test_a_number_that_is_said_twice_is_read_in_full_each_time() -> None:
    plain = PlainMessages()
    twice = headers((SOURCE, "a"), (WORKER, "w"), (SEQ, "3"), (SEQ, "3"))
    plain.note(SUBJECT.encode(), twice.raw, opened(twice, b""))
    assert in_passing(plain, twice, b"") is None


def test_an_address_that_was_never_noted_is_not_known() -> None:
    plain = PlainMessages()
    said = headers((SOURCE, "a"), (WORKER, "w"), (SEQ, "0"))
    plain.note(SUBJECT.encode(), said.raw, opened(said, b""))
    assert plain.open(b"kvevents.m.w.1", said.raw) is None


def test_headers_that_no_relay_would_send_are_not_kept() -> None:
    plain = PlainMessages()
    long = headers((SOURCE, "a"), (WORKER, "w"), (SEQ, "0"), ("X", "x" * 10_000))
    plain.note(SUBJECT.encode(), long.raw, opened(long, b""))
    assert in_passing(plain, long, b"") is None


def test_headers_are_read_when_they_are_asked_for() -> None:
    said = headers(("A", " b "), ("C", "d:e"))
    assert dict(said) == {"A": "b", "C": "d:e"}
    assert (said["C"], said.get("x"), len(said)) == ("d:e", None, 2)
    assert not headers()
