"""The whole index as JSON lines, as of one moment.

One thread creates, reads and closes the backend's iterator, because a read transaction may belong to its thread. It
hands chunks to the event loop, and waits while the client is slow. A snapshot that fails half-way lacks the last
chunk of HTTP's chunked encoding, so that it cannot be taken for a complete one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Executor
from contextlib import closing
from http import HTTPStatus
from itertools import islice
from typing import cast

import msgspec
from aiohttp import web

from kvcensus.backends.errors import BackendError
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.model import CacheResidency

from ..config import HttpConfig
from ..logs import get_logger
from ..status import DaemonView
from .answers import RequestRefused
from .bodies import Residency, fields_of

NDJSON = "application/x-ndjson"

_CHUNK_BYTES = 256 * 1024
_CHUNKS_WAITING = 4
_LINES_AT_A_TIME = 100
_PAUSE_S = 50e-6
"""Given to the event loop every few hundred microseconds; else Python lets each of its turns wait for up to 5 ms."""
_STALL_S = 30.0
"""A client that takes no chunk for so long loses its snapshot: a copy of the index waits on disk for it."""

log = get_logger("http")

_encode_lines = msgspec.json.Encoder().encode_lines


def chunks(records: Iterator[CacheResidency]) -> Iterator[bytes]:
    """Records as JSON lines, in chunks of about 256 KiB."""
    buffer = bytearray()
    while batch := [Residency(*fields_of(record)) for record in islice(records, _LINES_AT_A_TIME)]:
        buffer += _encode_lines(batch)
        if len(buffer) >= _CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
        time.sleep(_PAUSE_S)
    if buffer:
        yield bytes(buffer)


class _Reading:
    """One snapshot being read. `run` belongs to a thread, the rest to the event loop."""

    def __init__(self, backend: IndexBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._room = threading.Semaphore(_CHUNKS_WAITING)
        self._stopped = False

    def run(self) -> None:
        """Read to the end, to an error or until stopped, and close the snapshot."""
        end: Exception | None = None
        try:
            records = cast(Generator[CacheResidency, None, None], self._backend.snapshot())
            with closing(records):
                for chunk in chunks(records):
                    self._room.acquire()
                    if self._stopped:
                        raise BackendError("the snapshot was stopped")
                    self._hand(chunk)
        except Exception as error:  # noqa: BLE001 - handed to the event loop, which raises or logs it
            end = error
        self._hand(end)

    def _hand(self, chunk: bytes | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

    async def next(self) -> bytes | None:
        """The next chunk, None at the end. Raises what the reading raised."""
        chunk = await self._chunks.get()
        if isinstance(chunk, Exception):
            raise chunk
        self._room.release()
        return chunk

    def stop(self) -> None:
        """Make the thread end soon, wherever it is."""
        self._stopped = True
        self._room.release()


class Snapshots:
    """The handler of snapshots: a limited number at a time."""

    def __init__(self, view: DaemonView, config: HttpConfig, threads: Executor) -> None:
        self._view = view
        self._readings_max = config.max_snapshots
        self._threads = threads
        self._readings: set[_Reading] = set()
        self._begun: list[web.Request] = []
        """Those whose answer has begun."""

    def stop(self) -> None:
        """End every snapshot that is under way, whether or not its client takes anything."""
        for reading in self._readings:
            reading.stop()
        for request in self._begun:
            _abort(request)

    async def snapshot(self, request: web.Request) -> web.StreamResponse:
        reading = self._begin()
        try:
            chunk = await reading.next()
            response = web.StreamResponse(headers={"Content-Type": NDJSON})
            await response.prepare(request)
            self._begun.append(request)
            try:
                while chunk is not None:
                    async with asyncio.timeout(_STALL_S):
                        await response.write(chunk)
                    chunk = await reading.next()
            except Exception as error:  # noqa: BLE001 - the answer has begun: all that is left is to cut it off
                _cut_off(request, error)
            finally:
                self._begun = [one for one in self._begun if one is not request]
            return response
        finally:
            reading.stop()

    def _begin(self) -> _Reading:
        if len(self._readings) >= self._readings_max:
            message = f"{self._readings_max} snapshots are being read (http.max_snapshots); ask again later"
            raise RequestRefused(HTTPStatus.TOO_MANY_REQUESTS, "too_many_snapshots", message)
        reading = _Reading(self._view.backend)
        self._readings.add(reading)
        done = asyncio.get_running_loop().run_in_executor(self._threads, reading.run)
        done.add_done_callback(lambda _: self._readings.discard(reading))
        return reading


def _cut_off(request: web.Request, error: Exception) -> None:
    if isinstance(error, ConnectionError):
        log.info("snapshot_client_left", client=request.remote)
    elif isinstance(error, TimeoutError):
        log.warning("snapshot_client_stalled", client=request.remote, waited_s=_STALL_S)
    else:
        log.error("snapshot_broke", client=request.remote, exc_info=error)
    _abort(request)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
