"""What is fuzzed without a server: the translator, the index behind it, the frames of a stream, recordings.

A target has `seeds`, `lies` and `run`, which raises for what must not happen: any exception, any answer out of bounds.
"""

from __future__ import annotations

import base64
import gzip
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import zmq

from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.model import MAX_HASH_BYTES, Operation, RemoveBlocks, StoreRun
from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.frame_queue import Burst, FrameQueue, Item
from kvcensus.daemon.recording import Recording, RecordingError
from kvcensus.daemon.sources.zmq import ZmqIntake
from kvcensus.daemon.sources.zmq_sockets import ZmqOptions
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import RejectReason, Translation, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from .mutation import MSGPACK_LIES

CAPTURES = Path(__file__).parents[1] / "captures"
_OPTIONS = TranslatorOptions("w", "m", "m")
_SEED_BYTES_MAX = 8 << 10
_CLEAR_ABOVE = 50_000


class Target(NamedTuple):
    """Something that takes bytes. `close` ends what it started; `packed` says that the seeds are msgpack."""

    seeds: Sequence[bytes]
    lies: Sequence[bytes]
    run: Callable[[bytes], None]
    close: Callable[[], None] = lambda: None
    packed: bool = False


@cache
def captured_payloads() -> list[bytes]:
    """Every payload of every capture that is short enough to mutate often."""
    found = set()
    for path in sorted(CAPTURES.glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            found.add(base64.b64decode(msgspec.json.decode(line)["frames"][2]))
    return sorted(payload for payload in found if len(payload) <= _SEED_BYTES_MAX)


def translator() -> Target:
    """Garbage becomes operations that keep the backend's contract, or rejections with a known reason.

    Beside itself it becomes the same twice, or nothing: what is refused or mixes maps and arrays is taken alone.
    """
    translators = (VllmTranslator(_OPTIONS), SglangTranslator(_OPTIONS))

    def run(payload: bytes) -> None:
        for one in translators:
            check_translation(one.translate(payload, 0), payload)
            alone = one.translate(payload, 1)
            check_translation(alone, payload)
            together = one.translate_all([payload, payload], 1)
            if together is not None:
                assert not alone.rejections
                assert together.translation.operations == 2 * alone.operations

    return Target(captured_payloads(), MSGPACK_LIES, run, packed=True)


def check_translation(result: Translation, payload: bytes) -> None:
    """Its counts, times and rejections are within bounds, and its operations keep the backend's contract."""
    events = result.stored_events + result.removed_events + result.cleared_events
    assert events == len(result.operations)
    assert 0 <= result.engine_ms < 1 << 63
    assert result.facts in (0, 1)
    for rejection in result.rejections:
        assert isinstance(rejection.reason, RejectReason)
        assert len(rejection.raw) <= len(payload)
        assert len(rejection.detail) < 2000 + len(payload)
    for operation in result.operations:
        _check_operation(operation, payload)


def _check_operation(operation: Operation, payload: bytes) -> None:
    if isinstance(operation, StoreRun | RemoveBlocks):
        assert len(operation.block_hashes) <= len(payload)
        assert all(1 <= len(one) <= MAX_HASH_BYTES for one in operation.block_hashes)
    if isinstance(operation, StoreRun):
        assert operation.parent is None or len(operation.parent) <= MAX_HASH_BYTES
        assert 0 <= operation.token_count < 1 << 31


def index() -> Target:
    """What the translator lets through, the LMDB index takes."""
    folder = tempfile.TemporaryDirectory(prefix="kvcensus-fuzz-")
    backend = LmdbBackend(Path(folder.name), map_size=4 << 30)
    one = VllmTranslator(_OPTIONS)

    def run(payload: bytes) -> None:
        operations = one.translate(payload, 0).operations
        if operations:
            backend.apply(operations)
        if len(backend) > _CLEAR_ABOVE:
            backend.clear()

    def close() -> None:
        backend.close()
        folder.cleanup()

    return Target(captured_payloads(), MSGPACK_LIES, run, close, packed=True)


class _Taken(FrameQueue):
    """A queue that is emptied by hand."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.items: list[Item] = []

    def put(self, burst: Burst) -> bool:
        self.items += burst.items
        return True


class _Frames:
    """A socket that gives the frames of one message."""

    def __init__(self) -> None:
        self.waiting: list[list[bytes]] = []
        self._begun: list[bytes] = []

    def recv(self, flags: int, copy: bool) -> SimpleNamespace:
        if not self._begun:
            if not self.waiting:
                raise zmq.Again
            self._begun = self.waiting.pop(0) or [b""]
        frame = self._begun.pop(0)
        return SimpleNamespace(bytes=frame, more=bool(self._begun))

    def close(self) -> None:
        self.waiting.clear()


_FRAMES_MAX = 8


def stream() -> Target:
    """Messages of the live and the replay socket, whole and broken, through the intake and the state of a stream.

    An input is: a byte that says which socket, then frames, each a 16-bit length and so many bytes.
    """
    queue = _Taken()
    intake = ZmqIntake(queue)
    clock = [0]
    made: list[tuple[FollowedStream, Any, _Frames]] = []

    def renew() -> None:
        limits = StreamLimits(hold_max_messages=100, replay_timeout_ms=50)
        followed = FollowedStream(
            source="w", stream="w", rank=None, endpoint="", limits=limits, translator=VllmTranslator(_OPTIONS),
            cursor=None,
        )  # fmt: skip
        socket = _Frames()
        link = SimpleNamespace(
            stream=followed, live=socket, replay=None, topic=b"", options=ZmqOptions("tcp://x:1", "tcp://x:2"),
            ask=lambda start: setattr(link, "replay", socket), stop_replay=lambda: setattr(link, "replay", None),
        )  # fmt: skip
        made[:] = [(followed, link, socket)]
        intake._carry_out(link, followed.state.connected(clock[0]))

    renew()
    count = [0]

    def run(data: bytes) -> None:
        count[0] += 1
        if count[0] % 500 == 0:
            renew()
        followed, link, socket = made[0]
        clock[0] += 1
        epoch = followed.state.epoch
        way, frames = _framed(data)
        socket.waiting.append(frames)
        if way % 2 and link.replay is not None:
            intake._read_replay(link, clock[0])
        else:
            intake._read_live(link, clock[0])
        socket.waiting.clear()
        if way > 0xF8:
            intake._carry_out(link, followed.state.disconnected(clock[0]))
        intake._carry_out(link, followed.state.tick(clock[0]))
        for _, item in queue.items:
            assert all(len(payload) <= 1 << 16 for payload in getattr(item, "payloads", ()))
        queue.items.clear()
        assert followed.state.epoch >= epoch
        assert followed.state.held <= 100

    return Target(_stream_seeds(), MSGPACK_LIES, run)


def _framed(data: bytes) -> tuple[int, list[bytes]]:
    frames = []
    at = 1
    while at < len(data) and len(frames) < _FRAMES_MAX:
        size = int.from_bytes(data[at : at + 2], "big")
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return (data[0] if data else 0), frames


def _stream_seeds() -> list[bytes]:
    seeds = []
    for number, payload in enumerate(captured_payloads()[:200]):
        seq = (number % 12).to_bytes(8, "big")
        for way, frames in (
            (0, [b"kv", seq, payload]),
            (1, [b"", seq, payload]),
            (1, [b"", b"kv", seq, payload]),
            (1, [b"", b"\xff" * 8, b""]),
        ):
            seeds.append(bytes((way,)) + b"".join(len(one).to_bytes(2, "big") + one for one in frames))
    return seeds


def recording() -> Target:
    """A recording, plain or gzip: messages, or RecordingError."""
    folder = tempfile.TemporaryDirectory(prefix="kvcensus-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    plain, packed = Path(folder.name) / "r.jsonl", Path(folder.name) / "r.jsonl.gz"

    def run(data: bytes) -> None:
        path = packed if data[:2] == b"\x1f\x8b" else plain
        path.write_bytes(data)
        try:
            for message in Recording(path, max_line_bytes=1 << 20):
                assert message.seq is None or message.seq >= 0
                assert isinstance(message.payload, bytes)
        except RecordingError:
            return

    seeds = []
    for path in sorted(CAPTURES.glob("*.jsonl.gz"))[:8]:
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        for at in range(0, min(len(lines), 12), 3):
            text = b"".join(lines[at : at + 3])
            seeds += [text, gzip.compress(text, mtime=0)]
    return Target([seed for seed in seeds if len(seed) <= 4 * _SEED_BYTES_MAX], MSGPACK_LIES, run, folder.cleanup)
