"""Messages of a relay that differ from earlier ones in nothing but number and payload: they are opened in passing.

A worker's messages have the same headers but for `Kv-Seq` and the server's `Nats-Msg-Id`. What the others say is read
once, as relay/convention.py has it.
"""

from __future__ import annotations

import msgspec

from ..relay.convention import MESSAGE_ID, SEQ
from ..streams.delivery import Control, Delivery
from .opening import Opening

_KEPT = 4096
_LONGEST_BYTES = 4096
"""A relay's headers are shorter, but for long names that are all escapes."""
_DIGITS_MAX = 18
_ZERO = ord("0")
_LINE = b"\r\n"
_SEQ = f"\r\n{SEQ}: ".encode()
_ID = f"\r\n{MESSAGE_ID}: ".encode()


class PlainMessages:
    """Remembers what headers say."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], Delivery] = {}

    def open(self, subject: bytes, headers: bytes) -> tuple[Delivery, int] | None:
        """What was said before under the same headers, without payload or number; and the number. None for nothing."""
        alike = _less_number(headers)
        if alike is None:
            return None
        known = self._known.get((subject, alike[0]))
        return None if known is None else (known, alike[1])

    def note(self, subject: bytes, headers: bytes, opening: Opening) -> None:
        """Remember what a message has said, if it says the same without its number."""
        alike = _less_number(headers)
        if alike is None or len(headers) > _LONGEST_BYTES or len(opening.deliveries) != 1 or opening.rejections:
            return
        (delivery,) = opening.deliveries
        plain = delivery.control is Control.NONE and delivery.lineage and not delivery.shared
        if plain and SEQ.encode() not in alike[0]:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[subject, alike[0]] = msgspec.structs.replace(delivery, seq=-1, payload=b"")


def _less_number(raw: bytes) -> tuple[bytes, int] | None:
    """The headers without number and message id, and the number. None where it is not written as relays write it."""
    head, _, tail = raw.partition(_SEQ)
    number, _, rest = tail.partition(_LINE)
    if not number.isdigit() or len(number) > _DIGITS_MAX or (number[0] == _ZERO and len(number) > 1):
        return None
    alike = head + _LINE + rest
    head, found, tail = alike.partition(_ID)
    if found:
        alike = head + _LINE + tail.partition(_LINE)[2]
    return alike, int(number)
