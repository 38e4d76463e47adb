"""On which line of a TOML file a key stands."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from typing import Any

_PART = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")


def line_of(text: str, key: str) -> int | None:
    """Line (from 1) of the statement that gives `key`, as `sources[1].endpoint`; failing that, of its table.

    The standard parser drops positions, so the place is found by parsing the file up to a line: every statement ends
    at a line's end, and the first prefix that has the key ends with the statement that gave it. `text` is valid TOML.
    """
    lines = text.split("\n")
    path: list[str | int] = [int(number) if number else name for name, number in _PART.findall(key)]
    while path:
        end = bisect_left(range(len(lines) + 1), True, key=lambda stop: _has(_statements(lines, stop)[1], path))
        if end <= len(lines):
            return _statements(lines, end - 1)[0] + 1
        path.pop()
    return None


def _statements(lines: list[str], stop: int) -> tuple[int, dict[str, Any]]:
    """The whole statements within the first `stop` lines: how many lines they take, and what they say."""
    while True:
        try:
            return stop, tomllib.loads("\n".join(lines[:stop]))
        except tomllib.TOMLDecodeError:
            stop -= 1


def _has(table: Any, path: list[str | int]) -> bool:
    for part in path:
        if isinstance(part, int):
            if not isinstance(table, list) or part >= len(table):
                return False
        elif not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True
