"""Wildcards in subjects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcensus.daemon.sources.subjects import matches, overlap

TOKENS = st.lists(st.sampled_from("ab*"), min_size=1, max_size=4)
PATTERNS = st.builds(lambda tokens, rest: ".".join(tokens + rest), TOKENS, st.sampled_from([[], [">"]]))
SUBJECTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "subject", "does"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
    ],
)
def test_what_a_pattern_matches(pattern: str, subject: str, does: bool) -> None:
    assert matches(pattern, subject) is does


@given(PATTERNS, PATTERNS, SUBJECTS)
def test_a_subject_of_two_patterns_is_in_their_overlap(one: str, other: str, subject: str) -> None:
    assert overlap(one, other) is overlap(other, one)
    if matches(one, subject) and matches(other, subject):
        assert overlap(one, other)


@pytest.mark.parametrize(("one", "other"), [("a.*", "b.*"), ("a", "a.b"), ("a.b.>", "a.c.>"), ("a.*.c", "a.*.d")])
def test_patterns_apart(one: str, other: str) -> None:
    assert not overlap(one, other)
