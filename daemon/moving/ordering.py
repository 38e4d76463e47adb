"""Rows in the order of their keys, in bounded memory: sorted in parts that are written to files and merged."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from struct import Struct

Row = tuple[bytes, bytes]
"""Key and value."""

PART_ROWS = 100_000
"""Rows in memory at a time: some 50 MB."""
_MOST_PARTS = 64
"""Parts that are open at a time: two indexes are sorted at once, and 1,024 files may be open."""
_SIZES = Struct(">II")


def in_order(rows: Iterable[Row], directory: Path, part_rows: int = PART_ROWS) -> Iterator[Row]:
    """The rows by key. Parts are files in `directory`, which has no others, and are gone once they are merged."""
    rows = iter(rows)
    parts: list[Path] = []
    number = 0
    while part := sorted(islice(rows, part_rows)):
        if not parts and len(part) < part_rows:
            yield from part
            return
        parts.append(_write(directory / str(number), part))
        number += 1
        if len(parts) == _MOST_PARTS:
            parts = [_write(directory / str(number), _merged(parts))]
            number += 1
    yield from _merged(parts)


def _merged(parts: list[Path]) -> Iterator[Row]:
    yield from heapq.merge(*map(_read, parts))
    for part in parts:
        part.unlink()


def _write(path: Path, rows: Iterable[Row]) -> Path:
    with path.open("xb") as file:
        for key, value in rows:
            file.write(_SIZES.pack(len(key), len(value)) + key + value)
    return path


def _read(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        while sizes := file.read(_SIZES.size):
            key_size, value_size = _SIZES.unpack(sizes)
            row = file.read(key_size + value_size)
            yield row[:key_size], row[key_size:]
