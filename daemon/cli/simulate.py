"""`kvcensus simulate`: engines that are not there, and what they really hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import click
import msgspec
import zmq

from ..engine_sockets import BUFFER_STEPS
from ..simulate.cache import CacheOptions
from ..simulate.engine import EngineOptions, SimulatedEngine, SimulatedRank
from ..simulate.rank import RankOptions
from ..simulate.truth import TruthServer
from ..simulate.wire import FORMATS
from ..simulate.workload import WorkloadOptions
from .ending import EXIT_IO, Failure, signals_set

_HASH_BYTES = {"int": 0, "sha256": 32, "xxhash": 16}
_BURST_S = 0.05
"""Messages of so long are published together: a pause per message would take longer than the message."""

Ports = click.IntRange(min=0, max=65_535)
Count = click.IntRange(min=0)


@click.command()
@click.option("--engines", type=click.IntRange(min=1, max=256), default=1, show_default=True)
@click.option(
    "--ranks", type=click.IntRange(min=0, max=64), default=0, show_default=True, help="Data-parallel size; 0: no DP."
)
@click.option("--blocks", type=click.IntRange(min=64), default=4096, show_default=True, help="Device blocks of a rank.")
@click.option("--cpu-blocks", type=Count, default=0, show_default=True, help="Blocks of its CPU tier; 0: none.")
@click.option("--window-blocks", type=Count, default=0, show_default=True, help="Add a sliding-window group.")
@click.option("--adapters", type=Count, default=2, show_default=True, help="LoRA adapters beside the base model.")
@click.option("--clear-every", type=Count, default=0, show_default=True, help="Reset the cache about every N messages.")
@click.option("--restart-every", type=Count, default=0, show_default=True, help="Restart a rank every N messages.")
@click.option(
    "--rate", type=click.FloatRange(min=0), default=20.0, show_default=True, help="Messages/s of a rank; 0: no limit."
)
@click.option("--messages", type=Count, default=0, show_default=True, help="Messages of each rank; 0: until a signal.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed does the same.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="vllm-0.32", show_default=True)
@click.option("--hashes", type=click.Choice(list(_HASH_BYTES)), default="int", show_default=True)
@click.option("--name", default="sim", show_default=True, help="Engines are NAME-0, NAME-1, …")
@click.option("--bind-base-port", type=Ports, default=0, show_default=True, help="First port; 0: free ones.")
@click.option("--bind-host", default="127.0.0.1", show_default=True)
@click.option("--buffer-steps", type=Count, default=BUFFER_STEPS, show_default=True, help="Messages kept for replay.")
@click.option("--truth", "truth_port", type=Ports, help="Answer here what the engines really hold; 0: a free port.")
@click.option("--linger-seconds", "linger_s", type=click.FloatRange(min=0), help="End so long after the last message.")
def simulate(
    engines: int,
    ranks: int,
    blocks: int,
    cpu_blocks: int,
    window_blocks: int,
    adapters: int,
    clear_every: int,
    restart_every: int,
    rate: float,
    messages: int,
    seed: int,
    form: str,
    hashes: str,
    name: str,
    bind_base_port: int,
    bind_host: str,
    buffer_steps: int,
    truth_port: int | None,
    linger_s: float | None,
) -> None:
    """Publish what engines with a block manager, an LRU and shared prompts would, over their real protocol.

    Prints one JSON line with the endpoints, then works until a signal, or for --messages and then answers replays.
    """
    if hashes != "int" and FORMATS[form].signed:
        raise click.UsageError(f"{form} has integer hashes only")
    options = RankOptions(
        form=form,
        hash_bytes=_HASH_BYTES[hashes],
        cache=CacheOptions(blocks=blocks, cpu_blocks=cpu_blocks, window_blocks=window_blocks),
        workload=WorkloadOptions(adapters=adapters),
        clear_every=clear_every,
    )
    stopping = threading.Event()
    stride = 2 * max(ranks, 1)
    with ExitStack() as stack:
        try:
            started = [
                stack.enter_context(
                    SimulatedEngine(
                        EngineOptions(
                            name=f"{name}-{number}",
                            seed=seed + number,
                            ranks=ranks,
                            rank=options,
                            base_port=bind_base_port + number * stride if bind_base_port else 0,
                            host=bind_host,
                            buffer_steps=buffer_steps,
                        )
                    )
                )
                for number in range(engines)
            ]
            workers = [one for engine in started for one in engine.ranks]
            truth = None if truth_port is None else TruthServer(workers, truth_port)
        except (zmq.ZMQError, OSError) as error:
            raise Failure(f"{bind_host}, ports from {bind_base_port}: {error.strerror}", EXIT_IO) from error
        if truth is not None:
            stack.callback(truth.stop)
        with signals_set(stopping):
            click.echo(msgspec.json.encode(_endpoints(started, None if truth is None else truth.port)))
            published = _work(workers, rate, messages, restart_every, stopping)
            click.echo(f"published {published} messages", err=True)
            stopping.wait(linger_s)


def _endpoints(engines: Sequence[SimulatedEngine], truth_port: int | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "engines": [
            {
                "name": engine.name,
                "ranks": [
                    {
                        "worker_id": one.worker_id,
                        "endpoint": one.sockets.endpoint,
                        "replay_endpoint": one.sockets.replay_endpoint,
                    }
                    for one in engine.ranks
                ],
            }
            for engine in engines
        ]
    }
    return shown if truth_port is None else shown | {"truth": f"http://127.0.0.1:{truth_port}/"}


def _work(
    ranks: Sequence[SimulatedRank], rate: float, messages: int, restart_every: int, stopping: threading.Event
) -> int:
    """Publish in turns at `rate`. Returns how many messages there were."""
    began = time.monotonic()
    done = 0
    while not stopping.is_set() and (not messages or done < messages):
        due = int((time.monotonic() - began) * rate) + 1 - done if rate else int(1 / _BURST_S)
        if due <= 0:
            stopping.wait(max(_BURST_S, 1 / rate) if rate < 1 / _BURST_S else _BURST_S)
            continue
        until = done + (min(due, messages - done) if messages else due)
        while done < until:
            step = min(until, (done // restart_every + 1) * restart_every) - done if restart_every else until - done
            for one in ranks:
                one.publish(step)
            done += step
            if restart_every and done % restart_every == 0:
                for one in ranks:
                    one.restart()
    return done * len(ranks)
