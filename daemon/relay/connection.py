"""Connections for publishing: each is used until it fails."""

from __future__ import annotations

from collections.abc import Callable

import nats
from nats.aio.client import Client

from ..config import NatsServers
from .publisher import Connect, PublishProblem


def connector(servers: NatsServers) -> Connect:
    """How to reach `servers`."""

    async def connect(lost: Callable[[], None], problem: Callable[[str], None]) -> Client:
        async def closed() -> None:
            lost()

        async def failed(error: Exception) -> None:
            problem(str(error))

        try:
            return await nats.connect(
                list(servers.servers),
                allow_reconnect=False,
                closed_cb=closed,
                error_cb=failed,
                connect_timeout=servers.connect_timeout_ms / 1000,
            )
        except Exception as error:
            raise PublishProblem(f"{', '.join(servers.servers)}: {error!r}") from error

    return connect
