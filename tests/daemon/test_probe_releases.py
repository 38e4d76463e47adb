"""Which releases may have written what was seen: the right one is always among them, and never another engine alone."""

from __future__ import annotations

import re

import msgspec
import pytest

from kvcensus.backends.model import CacheTier
from kvcensus.daemon.probe.dynamo_releases import DynamoCandidates
from kvcensus.daemon.probe.releases import FAMILIES, Candidates, event_of, of_framing, ranges
from kvcensus.daemon.simulate.cache import Event, Removed, Stored
from kvcensus.daemon.simulate.chains import Identity
from kvcensus.daemon.simulate.wire import FORMATS, Wire
from kvcensus.translators.dynamo_envelope import FRAME_HEADER_BYTES
from kvcensus.translators.sglang import EMPTY_KEY_HASH
from kvcensus.translators.wire import raw_events

from ..captures_reader import capture_names, load_capture
from ..dynamo_captures import NAMES, messages_of, published
from ..translators import sglang_families, wire_families

Version = tuple[int, ...]
CAPTURES = capture_names("vllm") + capture_names("sglang")
LATEST = (99,)
_PARTS = 4


def version(text: str) -> Version:
    numbers = [int(one) for one in re.findall(r"\d+", text)]
    return tuple(numbers + [0] * (_PARTS - len(numbers)))


def includes(found: list[tuple[str, str]], release: str) -> bool:
    wanted = version(release)
    return any(version(first) <= wanted <= (version(last) if last else LATEST) for first, last in found)


def candidates(*payloads: bytes) -> Candidates:
    seen = Candidates()
    for payload in payloads:
        has_rank = len(msgspec.msgpack.decode(payload, type=list[msgspec.Raw])) > 2
        for packed in raw_events(payload):
            event = event_of(packed)
            assert event is not None
            seen.see(event, has_rank)
    return seen


def releases(*payloads: bytes) -> dict[str, list[tuple[str, str]]]:
    return ranges(candidates(*payloads).left)


@pytest.mark.parametrize("name", CAPTURES)
def test_no_message_of_a_capture_is_taken_for_one_of_another_release(name: str) -> None:
    engine, release, _ = name.split("-", 2)
    for message in load_capture(name).messages:
        assert includes(releases(message.payload).get(engine, []), release), message.seq


@pytest.mark.parametrize("name", CAPTURES)
def test_a_whole_capture_is_of_its_engine_and_no_other(name: str) -> None:
    engine, release, _ = name.split("-", 2)
    seen = candidates(*(message.payload for message in load_capture(name).messages))
    found = ranges(seen.left)
    assert list(found) == [engine]
    assert includes(found[engine], release)
    with_topic = release in ("0.32.0", "0.5.23")
    narrowed = ranges(of_framing(seen.left, with_topic))
    assert includes(narrowed[engine], release)
    assert not of_framing(seen.left, not with_topic) or found != narrowed


def test_what_a_capture_comes_to() -> None:
    def of(name: str) -> dict[str, list[tuple[str, str]]]:
        return releases(*(message.payload for message in load_capture(name).messages))

    assert of("vllm-0.9.2-basic") == {"vllm": [("0.9.1", "0.10.1.1")]}
    assert of("vllm-0.10.2-salt") == {"vllm": [("0.10.2", "0.13.0")]}
    assert of("vllm-0.32.0-xxhash-bytes") == {"vllm": [("0.24.0", "")]}
    assert of("sglang-0.5.23-page1") == {"sglang": [("0.5.20", "")]}


FAMILY_CASES = [
    *(("vllm", family, wire_families.stored, wire_families.removed) for family in wire_families.FAMILIES),
    *(("sglang", family, sglang_families.stored, sglang_families.removed) for family in sglang_families.FAMILIES),
]


@pytest.mark.parametrize(("engine", "family", "stored", "removed"), FAMILY_CASES)
def test_every_form_is_known(engine, family, stored, removed) -> None:  # type: ignore[no-untyped-def]
    first = re.findall(r"[\d.]+(?:post\d)?", family.releases)[0]
    parent = EMPTY_KEY_HASH if first.startswith("0.4") else None
    tokens = (3, 1, 4, 1)
    page = hash(tokens) if first.startswith("0.4") else 7
    events = [
        stored((page,), parent_block_hash=parent, token_ids=list(tokens)),
        removed((page,)),
        {"type": "AllBlocksCleared"},
    ]
    for some in (events, events[:1], events[1:2], events[2:]):
        found = releases(family.batch(some))
        assert includes(found[engine], first), some


@pytest.mark.parametrize("name", FORMATS)
def test_every_simulated_release_is_among_what_is_found(name: str) -> None:
    form = FORMATS[name]
    wire = Wire(form, 0, 0)
    hashes = (b"\xff" * 8,)
    events: list[Event] = [Stored(Identity(), hashes, None, (1,)), Removed(hashes, CacheTier.HBM)]
    engine, release = {"vllm-0.9": "vllm-0.9.1", "vllm-0.10": "vllm-0.10.2"}.get(name, name).split("-")
    seen = candidates(wire.batch(1.5, events))
    assert includes(ranges(seen.left)[engine], release)
    with_topic = form.framing.value == "new"
    later = {"vllm-0.24": "0.25.1", "vllm-0.32": "0.32.0"}.get(name, release)
    if form.maps or with_topic:
        assert includes(ranges(of_framing(seen.left, with_topic))[engine], later)


def test_one_signed_integer_or_one_large_one_tells_the_engine() -> None:
    family = wire_families.FAMILIES[2]
    either = {"vllm": [("0.10.2", "0.13.0")], "sglang": [("0.5.9", "0.5.19")]}
    assert releases(family.batch([wire_families.stored((5,))])) == either
    assert list(releases(family.batch([wire_families.stored((-5,))]))) == ["sglang"]
    assert list(releases(family.batch([wire_families.stored((1 << 63,))]))) == ["vllm"]
    assert list(releases(family.batch([wire_families.stored((b"h" * 32,))]))) == ["vllm"]
    assert releases(family.batch([wire_families.stored((b"h" * 16,))])) == {"vllm": [("0.13.0", "0.13.0")]}


def test_a_hash_of_a_connector_says_nothing_of_the_release() -> None:
    family = wire_families.FAMILIES[2]
    connector = wire_families.stored((-5,), medium="cpu", token_ids=[], block_size=0)
    assert list(releases(family.batch([connector]))) == ["vllm"]


def test_the_salt_of_sglang_tells_it_from_vllm() -> None:
    salted = sglang_families.ARRAYS.batch([sglang_families.stored((5,), cache_salt="s")])
    assert releases(salted) == {"sglang": [("0.5.18", "0.5.19")]}
    named = wire_families.FAMILIES[3].batch([wire_families.stored((5,), lora_name="a")])
    assert releases(named) == {"vllm": [("0.14.0", "0.16.0")]}


def test_later_keys_of_vllm_narrow_it() -> None:
    def of(**keys: object) -> dict[str, list[tuple[str, str]]]:
        event = dict.fromkeys(("parent_block_hash", "lora_id", "lora_name"))
        event |= {"type": "BlockStored", "block_hashes": [1], "token_ids": [1], "block_size": 1, "medium": "GPU"}
        return releases(msgspec.msgpack.encode([1.5, [event | keys], 0]))

    assert of() == {"vllm": [("0.24.0", "")], "sglang": [("0.5.22", "")]}
    assert of(group_idx=0) == {"vllm": [("0.24.0", "")]}
    assert of(locality="LOCAL") == {"vllm": [("0.26.0", "")]}
    assert of(ownership="kvcr") == {"vllm": [("0.29.0", "")]}
    assert of(group_idx=0, session_id="s") == {"vllm": [("0.30.0", "")]}
    assert of(group_idx=0, invented=1) == {"vllm": [("0.33.0", "")]}


def test_forms_of_two_releases_are_of_none() -> None:
    old, new = (family.batch([wire_families.stored()]) for family in wire_families.FAMILIES[3:5])
    assert releases(old, new) == {}


def test_the_families_stand_in_the_order_of_their_releases() -> None:
    for engine in ("vllm", "sglang"):
        mine = [one for one in FAMILIES if one.engine == engine]
        bounds = [version(text) for one in mine for text in (one.first, one.last) if text]
        assert bounds == sorted(bounds)


@pytest.mark.parametrize("name", NAMES)
def test_every_captured_dynamo_is_among_what_is_found(name: str) -> None:
    payloads = [one.frames[-1][FRAME_HEADER_BYTES:] if one.frames else one.payload for one in messages_of(name)]
    minor = ".".join(published(name).release.split(".")[:2])
    together = DynamoCandidates()
    for payload in payloads:
        alone = DynamoCandidates()
        alone.see(payload)
        assert includes(alone.ranges(), minor)
        if name != "dynamo-0.9.1-nats":  # its relay still publishes JSON, its workers do not
            together.see(payload)
    if together.forms:
        assert includes(together.ranges(), minor)
