"""What the drills of the alerts are played on: a Prometheus, daemons and relays as processes, engines that publish."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

from kvcensus.daemon.recording import RecordedMessage
from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine, SimulatedRank
from kvcensus.daemon.simulate.rank import RankOptions

from ..end_to_end.daemon_process import DaemonProcess, wait_until
from ..nats_servers import NatsServer, free_port, nats_server, talking
from ..prometheus_server import Prometheus, prometheus
from ..valkey_servers import ValkeyServer, running_server

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
JETSTREAM = "KV"
WAIT_S = 180.0
COMMAND_S = 60.0
DAEMON_JOB = "kvcensus"
RELAY_JOB = "kvcensus-relay"

T = TypeVar("T")
_COMMANDS = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Engine:
    """One simulated engine of one stream that publishes at a pace, in the way that `send` says."""

    def __init__(self, engine: SimulatedEngine, per_s: float) -> None:
        self.name = engine.name
        self.rank: SimulatedRank = engine.ranks[0]
        self.replays = bool(self.rank.sockets.replay_endpoint)
        self.send: Callable[[], object] = self.rank.publish
        self.per_s = per_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish, daemon=True)
        self._thread.start()

    def _publish(self) -> None:
        while not self._ended.wait(1 / self.per_s if self.per_s else 0.1):
            if self.per_s:
                self.send()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def source(self, **settings: object) -> str:
        """The table of the configuration."""
        replay = {"replay_endpoint": self.rank.sockets.replay_endpoint} if self.replays else {}
        table = {"name": self.name, "endpoint": self.rank.sockets.endpoint, **replay, **settings}
        return "[[sources]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())

    def leave(self) -> None:
        """Close the sockets, as an engine that ended."""
        self.rank.sockets.ask(self.rank.sockets.take_down)

    def come_back(self) -> None:
        self.rank.sockets.ask(self.rank.sockets.bring_up)

    def mute(self) -> None:
        """Answer no replay request."""
        self.rank.sockets.ask(lambda: self.rank.sockets.set_mute(True))

    def speak(self) -> None:
        self.rank.sockets.ask(self.rank.sockets.make_honest)

    def publish_damaged(self) -> None:
        """A message that is no msgpack, as which the engine's own one is replaced on its way."""
        (message,) = self.rank.publish(live=False)
        topic, seq, payload = message.frames
        self.rank.send([RecordedMessage(message.received_ns, (topic, seq, b"\xc1" + payload[1:]))])


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


class Scene:
    """One drill. Everything that it starts ends with it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self.prometheus: Prometheus = stack.enter_context(prometheus(directory / "prometheus"))
        self.processes: list[tuple[str, DaemonProcess]] = []
        self._config_path = directory / "kvcensus.toml"

    def engine(self, name: str = "w", *, per_s: float = 20, blocks: int = 256, replay: bool = True) -> Engine:
        """One that publishes from now on."""
        rank = RankOptions(cache=CacheOptions(blocks=blocks))
        simulated = self._stack.enter_context(SimulatedEngine(EngineOptions(name, 7, rank=rank, replay=replay)))
        engine = Engine(simulated, per_s)
        self._stack.callback(engine.stop)
        return engine

    def daemon(self, config: str, backend: str = "lmdb") -> DaemonProcess:
        """`kvcensus run`, scraped and with an answer."""
        self.configure(config)
        self.directory.joinpath("daemon").mkdir()
        daemon = DaemonProcess(self.directory / "daemon", "--config", str(self._config_path), backend=backend)
        self._stack.enter_context(daemon)
        self._add(DAEMON_JOB, daemon)
        return daemon

    def configure(self, config: str) -> None:
        """What the daemon reads at its next start."""
        self._config_path.write_text(config)

    def relay(self, config: str) -> DaemonProcess:
        """`kvcensus relay`, likewise."""
        self.configure(config)
        relay = _Relay(self.directory, self._config_path)
        self._stack.enter_context(relay)
        self._add(RELAY_JOB, relay)
        return relay

    def _add(self, job: str, process: DaemonProcess) -> None:
        self.processes.append((job, process))
        self.scrape_all()
        address = f"127.0.0.1:{process.port}"
        wait_until(lambda: self.prometheus.scraped({address}), f"{address} is scraped", WAIT_S)

    def scrape_all(self) -> None:
        """Have Prometheus find every process."""
        targets: dict[str, list[str]] = {}
        for job, process in self.processes:
            targets.setdefault(job, []).append(f"127.0.0.1:{process.port}")
        self.prometheus.scrape(targets)

    def nats(self) -> NatsServer:
        """A server with the stream KV."""
        server = self._stack.enter_context(nats_server(self.directory))
        with talking(server.url) as talk:
            talk.add_stream(JETSTREAM, ["kvevents.*.*.*"])
        return server

    def valkey(self) -> ValkeyServer:
        return self._stack.enter_context(running_server(self.directory / "valkey", {"appendonly": "yes"}))

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Leave it when the drill ends."""
        return self._stack.enter_context(context)

    def in_background(self, do: Callable[[], object], pause_s: float) -> None:
        """Do it over and over until the returned drill ends."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(pause_s):
                do()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(ended.set)

    def run_commands(self, alert: str) -> int:
        """Run every command of the runbook page, at this scene's addresses and paths. Returns how many there are.

        AssertionError for one that does not exit with 0.
        """
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        commands = commands_of(alert)
        for command in commands:
            for shown, real in self._places().items():
                command = command.replace(shown, real)
            done = subprocess.run(
                ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, timeout=COMMAND_S
            )
            assert done.returncode == 0, f"{alert}: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return len(commands)

    def _places(self) -> dict[str, str]:
        """What stands for what in the pages."""
        places = {
            "http://localhost:9090": f"http://127.0.0.1:{self.prometheus.port}",
            "/etc/kvcensus/kvcensus.toml": str(self._config_path),
            "/var/lib/kvcensus": str(self.directory / "daemon" / "data"),
        }
        for shown, job in (("127.0.0.1:9480", DAEMON_JOB), ("127.0.0.1:9481", RELAY_JOB)):
            ports = [process.port for of, process in self.processes if of == job]
            if ports:
                places[shown] = f"127.0.0.1:{ports[0]}"
        return places


class _Relay(DaemonProcess):
    def __init__(self, directory: Path, config: Path) -> None:
        directory.joinpath("relay").mkdir()
        super().__init__(directory / "relay")
        self._command = [sys.executable, "-m", "kvcensus.daemon.cli", "relay", "--config", str(config)]
        self._command += ["--spool-dir", str(directory / "relay" / "spool"), "--http", f"127.0.0.1:{self.port}"]


def commands_of(alert: str) -> list[str]:
    """The commands of a runbook page, in their order."""
    text = (RUNBOOKS / f"{alert}.md").read_text()
    lines = "".join(_COMMANDS.findall(text)).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def wait_for(true: Callable[[], bool], what: str) -> float:
    """Wait, and return the seconds that it took. AssertionError after three minutes."""
    started = time.monotonic()
    deadline = started + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.25)
    return time.monotonic() - started


__all__ = ["JETSTREAM", "Engine", "Scene", "commands_of", "free_port", "wait_for", "wait_until"]
