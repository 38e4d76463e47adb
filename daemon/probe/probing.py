"""Every source at the same time, each for the same seconds."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import zmq

from ..config import Config
from .findings import BusFinding, ProbeFindings
from .zmq_probe import probe_bus, probe_stream

AT_A_TIME = 64
"""Streams over ZMQ that are looked at together; further ones follow them."""

_SOCKETS_EACH = 8


def probe(config: Config, seconds: float) -> ProbeFindings:
    """Look at every source of a configuration. Takes some seconds longer than `seconds`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, AT_A_TIME * _SOCKETS_EACH)
    pool = ThreadPoolExecutor(AT_A_TIME + 1)
    try:
        over_nats = pool.submit(_probe_all_nats, config, seconds)
        streams = [pool.submit(probe_stream, context, source, stream, seconds) for source, stream in config.streams()]
        over_zmq = [pool.submit(probe_bus, context, source, seconds) for source in config.sources if source.is_bus]
        found = [one.result() for one in streams]
        buses = [one.result() for one in over_zmq] + over_nats.result()
    finally:
        pool.shutdown(cancel_futures=True)
        context.destroy(linger=0)
    reached = all(one.reached for one in found) and all(one.reached for one in buses)
    return ProbeFindings(seconds, reached, found, buses)


def _probe_all_nats(config: Config, seconds: float) -> list[BusFinding]:
    if not config.nats:
        return []
    from .nats_probe import probe_nats

    async def all_of_them() -> list[BusFinding]:
        return list(await asyncio.gather(*(probe_nats(bus, seconds) for bus in config.nats)))

    return asyncio.run(all_of_them())
