"""What waits to be published, and where a stream has been published up to."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvcensus.translators.translation import worker_id_of

from ..streams.delivery import Control
from .convention import Address


class Record(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One message to publish. `at_ms` is when it was spooled, in ms since the Unix epoch."""

    address: Address
    epoch: int
    seq: int
    control: Control
    at_ms: int
    payload: bytes = b""

    @property
    def stream(self) -> str:
        """The stream it came from, which is also the worker's id."""
        return worker_id_of(self.address.worker, self.address.rank)


class Position(NamedTuple):
    """The last acknowledged record of a stream."""

    epoch: int
    seq: int
