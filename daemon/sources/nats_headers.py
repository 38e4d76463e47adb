"""The headers of a message of NATS, unread as long as nobody asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

VERSION_LINE = b"NATS/1.0\r\n"


class Headers(Mapping[str, str]):
    """Headers as the server sent them. `raw` begins with the line of the version and ends with an empty one."""

    __slots__ = ("_read", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._read: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._read is None:
            self._read = header_lines(self.raw[len(VERSION_LINE) :])
        return self._read

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def header_lines(raw: bytes) -> dict[str, str]:
    """Names and values of lines of headers. nats-py looks at each character of a name, and takes longer for it."""
    lines = raw.decode("utf-8", "replace").split("\r\n")
    return {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
