from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.backends.model import MAX_HASH_BYTES
from kvcensus.translators.hashes import BadHash, hash_bytes, hashes_bytes, unpack_hashes

integers = st.integers(-(2**63), 2**64 - 1)
strings = st.binary(min_size=1, max_size=MAX_HASH_BYTES)


def packed(values: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(values))


@given(st.integers(0, 2**64 - 1))
def test_the_signed_and_the_unsigned_form_of_a_pattern_are_the_same_block(pattern: int) -> None:
    signed = pattern - 2**64 if pattern >= 2**63 else pattern
    assert hash_bytes(signed) == hash_bytes(pattern) == pattern.to_bytes(8, "big")


@given(integers, integers)
def test_two_patterns_are_two_blocks(one: int, other: int) -> None:
    assert (hash_bytes(one) == hash_bytes(other)) == (one % 2**64 == other % 2**64)


@given(strings)
def test_a_byte_string_stays_as_it_is(hash_: bytes) -> None:
    assert hash_bytes(hash_) == hash_


@given(st.binary(min_size=32, max_size=32))
def test_a_cut_digest_is_the_integer_that_vllm_would_have_sent(digest: bytes) -> None:
    sent = int.from_bytes(digest, "big") & (2**64 - 1)
    assert hash_bytes(digest, cut=True) == hash_bytes(sent)


@given(st.lists(integers | strings, max_size=40), st.booleans())
def test_mixed_hashes_come_out_one_by_one(values: list[int | bytes], cut: bool) -> None:
    expected = tuple(hash_bytes(value, cut) for value in values)
    assert hashes_bytes(values, cut) == expected
    assert unpack_hashes(packed(values), cut) == (expected, any(isinstance(value, int) for value in values))


@given(st.integers(0, 2000), st.sampled_from([1, 8, 9, 16, 32, 64, 240, None]), st.booleans(), st.randoms())
def test_runs_of_equal_width_come_out_the_same_way(count: int, size: int | None, cut: bool, random: Random) -> None:
    values: list[int | bytes]
    if size is None:
        values = [random.getrandbits(63) - random.choice([0, 2**63]) for _ in range(count)]
    else:
        values = [random.randbytes(size) for _ in range(count)]
    expected = tuple(hash_bytes(value, cut) for value in values)
    assert unpack_hashes(packed(values), cut) == (expected, size is None and count > 0)


def test_small_integers_among_wide_ones_are_seen() -> None:
    values = [2**63, 5, -1, 2**40, 2**63 + 1]
    assert unpack_hashes(packed(values))[0] == tuple((value % 2**64).to_bytes(8, "big") for value in values)


@pytest.mark.parametrize(
    "values",
    [
        [2**63, b"1234567", b"12345678", 100],
        [2**63, 2**63, 5, b"\xcf\xcf\xcf\xcf\xcf"],
        [b"abc", b"abc\xc4", b"xy"],
        [b"abc", b"ab", b"abcd"],
        [b"abc", b"\0\0\0\0\x03\0"],
        [b"abc", 0x0300000000030000, 7],
    ],
)
def test_items_that_only_look_as_wide_as_the_first_are_seen(values: list[int | bytes]) -> None:
    assert unpack_hashes(packed(values))[0] == hashes_bytes(values)


@pytest.mark.parametrize(
    ("values", "position"),
    [
        ([1, "a"], 1),
        ([2**63, 2**63, True], 2),
        ([1.0], 0),
        ([b"ok", b""], 1),
        ([b"x" * (MAX_HASH_BYTES + 1)], 0),
        ([b"x" * 300, 1], 0),
        ([1, None], 1),
        ([[1]], 0),
    ],
)
def test_a_bad_hash_is_named_by_its_position(values: list[object], position: int) -> None:
    with pytest.raises(BadHash) as caught:
        unpack_hashes(packed(values))
    assert caught.value.position == position


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, b"", b"x" * (MAX_HASH_BYTES + 1)])
def test_a_hash_of_no_acceptable_length_is_refused(value: int | bytes) -> None:
    with pytest.raises(BadHash):
        hash_bytes(value)


@pytest.mark.parametrize("value", [None, 5, "abc", {}, b"abc"])
def test_what_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="no array"):
        unpack_hashes(packed(value))
