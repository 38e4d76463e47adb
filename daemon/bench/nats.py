"""NATS: a bare nats-py consumer, and the daemon, reading the same messages of the same server.

Core NATS is measured while a publisher process writes messages that it has packed before, as fast as the server takes
them; JetStream with all messages stored before.
Every part is a process of its own: the server, the publisher, the bare consumer, the daemon.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from ..relay.convention import EVENTS_PREFIX, Address, address_headers, every_subject, numbered, subject_of
from ..streams.delivery import Control
from .frames import make_workload
from .processes import configured_daemon, free_port, get

STREAM = "BENCH"

_WAIT_S = 300.0
_POLL_S = 0.02
_FLUSH_S = 60
_PULL = 512
_UNACKNOWLEDGED = 512
_PENDING_BYTES = 1 << 30
_ADDRESS = Address("bench", None, "bench", "vllm")


class Read(msgspec.Struct, frozen=True):
    """How fast messages were read, by the second: `bare` by a consumer that counts them, `daemon` into the index."""

    messages: int
    bare: float
    daemon: float


@contextmanager
def server(program: str, directory: Path) -> Iterator[str]:
    """A NATS server with its streams under `directory`. Gives its URL. Raises OSError if the program cannot be run."""
    port = free_port()
    config = directory / "nats.json"
    store = {"store_dir": str(directory / "jetstream"), "max_mem": 1 << 30, "max_file": 16 << 30}
    listen = {"listen": f"127.0.0.1:{port}", "jetstream": store, "max_pending": _PENDING_BYTES}
    config.write_text(json.dumps(listen))
    process = subprocess.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(_reached(f"nats://127.0.0.1:{port}"))
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def _reached(url: str) -> None:
    async def say_nothing(_: Exception) -> None:
        """It is not there yet."""

    client = await nats.connect(url, max_reconnect_attempts=100, reconnect_time_wait=0.05, error_cb=say_nothing)
    await client.close()


def read_core(url: str, blocks: int, blocks_per_message: int, backend: str, directory: Path) -> Read:
    """Messages as they are published, as fast as they can be."""
    messages = -(-blocks // blocks_per_message)
    with _helper("count-core", url, messages) as consumer:
        _line(consumer)
        with _publisher(url, blocks, blocks_per_message, "core"):
            bare = messages / float(_line(consumer))
    with _daemon(url, "", backend, directory) as port, _publisher(url, blocks, blocks_per_message, "core"):
        return Read(messages, bare, messages / _until(port, messages - 1, by_position=False))


def read_jetstream(url: str, blocks: int, blocks_per_message: int, backend: str, directory: Path) -> Read:
    """Messages that are stored already."""
    messages = -(-blocks // blocks_per_message)
    asyncio.run(_new_stream(url))
    with _publisher(url, blocks, blocks_per_message, "jetstream") as publisher:
        _line(publisher)
    with _helper("count-jetstream", url, messages) as consumer:
        bare = messages / float(_line(consumer))
    with _daemon(url, STREAM, backend, directory) as port:
        read = Read(messages, bare, messages / _until(port, messages, by_position=True))
    asyncio.run(_drop_stream(url))
    return read


def _until(port: int, last: int, *, by_position: bool) -> float:
    """Seconds until the last message is committed, as an observer outside sees it."""
    started = time.perf_counter()
    while True:
        answer = json.loads(get(port, "/v1/streams"))
        elapsed = time.perf_counter() - started
        reached = [bus["position"] for bus in answer["buses"]] if by_position else []
        reached = reached or [stream["last_seq"] for stream in answer["streams"]]
        if reached and reached[0] >= last:
            if any(stream["trust"] == "untrusted" for stream in answer["streams"]):
                raise RuntimeError(f"messages were lost: {answer['streams']}")
            return elapsed
        if elapsed > _WAIT_S:
            raise RuntimeError(f"stuck at {answer}")
        time.sleep(_POLL_S)


@contextmanager
def _daemon(url: str, stream: str, backend: str, directory: Path) -> Iterator[int]:
    """A daemon that follows the bus. Gives its HTTP port."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        config = Path(place, "kvcensus.toml")
        config.write_text(
            f"[[nats]]\nname = 'bench'\ntype = 'vllm'\nstream = '{stream}'\npending_max_messages = 1000000\n"
            f"pending_max_bytes = {_PENDING_BYTES}\n[nats.connection]\nservers = ['{url}']\n"
        )
        with configured_daemon(config, backend, Path(place, "index")) as daemon:
            while json.loads(get(daemon.port, "/v1/streams"))["buses"][0]["state"] == "connecting":
                time.sleep(_POLL_S / 10)
            yield daemon.port


@contextmanager
def _helper(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "kvcensus.daemon.bench.nats", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _publisher(url: str, blocks: int, blocks_per_message: int, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that publishes from now on. Its messages are made before that."""
    with _helper("publish", url, blocks, blocks_per_message, kind) as process:
        _line(process)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        yield process


def _line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def _new_stream(url: str) -> None:
    client = await nats.connect(url)
    await client.jetstream().add_stream(name=STREAM, subjects=[every_subject(EVENTS_PREFIX)])
    await client.close()


async def _drop_stream(url: str) -> None:
    """While there is one, the server stores what is sent over core NATS, too."""
    client = await nats.connect(url)
    await client.jetstream().delete_stream(STREAM)
    await client.close()


async def _publish(url: str, blocks: int, blocks_per_message: int, kind: str) -> None:
    workload = make_workload(blocks, blocks_per_message)
    subject, headers = subject_of(EVENTS_PREFIX, _ADDRESS), address_headers("bench", _ADDRESS)
    client = await nats.connect(url, pending_size=_PENDING_BYTES)
    jetstream = client.jetstream(publish_async_max_pending=_UNACKNOWLEDGED)
    messages = [(payload, numbered(headers, 1, seq, Control.NONE)) for seq, payload in enumerate(workload.messages)]
    if kind == "core":
        # nats-py writes nothing before the event loop has a turn, so all are packed when the first one leaves.
        for payload, said in messages:
            await client.publish(subject, payload, headers=said)
        _begin()
    else:
        _begin()
        for payload, said in messages:
            await jetstream.publish_async(subject, payload, headers=said)
        await jetstream.publish_async_completed()
    await _written(client)
    _say("done")
    await client.close()


def _begin() -> None:
    """Say that the messages are made, and wait for the word."""
    _say("ready")
    sys.stdin.readline()


async def _written(client: Client) -> None:
    """Returns once the server has all that was published: nats-py's first ping overtakes what waits to be written."""
    await client.flush(_FLUSH_S)
    await client.flush(_FLUSH_S)


async def _count_core(url: str, messages: int) -> None:
    client = await nats.connect(url)
    done = asyncio.Event()
    count, started = 0, 0.0

    async def receive(_: object) -> None:
        nonlocal count, started
        started = started or time.perf_counter()
        count += 1
        if count == messages:
            done.set()

    await client.subscribe(
        every_subject(EVENTS_PREFIX), cb=receive, pending_msgs_limit=1_000_000, pending_bytes_limit=_PENDING_BYTES
    )
    await client.flush()
    _say("ready")
    await done.wait()
    _say(time.perf_counter() - started)


async def _count_jetstream(url: str, messages: int) -> None:
    client = await nats.connect(url)
    config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE)
    subscription = await client.jetstream().pull_subscribe(
        "", durable="", stream=STREAM, config=config, pending_msgs_limit=-1, pending_bytes_limit=-1
    )
    started = time.perf_counter()
    count = 0
    while count < messages:
        count += len(await subscription.fetch(min(_PULL, messages - count)))
    _say(time.perf_counter() - started)


if __name__ == "__main__":
    what, at, *numbers = sys.argv[1:]
    if what == "publish":
        asyncio.run(_publish(at, int(numbers[0]), int(numbers[1]), numbers[2]))
    elif what == "count-core":
        asyncio.run(_count_core(at, int(numbers[0])))
    else:
        asyncio.run(_count_jetstream(at, int(numbers[0])))
