"""What the drills of a bus are played on: a fleet of simulated engines, relays, a cluster, and one central daemon.

The engines are threads of the drill and know what they hold; relays, servers and the daemon are real processes. The
replay rings hold everything that was ever published: a relay that was away, for however long, can ask for all of it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvcensus.daemon.drill.faults import Excuse
from kvcensus.daemon.drill.oracle import Outcome, WorkerReport, compare, index_of
from kvcensus.daemon.simulate.cache import CacheOptions
from kvcensus.daemon.simulate.engine import EngineOptions, SimulatedEngine
from kvcensus.daemon.simulate.rank import RankOptions

from ..end_to_end.daemon_process import DaemonProcess
from ..nats_servers import NatsCluster, free_port, nats_cluster, talking
from .source import Source

JETSTREAM = "KV"
BUS = "fleet"
RING = 1_000_000
CACHE_BLOCKS = 2048
SETTLE_S = 300.0
_LOOK_S = 0.2
_SHOWN = 4000
_SUBJECT = "kvevents.>"
_REPLICAS = 3
_UNBOUNDED: Mapping[int, int] = {}

_RELAY = """[relay]
stream = "{jetstream}"
{bound}
[relay.connection]
servers = {servers}
"""
_SOURCE = """
[[sources]]
name = "{name}"
type = "vllm"
endpoint = "tcp://127.0.0.1:{live}"
replay_endpoint = "tcp://127.0.0.1:{replay}"
"""
_CENTRAL = """[[nats]]
name = "{bus}"
type = "vllm"
stream = "{jetstream}"
[nats.connection]
servers = {servers}
"""


class RelayProcess(DaemonProcess):
    """`kvcensus relay` for some of the workers. `bound` of its spool in bytes, 0: the default."""

    def __init__(self, directory: Path, config: Path, engines: Sequence[SimulatedEngine], bound: int) -> None:
        super().__init__(directory)
        self.port = free_port()
        self._streams = {engine.name: engine.ranks[0].worker_id for engine in engines}
        self.bound = bound
        self._command = [sys.executable, "-m", "kvcensus.daemon.cli", "relay", "--config", str(config)]
        self._command += ["--spool-dir", str(directory / "spool"), "--http", f"127.0.0.1:{self.port}"]

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(self._streams.values())

    def published(self, worker: str) -> int:
        """The last number of a worker that the bus has."""
        streams = self.get("/v1/relay")["streams"]
        return next(int(one["published_seq"]) for one in streams if self._streams[one["stream"]] == worker)

    def dropped(self) -> dict[str, int]:
        """Messages that it says it gave up, by worker."""
        name = "kvcensus_relay_stream_dropped_messages_total"
        found = {worker: int(self.metric(name, stream=one, cause="bound")) for one, worker in self._streams.items()}
        return {worker: count for worker, count in found.items() if count}

    def said_dropped(self) -> dict[str, int]:
        """The same by its log."""
        found: Counter[str] = Counter()
        for line in self.log():
            if line["event"] == "messages_dropped":
                found[self._streams[line["worker"]]] += line["messages"]
        return dict(found)


class Fleet:
    """Engines that publish from now on until they are told to pause, and what they published."""

    def __init__(self, engines: Sequence[SimulatedEngine], blocks_per_s: float) -> None:
        ranks = [engine.ranks[0] for engine in engines]
        self.sources = {rank.worker_id: Source(rank, blocks_per_s=blocks_per_s / len(ranks)) for rank in ranks}

    @property
    def stored(self) -> int:
        """Blocks stored so far."""
        return sum(source.stored for source in self.sources.values())

    @property
    def messages(self) -> int:
        return sum(source.messages for source in self.sources.values())

    def pause(self) -> None:
        for source in self.sources.values():
            source.pause()

    def resume(self) -> None:
        for source in self.sources.values():
            source.resume()


class Stage:
    """Everything of a drill, running. `difference` says how the central index is not what it should be."""

    def __init__(
        self, fleet: Fleet, cluster: NatsCluster, relays: Sequence[RelayProcess], central: DaemonProcess
    ) -> None:
        self.fleet = fleet
        self.cluster = cluster
        self.relays = relays
        self.central = central

    @property
    def processes(self) -> tuple[DaemonProcess, ...]:
        """Relays and daemon."""
        return (*self.relays, self.central)

    def check_alive(self, away: Collection[str] = ()) -> None:
        """No process ends by itself, but for those that were killed. AssertionError otherwise."""
        for one in self.processes:
            if one.directory.name not in away:
                assert one.process is not None
                code = one.process.poll()
                assert code is None, f"{one.directory.name} ended by itself with {code}"

    def settle(self, untrusted: frozenset[str] = frozenset(), timeout_s: float = SETTLE_S) -> float:
        """Wait, while the fleet pauses, until the central index is what it should be. Returns the seconds it took.

        That is the truth for all workers but `untrusted`, which it must not believe. AssertionError after `timeout_s`.
        """
        started = time.monotonic()
        problems = self.difference(untrusted)
        while problems:
            elapsed = time.monotonic() - started
            assert elapsed < timeout_s, f"after {elapsed:.0f} s: " + "; ".join(problems)
            time.sleep(_LOOK_S)
            problems = self.difference(untrusted)
        return time.monotonic() - started

    def difference(self, untrusted: frozenset[str] = frozenset()) -> list[str]:
        """What is not as it should be, one sentence for each."""
        self.check_alive()
        streams = {one["worker_id"]: one for one in self.central.get("/v1/streams")["streams"]}
        truths = [source.rank.truth() for source in self.fleet.sources.values()]
        behind = [
            f"{truth.worker_id} is {stream['state']} at {stream['last_seq']} of {truth.last_seq}"
            for truth in truths
            if (stream := streams.get(truth.worker_id, _NO_STREAM))["last_seq"] != truth.last_seq
        ]
        if behind:
            return behind
        excuses = {worker: {Excuse.UNTRUSTED} for worker in untrusted}
        reports = compare(truths, streams, index_of(self.central.snapshot()), excuses)
        return [_told(report) for report in reports if not _is_right(report, untrusted)] + [
            problem for worker, stream in streams.items() for problem in self._miscounted(worker, stream, untrusted)
        ]

    def _miscounted(self, worker: str, stream: Mapping[str, Any], untrusted: frozenset[str]) -> Iterator[str]:
        """Counts of another life, or of something lost or applied twice."""
        if stream["epoch"] != 1:
            yield f"{worker} is in epoch {stream['epoch']}"
        if worker in untrusted:
            return
        if stream["trust"] != "fresh":
            yield f"{worker} is {stream['trust']}: {stream['reason']}"
        source = self.fleet.sources[worker]
        applied = (stream["messages"], stream["blocks_stored"], stream["blocks_removed"])
        if applied != (made := (source.messages, source.stored, source.removed)):
            yield f"{worker}: {applied} messages, blocks stored and removed were applied of {made}"

    def stored_messages(self) -> int:
        """Messages in the stream, control messages included."""
        with talking(*self.cluster.urls) as talk:
            return int(talk.stream_info(JETSTREAM).state.messages)


_NO_STREAM: Mapping[str, Any] = {"state": "unknown", "last_seq": -1}


def _is_right(report: WorkerReport, untrusted: frozenset[str]) -> bool:
    return report.outcome is (Outcome.UNTRUSTED if report.worker_id in untrusted else Outcome.EQUAL)


def _told(report: WorkerReport) -> str:
    return f"{report.worker_id} is {report.outcome}: {report.problem or 'it should not be'} ({report.reason})"


@contextmanager
def bus_stage(
    directory: Path,
    *,
    workers: int,
    relays: int,
    seed: int,
    blocks_per_s: float,
    bounds: Mapping[int, int] = _UNBOUNDED,
) -> Iterator[Stage]:
    """A stage on which the fleet publishes `blocks_per_s` stored blocks.

    `bounds` are those of the spools of some relays, by number; the others have the default. Every process runs by
    then, and every relay has subscribed.
    """
    rank = RankOptions(cache=CacheOptions(blocks=CACHE_BLOCKS))
    with ExitStack() as stack:
        engines = [
            stack.enter_context(SimulatedEngine(EngineOptions(f"w{one:02}", seed + one, rank=rank, buffer_steps=RING)))
            for one in range(workers)
        ]
        cluster = stack.enter_context(nats_cluster(directory))
        with talking(*cluster.urls) as talk:
            talk.add_stream(JETSTREAM, [_SUBJECT], num_replicas=_REPLICAS)
        servers = json.dumps(cluster.urls)
        made = []
        for number in range(relays):
            place = directory / f"relay-{number}"
            place.mkdir()
            mine = engines[number::relays]
            config = place / "relay.toml"
            bound = bounds.get(number, 0)
            config.write_text(_relay_config(mine, servers, bound))
            made.append(RelayProcess(place, config, mine, bound))
        (directory / "central").mkdir()
        central_config = directory / "central" / "kvcensus.toml"
        central_config.write_text(_CENTRAL.format(bus=BUS, jetstream=JETSTREAM, servers=servers))
        central = DaemonProcess(directory / "central", "--config", str(central_config), port=free_port())
        for process in (*made, central):
            stack.enter_context(process)
        for one in engines:
            assert one.ranks[0].sockets.wait_subscribers(1, SETTLE_S)
        stage = Stage(Fleet(engines, blocks_per_s), cluster, made, central)
        stack.callback(stage.fleet.pause)
        yield stage


def _relay_config(engines: Sequence[SimulatedEngine], servers: str, bound: int) -> str:
    text = _RELAY.format(jetstream=JETSTREAM, servers=servers, bound=f"spool_max_bytes = {bound}\n" if bound else "")
    for one in engines:
        text += _SOURCE.format(name=one.name, live=one.base_port, replay=one.replay_port)
        text += f"max_message_bytes = {bound}\n" if bound else ""
    return text


def run_drill(play: Callable[[Path], Any], keep: Path | None) -> int:
    """Play a drill in a directory of its own and print what it found, as JSON. Returns the exit code.

    The directory goes unless something was wrong: it has every log, spool, index and stream.
    """
    directory = Path(tempfile.mkdtemp(prefix="kvcensus-drill-")) if keep is None else keep
    directory.mkdir(parents=True, exist_ok=True)
    try:
        report = play(directory)
    except AssertionError as error:
        (directory / "problem.txt").write_text(str(error))
        print(f"FAILED: {str(error)[:_SHOWN]}\nEvidence is in {directory}", file=sys.stderr)
        return 1
    except BaseException:
        print(f"Evidence is in {directory}", file=sys.stderr)
        raise
    print(json.dumps(report, indent=2))
    if keep is None:
        shutil.rmtree(directory)
    return 0
