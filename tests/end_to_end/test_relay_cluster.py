"""The relay and a stream that three servers keep: handovers and deaths of its leader do not change what is in it."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path

from kvcensus.daemon.engine_replay import ReplayedEngine

from ..nats_servers import nats_cluster, talking
from .relay_process import JETSTREAM, Follower, Publishing, RelayProcess, messages, stored

CONFIG = """
[relay]
stream = "KV"
create_stream = true
stream_replicas = 3
ack_timeout_ms = 1000

[relay.connection]
servers = {urls}

[[sources]]
name = "pod-1"
endpoint = "{endpoint}"
replay_endpoint = "{replay_endpoint}"
"""


def test_handovers_and_the_death_of_the_leader_keep_the_order(tmp_path: Path) -> None:
    source = random.Random(3)
    sent = messages(2500)
    with nats_cluster(tmp_path) as cluster, ReplayedEngine(sent) as engine:
        config = tmp_path / "relay.toml"
        urls = str(list(cluster.urls)).replace("'", '"')
        config.write_text(CONFIG.format(urls=urls, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint))
        with RelayProcess(tmp_path / "relay", engine, "--config", str(config)) as relaying:
            engine.publish(1)
            relaying.wait_published(0)
            publishing = Publishing(engine, len(sent) - 1, at_a_time=3)
            publishing.start()
            with talking(*cluster.urls) as talk:
                for _ in range(4):
                    time.sleep(source.uniform(0.2, 0.6))
                    with suppress(TimeoutError):
                        talk.do(talk.client.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{JETSTREAM}", b"", timeout=1))
            leader = cluster.leader_of(JETSTREAM)
            leader.kill()
            publishing.join()
            relaying.wait_published(len(sent) - 1)
            assert relaying.metric("kvcensus_relay_stream_overtaken_records_total") == 0
            follower = Follower(stored(cluster.leader_of(JETSTREAM)))
    assert follower.payloads == [message.payload for message in sent]
    assert (follower.lives, follower.fences) == (1, [])
