"""Rows as aligned text, whole at any width of the terminal, so that a pipe can take them apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..printable import printable

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+ s)?")


def columns(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """One line a row, under `head`. None and "" are shown as `-`, numbers stand to the right."""
    cells = [[_shown(value) for value in row] for row in rows]
    numeric = [all(cell == "-" or cell[:1].isdigit() for cell in column) for column in zip(*cells)] or [False] * len(
        head
    )
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)
        ).rstrip()
        for row in [list(head), *cells]
    )


def _shown(value: object) -> str:
    return "-" if value is None or value == "" else printable(str(value))
