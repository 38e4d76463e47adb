"""The stream that a relay publishes to, on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvcensus.daemon.config import NatsServers
from kvcensus.daemon.relay.stream import RelayStream, StreamOptions
from kvcensus.daemon.sources.nats_connection import NatsConnector

from ..nats_servers import nats_server, secret_file

USERS = [
    {"user": "asks", "password": "x"},
    {"user": "publishes", "password": "x", "permissions": {"publish": ["kvevents.>"]}},
]


def test_how_many_servers_keep_it_is_not_known_from_before(tmp_path: Path) -> None:
    secret = str(secret_file(tmp_path / "password", "x"))
    stream = RelayStream(StreamOptions("KV", "kvevents", True, 60, 0, 1, 60))

    async def prepared_by(url: str, user: str) -> int:
        servers = NatsServers(servers=(url,), user=user, password_file=secret)
        connection = await NatsConnector(servers, "test").connect()
        await stream.prepare(connection)
        await connection.close()
        return stream.replicas

    with nats_server(tmp_path, {"authorization": {"users": USERS}}) as server:
        assert asyncio.run(prepared_by(server.url, "asks")) == 1
        assert asyncio.run(prepared_by(server.url, "publishes")) == 0
