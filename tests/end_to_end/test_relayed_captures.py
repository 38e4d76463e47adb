"""Every captured engine as a relay sends it, over core NATS and over JetStream, against the engine's own cache.

The relay's part is played by the convention itself, so that sixty streams take seconds; test_relay has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcensus.daemon.relay.convention import (
    EVENTS_PREFIX,
    Address,
    address_headers,
    every_subject,
    numbered,
    subject_of,
)
from kvcensus.daemon.streams.delivery import Control

from ..captures_reader import Message, capture_names, load_capture
from ..nats_servers import Talk, nats_server, talking
from .daemon_process import DaemonProcess, wait_until

UNCOUNTED = "vllm-0.32.0-fullreport"
CUT_OFF = "sglang-0.5.23-smallbuffer"
"""Its first message is nowhere."""
NAMES = [name for engine in ("vllm", "sglang") for name in capture_names(engine)]
STREAM = "KV"


def bus_of(name: str) -> str:
    return "uncounted" if name == UNCOUNTED else "counted"


def send(client: Talk, name: str, durable: bool) -> None:
    """All lives of an engine, one after the other."""
    address = Address(name, None, engine=name.partition("-")[0])
    subject = subject_of(f"{EVENTS_PREFIX}-{bus_of(name)}", address)
    headers = address_headers(f"spool-of-{name}", address)
    for epoch, stage in enumerate(load_capture(name).stages, start=1):
        messages: list[Message] = [*stage.missed, *stage.messages]
        for message in messages:
            said = numbered(headers, epoch, message.seq, Control.NONE)
            (client.store if durable else client.publish)(subject, message.payload, said)


@pytest.fixture(scope="module", params=["core", "jetstream"])
def central(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that has followed every engine to its end."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    durable = request.param == "jetstream"
    prefixes = {name: every_subject(f"{EVENTS_PREFIX}-{name}") for name in ("counted", "uncounted")}
    with nats_server(directory) as server, talking(server.url) as client:
        if durable:
            client.add_stream(STREAM, list(prefixes.values()))
        config = directory / "kvcensus.toml"
        config.write_text(
            "".join(
                f"[[nats]]\nname = '{bus}'\ntype = 'vllm'\nsubjects = ['{subject}']\n"
                f"stream = '{STREAM if durable else ''}'\ncount_copies = {str(bus == 'counted').lower()}\n"
                f"[nats.connection]\nservers = ['{server.url}']\n"
                for bus, subject in prefixes.items()
            )
        )
        with DaemonProcess(directory, "--config", str(config)) as daemon:

            def following() -> bool:
                return all(bus["state"] == "live" for bus in daemon.get("/v1/streams")["buses"])

            wait_until(following, "every bus is followed")
            for name in NAMES:
                send(client, name, durable)
            yield daemon


@pytest.mark.parametrize("name", NAMES)
def test_the_index_is_the_engines_own_cache(central: DaemonProcess, name: str) -> None:
    stages = load_capture(name).stages
    stage, last = stages[-1], stages[-1].messages[-1].seq

    def stream() -> dict[str, object]:
        return {one["stream"]: one for one in central.get("/v1/streams")["streams"]}.get(name, {})

    wait_until(lambda: (stream().get("epoch"), stream().get("last_seq")) == (len(stages), last), "all is committed")
    worker_id = str(stream()["worker_id"])
    assert central.copies()[worker_id] == (dict.fromkeys(stage.copies, 1) if name == UNCOUNTED else stage.copies)
    for probe in stage.probes:
        assert central.match(probe.block_hashes).get(worker_id, 0) == probe.prefix_blocks
    assert stream()["trust"] == ("untrusted" if name == CUT_OFF else "fresh")
    assert stream()["messages"] == len(stage.missed) + len(stage.messages)
