"""Subjects and headers of what is published: those of an address are made once."""

from __future__ import annotations

from collections.abc import Mapping

from ..streams.delivery import Control
from .convention import EXPECTED_STREAM, MESSAGE_ID, Address, address_headers, message_id, numbered, subject_of
from .record import Position, Record

_LINES_BYTES = 12
"""`NATS/1.0`, an empty line, and their ends."""

Envelope = tuple[str, dict[str, str]]


class Envelopes:
    """Those of one spool for one JetStream stream."""

    def __init__(self, lineage: str, stream: str, prefix: str, alive_prefix: str) -> None:
        self._lineage = lineage
        self._stream = stream
        self._prefix = prefix
        self._alive_prefix = alive_prefix
        self._known: dict[Address, Envelope] = {}

    def of(self, record: Record, control: Control) -> Envelope:
        """The envelope of a record, or of a control message in its place."""
        address = record.address
        known = self._known.get(address)
        if known is None:
            common = address_headers(self._lineage, address) | {EXPECTED_STREAM: self._stream}
            known = self._known[address] = (subject_of(self._prefix, address), common)
        subject, common = known
        headers = numbered(common, record.epoch, record.seq, control)
        headers[MESSAGE_ID] = message_id(self._lineage, address, record.epoch, record.seq, control)
        return subject, headers

    def of_beat(self, address: Address, position: Position, control: Control) -> Envelope:
        """The envelope of a sign of life."""
        headers = numbered(address_headers(self._lineage, address), position.epoch, position.seq, control)
        return subject_of(self._alive_prefix, address), headers


def size_of(headers: Mapping[str, str], payload: bytes) -> int:
    """What a server counts against its limit, in bytes."""
    return len(payload) + _LINES_BYTES + sum(4 + len(name) + len(headers[name]) for name in headers)
