"""From frames to a committed index inside one process, and the two limits of it: decoding alone, and putting alone."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from pathlib import Path

import lmdb
import msgspec

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import INDEX_FILE, MAP_SIZE
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import StoreRun
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

from ..followed import FollowedStream
from ..frame_queue import Burst, FrameQueue
from ..streams.state import StreamLimits
from ..writer import Writer, WriterOptions
from .frames import Workload

_BURST = 256


class _Stored(msgspec.Struct, tag="BlockStored", tag_field="type"):
    """A store event as one would declare it to msgspec, token ids left packed: what decoding costs at the least."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", tag_field="type"):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", tag_field="type"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    data_parallel_rank: int | None = None


def decode_alone(workload: Workload) -> float:
    """Blocks/s of decoding every payload into typed structs, and nothing else."""
    decode = msgspec.msgpack.Decoder(_Batch).decode
    gc.collect()
    started = time.perf_counter()
    for payload in workload.messages:
        decode(payload)
    return workload.blocks / (time.perf_counter() - started)


def dictionary_alone(workload: Workload) -> float:
    """Blocks/s of putting the decoded hashes into one dictionary: what an index in memory costs at the least."""
    translator = VllmTranslator(TranslatorOptions(worker="bench"))
    runs = [
        operation.block_hashes
        for payload in workload.messages
        for operation in translator.translate(payload, 0).operations
        if isinstance(operation, StoreRun)
    ]
    known: dict[bytes, tuple[bytes, ...]] = {}
    gc.collect()
    started = time.perf_counter()
    for hashes in runs:
        known.update(dict.fromkeys(hashes, hashes))
    return len(known) / (time.perf_counter() - started)


def frames_to_index(workload: Workload, backend: IndexBackend, options: WriterOptions) -> float:
    """Blocks/s from the first frame to the commit of the last, through the stream state, the queue and the writer."""
    queue = FrameQueue(10_000, 256 << 20)
    writer = Writer(backend, queue, options)
    stream = FollowedStream(
        source="bench",
        stream="bench",
        rank=None,
        endpoint="",
        limits=StreamLimits(replay=False),
        translator=VllmTranslator(TranslatorOptions(worker="bench", model_id="bench", tokenizer_id="bench")),
        cursor=None,
    )
    gc.collect()
    writer.start()
    started = time.perf_counter()
    messages = workload.messages
    for first in range(0, len(messages), _BURST):
        payloads = messages[first : first + _BURST]
        burst = Burst()
        for verdict in stream.state.live_all([*range(first, first + len(payloads))], payloads, 0):
            burst.add(stream, verdict)  # type: ignore[arg-type]
        queue.put(burst)
    queue.close()
    writer.join()
    elapsed = time.perf_counter() - started
    if writer.error is not None:
        raise writer.error
    assert len(backend) == workload.blocks, (len(backend), workload.blocks)
    return workload.blocks / elapsed


def memory_ingest(workload: Workload, options: WriterOptions) -> float:
    """`frames_to_index` into memory."""
    return frames_to_index(workload, MemoryBackend(), options)


class LmdbIngest(msgspec.Struct, frozen=True):
    """Blocks/s of the pipeline and of the bare put loop of the rows that it wrote; bytes of the file."""

    blocks_per_s: float
    bare_puts_per_s: float
    file_bytes: int


def lmdb_ingest(workload: Workload, options: WriterOptions, directory: Path) -> LmdbIngest:
    """`frames_to_index` into LMDB, then the same rows put by a loop that does nothing else, with the same commits."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        backend = LmdbBackend(Path(place, "index"))
        blocks_per_s = frames_to_index(workload, backend, options)
        file_bytes = backend.stored_bytes()
        backend.close()
        bare = _bare_puts(Path(place, "index", INDEX_FILE), Path(place, "bare.mdb"), options.commit_max_blocks)
    return LmdbIngest(blocks_per_s, bare, file_bytes)


def _bare_puts(source: Path, target: Path, batch: int) -> float:
    """Blocks/s of putting the rows of an index in random order, sorted within each transaction, without syncing."""
    env = lmdb.open(str(source), subdir=False, readonly=True, max_dbs=8, map_size=MAP_SIZE)
    table = env.open_db(b"blocks", create=False)
    with env.begin() as txn:
        rows = list(txn.cursor(table))
    env.close()
    blocks = sum(1 for _, row in rows if row)
    random.Random(1).shuffle(rows)  # noqa: S311
    env = lmdb.open(str(target), subdir=False, max_dbs=8, map_size=MAP_SIZE, sync=False)
    table = env.open_db(b"blocks")
    started = time.perf_counter()
    for first in range(0, len(rows), batch):
        with env.begin(write=True) as txn:
            txn.cursor(table).putmulti(sorted(rows[first : first + batch]))
    elapsed = time.perf_counter() - started
    env.close()
    return blocks / elapsed
