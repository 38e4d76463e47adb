"""Subjects of NATS with wildcards. Pure."""

from __future__ import annotations


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one of a pattern's: `*` is any one token, `>` at the end is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(one in ("*", other) for one, other in zip(wanted, given))


def overlap(one: str, other: str) -> bool:
    """Whether some subject is one of both patterns'."""
    tokens, others = one.split("."), other.split(".")
    for token, another in zip(tokens, others):
        if ">" in (token, another):
            return True
        if token != another and "*" not in (token, another):
            return False
    return len(tokens) == len(others)
