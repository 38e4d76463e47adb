"""What makes each alert fire, and what ends it.

A drill is a generator with three steps: all is well; what the alert is about has happened; it is mended. `CAUSES` has
them with the alerts that each must raise.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from subprocess import CalledProcessError
from typing import Any

import msgspec

from kvcensus.daemon.drill.machine import pinned_index

from ..end_to_end.daemon_process import DaemonProcess
from ..nats_servers import NatsServer, talking
from ..valkey_servers import ValkeyServer
from .alert_stage import JETSTREAM, Engine, Scene, wait_for

Steps = Iterator[None]

QUICK = {"probe_ms": 500, "replay_timeout_ms": 300, "stale_after_ms": 2000, "silent_after_ms": 2000}
"""Waits of a source, so that they fit into the shortened time."""


class Cause(msgspec.Struct, frozen=True):
    """`what` is done, and the `alerts` that it must raise."""

    alerts: tuple[str, ...]
    what: str
    steps: Callable[[Scene], Steps]


def _signal(process: DaemonProcess, number: int) -> None:
    assert process.process is not None
    process.process.send_signal(number)


def _restart(scene: Scene, daemon: DaemonProcess, config: str | None = None) -> None:
    assert daemon.terminate() == 0
    if config is not None:
        scene.configure(config)
    daemon.start()


def hangs(scene: Scene) -> Steps:
    daemon = scene.daemon(scene.engine().source())
    yield
    _signal(daemon, signal.SIGSTOP)
    yield
    _signal(daemon, signal.SIGCONT)
    yield


def not_found(scene: Scene) -> Steps:
    scene.daemon(scene.engine().source())
    yield
    scene.prometheus.scrape({})
    yield
    scene.scrape_all()
    yield


def crashes(scene: Scene) -> Steps:
    daemon = scene.daemon(scene.engine().source())
    address = f"127.0.0.1:{daemon.port}"
    yield
    for _ in range(4):
        daemon.kill()
        daemon.start()
        time.sleep(2)  # two scrapes, to be seen as a start of its own
        wait_for(lambda: scene.prometheus.scraped({address}), "it is scraped again")
    yield
    yield


def bus_never_there(scene: Scene) -> Steps:
    engine, server = scene.engine(), NatsServer(scene.directory)
    daemon = scene.daemon(engine.source())
    yield
    _restart(scene, daemon, engine.source() + _bus(server.url))
    yield
    server.start()
    try:
        with talking(server.url) as talk:
            talk.add_stream(JETSTREAM, ["kvevents.*.*.*"])
        yield
    finally:
        server.kill()


def unrecoverable(scene: Scene) -> Steps:
    engine = scene.engine()
    scene.daemon(engine.source(**QUICK))
    yield
    engine.rank.lose_message()
    yield
    engine.rank.restart()
    yield


def most_leave(scene: Scene) -> Steps:
    engines = [scene.engine(f"w{number}") for number in range(3)]
    scene.daemon("".join(engine.source(**QUICK) for engine in engines))
    yield
    for engine in engines[1:]:
        engine.leave()
    yield
    for engine in engines[1:]:
        engine.come_back()
    yield


def publisher_hangs(scene: Scene) -> Steps:
    """An idle engine beside it is not to be taken for mute: it answers."""
    engine, idle = scene.engine("w"), scene.engine("idle")
    scene.daemon(engine.source(**QUICK) + idle.source(**QUICK))
    idle.per_s = 0
    yield
    engine.per_s = 0
    engine.mute()
    yield
    (alert,) = scene.prometheus.firing("KvcensusStreamSilent")
    assert alert["labels"]["stream"] == "w", alert
    engine.speak()
    yield


def events_off(scene: Scene) -> Steps:
    """An engine with a replay socket that nobody has asked anything is not to be taken for one."""
    answering, engine = scene.engine("idle", per_s=0), scene.engine("w", per_s=0, replay=False)
    scene.daemon(engine.source(silent_after_ms=2_000_000) + answering.source(**QUICK))
    yield
    _restart(scene, scene.processes[0][1], engine.source(**QUICK) + answering.source(**QUICK))
    yield
    (alert,) = scene.prometheus.firing("KvcensusStreamNeverHeard")
    assert alert["labels"]["stream"] == "w", alert
    engine.per_s = 20
    yield


def clock_behind(scene: Scene) -> Steps:
    engine = scene.engine()
    scene.daemon(engine.source())
    yield
    engine.rank.rank.clock_ahead_s = -30.0
    yield
    engine.rank.rank.clock_ahead_s = 0.0
    yield


def replay_mute(scene: Scene) -> Steps:
    engine = scene.engine(per_s=1)
    scene.daemon(engine.source(**{**QUICK, "probe_ms": 200, "replay_timeout_ms": 100}))
    yield
    engine.mute()
    yield
    engine.speak()
    yield


def _small_map(engine: Engine, map_bytes: int, queue: int = 10_000) -> str:
    return f"[index]\nmap_size_bytes = {map_bytes}\n[writer]\nqueue_max_messages = {queue}\n{engine.source(**QUICK)}"


def map_full(scene: Scene) -> Steps:
    """The reader keeps what is freed, so that the map fills for sure. Mended as the page says: with a larger map."""
    engine = scene.engine(per_s=100)
    daemon = scene.daemon(_small_map(engine, 1 << 30, queue=200))
    yield
    _restart(scene, daemon, _small_map(engine, 2 << 20, queue=200))
    with pinned_index(daemon.directory / "data"):
        wait_for(lambda: any("nothing can be written" in one for one in daemon.problems()), "the map is full")
        yield
    daemon.kill()
    scene.configure(_small_map(engine, 1 << 30, queue=200))
    daemon.start()
    yield


def map_fills(scene: Scene) -> Steps:
    engine = scene.engine(per_s=200, blocks=16_384)
    daemon = scene.daemon(_small_map(engine, 1 << 30))
    yield
    wait_for(lambda: daemon.metric("kvcensus_backend_live_bytes") > 2 << 20, "there is something in it")
    engine.per_s = 1
    _restart(scene, daemon, _small_map(engine, int(daemon.metric("kvcensus_backend_live_bytes") / 0.45)))
    yield
    _restart(scene, daemon, _small_map(engine, 1 << 30))
    yield


def truncated(scene: Scene) -> Steps:
    engine = scene.engine()
    daemon = scene.daemon('[index]\non_corrupt = "rebuild"\n' + engine.source())
    yield
    assert daemon.terminate() == 0
    os.truncate(daemon.directory / "data" / "index.mdb", 4096)
    daemon.start()
    yield
    _restart(scene, daemon)
    yield


def snapshots_fail(scene: Scene) -> Steps:
    engine = scene.engine(per_s=400, blocks=1024)
    daemon = scene.daemon("[filesystem]\nsnapshot_after_bytes = 1048576\n" + engine.source(), backend="filesystem")
    yield
    killing = [True]

    def kill_snapshots() -> None:
        assert daemon.process is not None
        for children in Path(f"/proc/{daemon.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split() if killing else ():
                os.kill(int(pid), signal.SIGKILL)

    scene.in_background(kill_snapshots, 0.02)
    wait_for(lambda: daemon.metric("kvcensus_backend_untidy") == 1, "a snapshot has failed")
    yield
    killing.clear()
    yield


def reader_stays(scene: Scene) -> Steps:
    engine = scene.engine(per_s=100)
    daemon = scene.daemon("[writer]\ncommit_max_ms = 0\n" + engine.source())
    yield
    with pinned_index(daemon.directory / "data"):
        yield
    yield


def _on_valkey(server: ValkeyServer, engine: Engine) -> str:
    return f'[valkey]\nservers = ["{server.address}"]\ntimeout_ms = 2000\n{engine.source()}'


def server_gone(scene: Scene) -> Steps:
    server, engine = scene.valkey(), scene.engine()
    scene.daemon(_on_valkey(server, engine), backend="valkey")
    yield
    server.kill()
    yield
    server.start()
    yield


def server_slow(scene: Scene) -> Steps:
    """It stands still for six tenths of a second at a time."""
    server, engine = scene.valkey(), scene.engine()
    scene.daemon(_on_valkey(server, engine), backend="valkey")
    yield
    slow = [True]

    def stand_still() -> None:
        if slow:
            server.pause()
            time.sleep(0.6)
            server.resume()

    scene.in_background(stand_still, 0.3)
    yield
    slow.clear()
    yield


def misread(scene: Scene) -> Steps:
    engine = scene.engine()
    scene.daemon(engine.source())
    yield
    engine.send = engine.publish_damaged
    yield
    engine.send = engine.rank.publish
    yield


def _bus(url: str, more: str = "") -> str:
    connection = f'[nats.connection]\nservers = ["{url}"]\nreconnect_max_ms = 1000\nconnect_timeout_ms = 1000\n'
    return f'[[nats]]\nname = "fleet"\ntype = "vllm"\nstream = "{JETSTREAM}"\n{more}{connection}'


def broker_gone(scene: Scene) -> Steps:
    server = scene.nats()
    scene.daemon(_bus(server.url))
    yield
    server.kill()
    yield
    server.start()
    yield


def too_many_workers(scene: Scene) -> Steps:
    server = scene.nats()
    engines = [scene.engine(f"w{number}", per_s=0) for number in range(2)]
    talk: Any = scene.enter(talking(server.url))

    def publish() -> None:
        for engine in engines:
            (message,) = engine.rank.publish(live=False)
            headers = {"Kv-Source": "drill", "Kv-Epoch": "1", "Kv-Seq": str(message.seq), "Kv-Engine": "vllm"}
            talk.store(f"kvevents.m.{engine.name}.-", message.payload, headers)

    daemon = scene.daemon(_bus(server.url))
    scene.in_background(publish, 0.2)
    yield
    _restart(scene, daemon, _bus(server.url))
    assert daemon.terminate() == 0
    for path in (daemon.directory / "data").glob("index.mdb*"):
        path.unlink()
    scene.configure(_bus(server.url, "max_workers = 1\n"))
    daemon.start()
    yield
    _restart(scene, daemon, _bus(server.url))
    yield


def _shadowed(engine: Engine, server: ValkeyServer) -> str:
    shadow = f'[shadow]\nbackend = "valkey"\ndata_dir = "{server.directory}/lease"\nsample_per_s = 1000\n'
    return f'{shadow}[shadow.options]\nservers = ["{server.address}"]\ntimeout_ms = 1000\n{engine.source()}'


def shadow_loses(scene: Scene) -> Steps:
    """Half of its rows are deleted behind its back. Mended as the page says: an empty shadow is made again."""
    server, engine = scene.valkey(), scene.engine(per_s=50)
    daemon = scene.daemon(_shadowed(engine, server))
    yield
    wait_for(lambda: daemon.metric("kvcensus_shadow_records") > 100, "there is something in it")
    for bucket in Random(7).sample(range(256), 128):
        with suppress(CalledProcessError):
            server.cli("DEL", f"{{kvcensus/main}}:b:{bucket}")
    yield
    assert daemon.terminate() == 0
    server.cli("FLUSHALL")
    daemon.start()
    yield


def shadow_breaks(scene: Scene) -> Steps:
    server, engine = scene.valkey(), scene.engine()
    daemon = scene.daemon(_shadowed(engine, server))
    yield
    server.kill()
    yield
    server.start()
    _restart(scene, daemon)
    yield


def relay_without_broker(scene: Scene) -> Steps:
    server, engine = scene.nats(), scene.engine(per_s=50)
    spool = f'[relay]\nstream = "{JETSTREAM}"\nspool_max_bytes = 262144\n'
    connection = f'[relay.connection]\nservers = ["{server.url}"]\n'
    scene.relay(spool + connection + engine.source(model="m", max_message_bytes=65_536))
    scene.directory.joinpath("daemon").mkdir()
    yield
    server.kill()
    yield
    server.start()
    yield


CAUSES = (
    Cause(("KvcensusDown",), "SIGSTOP of the daemon; SIGCONT", hangs),
    Cause(("KvcensusAbsent",), "the only target is taken out of the scrape configuration; put back", not_found),
    Cause(("KvcensusRestarting",), "four times kill -9 and a start; left alone", crashes),
    Cause(("KvcensusNotReady",), "a bus whose server was never there; the server is started", bus_never_there),
    Cause(("KvcensusWorkerFenced",), "the engine uses a number that it never publishes; it restarts", unrecoverable),
    Cause(
        ("KvcensusWorkersNotFresh", "KvcensusStreamDisconnected"),
        "two of three engines close their sockets; open them again",
        most_leave,
    ),
    Cause(("KvcensusStreamSilent",), "an engine neither publishes nor answers; answers again", publisher_hangs),
    Cause(("KvcensusStreamNeverHeard",), "an engine without replay that publishes nothing; it begins to", events_off),
    Cause(("KvcensusLagHigh",), "the engine's clock is 30 s behind; set right", clock_behind),
    Cause(("KvcensusReplayFailing",), "the replay socket answers nothing; answers again", replay_mute),
    Cause(
        ("KvcensusBackendCannotWrite", "KvcensusQueueFull"),
        "a map of 2 MiB and a reader that pins it; restarted with a larger map",
        map_full,
    ),
    Cause(("KvcensusIndexBeganAnew",), "an index of which one page is left; started again", truncated),
    Cause(
        ("KvcensusIndexUntidy",),
        "every process that makes a snapshot is killed with SIGKILL; none is",
        snapshots_fail,
    ),
    Cause(("KvcensusMapNearlyFull",), "a map that is used by 45 %; restarted with a larger one", map_fills),
    Cause(("KvcensusReaderPinsIndex",), "a process keeps a read transaction open; ends it", reader_stays),
    Cause(("KvcensusIndexUnreadable",), "kill -9 of the valkey server; started again", server_gone),
    Cause(("KvcensusCommitSlow",), "the valkey server stands still for 0.6 s at a time; no more", server_slow),
    Cause(("KvcensusQuarantineGrowing",), "every message is damaged on its way; none is", misread),
    Cause(("KvcensusBusFailing",), "kill -9 of the only NATS server; started again", broker_gone),
    Cause(("KvcensusBusRefusesWorkers",), "two workers and max_workers = 1; set higher", too_many_workers),
    Cause(("KvcensusShadowDisagrees",), "half of the shadow's rows are deleted; it is made anew", shadow_loses),
    Cause(("KvcensusShadowBroken",), "kill -9 of the shadow's server; started again, and the daemon", shadow_breaks),
    Cause(
        ("KvcensusRelayCannotPublish", "KvcensusRelaySpoolFilling", "KvcensusRelayDropping"),
        "kill -9 of the only NATS server, a spool of 256 KiB; the server is started again",
        relay_without_broker,
    ),
)
