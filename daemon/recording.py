"""Recordings of a live stream: raw messages in a file, one JSON line each, gzip when the name ends in `.gz`.

    {"t": receive time in ns since the Unix epoch, "frames": [base64 topic, base64 sequence number, base64 payload]}

The writer flushes whole lines, so what a killed recorder leaves can be read up to its last flush.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

MAX_LINE_BYTES = 128 << 20
"""Longest line that is read: a message of 64 MiB, which is the most that a source accepts, in base64."""

FLUSH_INTERVAL_S = 1.0
"""How much of a recording a killed recorder may lose."""

_CHUNK_BYTES = 256 << 10
_GZIP = 16 + zlib.MAX_WBITS
_SEQ_BYTES = 8


class RecordingError(Exception):
    """A recording cannot be read or written. `line` counts from 1; None when it is not about a line."""

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


class RecordedMessage(msgspec.Struct, frozen=True):
    """One message as it came: `received_ns` since the Unix epoch, and its frames."""

    received_ns: int = msgspec.field(name="t")
    frames: tuple[bytes, ...]

    @property
    def seq(self) -> int | None:
        """The sequence number, None when this is not [topic, 8-byte number, payload]."""
        if len(self.frames) != 3 or len(self.frames[1]) != _SEQ_BYTES:
            return None
        return int.from_bytes(self.frames[1], "big")

    @property
    def payload(self) -> bytes:
        """The last frame."""
        return self.frames[-1] if self.frames else b""


_decode_line = msgspec.json.Decoder(RecordedMessage).decode
_encode_line = msgspec.json.Encoder().encode


class Recording:
    """The messages of a file, read anew by each iteration and never held at once."""

    def __init__(self, path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.path = path
        self._max_line_bytes = max_line_bytes

    def __iter__(self) -> Iterator[RecordedMessage]:
        """Raises RecordingError at a line that is no message, too long, or cut off by the end of the file."""
        number = 0
        try:
            for number, (line, is_whole) in enumerate(self._lines(), 1):
                if len(line) > self._max_line_bytes:
                    raise RecordingError(self.path, number, f"is longer than {self._max_line_bytes} bytes")
                try:
                    yield _decode_line(line)
                except msgspec.MsgspecError as error:
                    reason = f"is no recorded message: {error}" if is_whole else "the last line is cut off"
                    raise RecordingError(self.path, number, reason) from error
        except OSError as error:
            raise RecordingError(self.path, None, error.strerror or str(error)) from error
        except zlib.error as error:
            raise RecordingError(self.path, number + 1, f"the gzip data is damaged: {error}") from error

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """Each line, and whether it was ended. The last one is the first that grows too long."""
        begun: list[bytes] = []
        begun_bytes = 0
        for chunk in self._chunks():
            first, *more = chunk.split(b"\n")
            begun.append(first)
            begun_bytes += len(first)
            if more:
                *whole, rest = more
                for line in (b"".join(begun), *whole):
                    yield line, True
                begun, begun_bytes = [rest], len(rest)
            if begun_bytes > self._max_line_bytes:
                break
        if begun_bytes:
            yield b"".join(begun), False

    def _chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            raw = iter(partial(file.read, _CHUNK_BYTES), b"")
            yield from _inflated(raw) if self.path.suffix == ".gz" else raw


def _inflated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack gzip members, the last of which may lack its end."""
    member = zlib.decompressobj(_GZIP)
    for chunk in chunks:
        rest = chunk
        while rest:
            if member.eof:
                member = zlib.decompressobj(_GZIP)
            yield member.decompress(rest, _CHUNK_BYTES)
            rest = member.unused_data if member.eof else member.unconsumed_tail


class RecordingWriter:
    """Writes a new recording. Never overwrites one."""

    def __init__(self, path: Path, flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        """Raises RecordingError when the file exists or cannot be made."""
        try:
            self._file = path.open("xb")
        except FileExistsError as error:
            raise RecordingError(path, None, "exists already; it is not overwritten") from error
        except OSError as error:
            raise RecordingError(path, None, error.strerror or str(error)) from error
        self._path = path
        self._gzip = zlib.compressobj(wbits=_GZIP) if path.suffix == ".gz" else None
        self._flush_interval_s = flush_interval_s
        self._flushed_at = time.monotonic()
        self._is_dirty = False

    def write(self, message: RecordedMessage) -> None:
        """Append one message, and flush when the last flush is long ago. Raises RecordingError."""
        line = _encode_line(message) + b"\n"
        self._put(self._gzip.compress(line) if self._gzip is not None else line)
        self._is_dirty = True
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Call it when nothing comes, so that the last message does not wait for the next. Raises RecordingError."""
        if self._is_dirty and time.monotonic() - self._flushed_at >= self._flush_interval_s:
            self.flush()

    def flush(self) -> None:
        """Make all that was written readable by others. Raises RecordingError."""
        if self._gzip is not None:
            self._put(self._gzip.flush(zlib.Z_SYNC_FLUSH))
        self._put(b"", flush=True)
        self._flushed_at = time.monotonic()
        self._is_dirty = False

    def close(self) -> None:
        """End the file. Raises RecordingError."""
        if self._file.closed:
            return
        try:
            if self._gzip is not None:
                self._put(self._gzip.flush(zlib.Z_FINISH))
            self._put(b"", flush=True)
        finally:
            try:
                self._file.close()
            except OSError as error:
                raise RecordingError(self._path, None, error.strerror or str(error)) from error

    def _put(self, data: bytes, *, flush: bool = False) -> None:
        try:
            self._file.write(data)
            if flush:
                self._file.flush()
        except OSError as error:
            raise RecordingError(self._path, None, error.strerror or str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
