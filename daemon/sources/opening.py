"""What a message of a bus says of itself, whoever sent it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from kvcensus.translators.dynamo_envelope import Opened, open_dynamo
from kvcensus.translators.translation import Rejection, RejectReason

from ..config import SourceType
from ..relay.convention import delivery_of
from ..streams.delivery import Delivery

_UNNUMBERED = -1


class Opening(NamedTuple):
    """A message, opened: what it is to each of its workers, and what is refused since nobody knows whose it is."""

    deliveries: list[Delivery]
    rejections: list[Rejection]


def open_message(
    kind: SourceType, prefix: str, subject: str, headers: Mapping[str, str] | None, payload: bytes
) -> Opening:
    """Open a message of NATS. `kind` is the type of the bus, `prefix` is put before the name of every worker."""
    if kind is SourceType.DYNAMO:
        opened = open_dynamo(payload)
        if isinstance(opened, Rejection):
            return Opening([], [opened])
        return open_deliveries(opened, payload, prefix)
    delivery = delivery_of(subject, headers, payload)
    if isinstance(delivery, str):
        return Opening([], [Rejection(RejectReason.PAYLOAD, delivery, "headers", raw=payload)])
    if prefix:
        delivery = msgspec.structs.replace(delivery, worker=prefix + delivery.worker)
    return Opening([delivery], [])


def open_deliveries(opened: Opened, payload: bytes, prefix: str) -> Opening:
    """What a message of Dynamo is to each worker. Without an envelope it is numbered by its event.

    Several events of one worker without an envelope have no number of their own.
    """
    lineage = opened.lineage
    deliveries = []
    for address, (low, high) in zip(opened.addresses, opened.event_ids):
        seq = opened.sequence
        if seq is None:
            seq = low if low == high else _UNNUMBERED
        deliveries.append(
            Delivery(
                prefix + address.name,
                address.rank,
                lineage,
                0,
                seq,
                payload,
                first=opened.first,
                shared=bool(lineage),
                engine=SourceType.DYNAMO,
            )
        )
    return Opening(deliveries, opened.rejections)
