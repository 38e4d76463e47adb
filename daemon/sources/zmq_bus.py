"""Dynamo's own event plane over ZMQ: one endpoint, whose messages say which worker they are of.

The frames are those of translators/dynamo_envelope.py. There is no replay: what is missed is lost, and fences.
"""

from __future__ import annotations

from contextlib import suppress

import zmq

from kvcensus.translators.dynamo_envelope import FRAME_HEADER_BYTES, open_dynamo_frames
from kvcensus.translators.translation import Rejection

from ..frame_queue import Item
from .bus_source import BusSource
from .opening import Opening, open_deliveries
from .zmq_sockets import BURST_MESSAGES, Change, LiveSocket, ZmqOptions, receive


class BusLink(LiveSocket):
    """The socket of one bus."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], bus: BusSource, options: ZmqOptions) -> None:
        self.bus = bus
        super().__init__(context, options)

    def step(self, now: int, ready: bool) -> list[Item]:
        """Look at the connection, then at what came, then at the time."""
        for change, failed in self.changes():
            if change is Change.MADE:
                self.connected(now)
                self.bus.connection_made()
                continue
            if failed and not (change is Change.OTHER and self.bus.connected):
                self.bus.fail(f"{self.options.endpoint}: the handshake failed: {failed}")
            if change is Change.LOST:
                self.disconnected(now)
                self.bus.connection_lost()
        if 0 < self.reopen_at_ms <= now:
            self.reopen()
            return []
        items: list[Item] = []
        if ready:
            with suppress(zmq.Again):
                for _ in range(BURST_MESSAGES):
                    items += self._received(receive(self.live))
        return items + self.bus.tick()

    def _received(self, frames: list[bytes]) -> list[Item]:
        bus = self.bus
        bus.counters.messages += 1
        bus.counters.bytes += sum(map(len, frames))
        opened = open_dynamo_frames(frames)
        if isinstance(opened, Rejection):
            return bus.take(Opening([], [opened]), opened.raw)
        payload = frames[-1][FRAME_HEADER_BYTES:]
        return bus.take(open_deliveries(opened, payload, bus.settings.worker_prefix), payload)
