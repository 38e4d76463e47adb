"""An index on a server that is no longer wanted, a drill's or a benchmark's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .layout import Keys, parts_key
from .server import Server, ValkeyOptions


def forget_index(options: Mapping[str, Any]) -> None:
    """Delete one part of an index, whose writer is gone, and its name. Raises BackendError."""
    settings = msgspec.convert(dict(options), ValkeyOptions)
    keys = Keys(settings.namespace, settings.part)
    for commands in (
        [("UNLINK", *keys.buckets, *keys.tables.values(), keys.links, keys.lease)],
        [("SREM", parts_key(settings.namespace), settings.part)],
    ):
        server = Server(settings)
        try:
            server.ask(commands)
        finally:
            server.close()
