"""How long a `match` takes, in process and over HTTP."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

from kvcensus.backends.interface import IndexBackend

_WARM_UP = 200


class Latency(msgspec.Struct, frozen=True):
    """Percentiles in microseconds."""

    p50_us: float
    p99_us: float
    p999_us: float


def _measure(ask: Callable[[int], object], times: int) -> Latency:
    for number in range(_WARM_UP):
        ask(number)
    taken = []
    for number in range(times):
        started = time.perf_counter_ns()
        ask(number)
        taken.append((time.perf_counter_ns() - started) / 1000)
    cuts = statistics.quantiles(taken, n=1000)
    return Latency(cuts[499], cuts[989], cuts[998])


def _queries(chains: Sequence[Sequence[bytes]], blocks: int) -> list[Sequence[bytes]]:
    queries = [chain[:blocks] for chain in chains if len(chain) >= blocks]
    random.Random(1).shuffle(queries)  # noqa: S311
    return queries


def match_in_process(backend: IndexBackend, chains: Sequence[Sequence[bytes]], blocks: int, times: int) -> Latency:
    """`match` of chains of which every block is held."""
    queries = _queries(chains, blocks)
    assert backend.match(None, queries[0])[0].blocks == blocks
    return _measure(lambda number: backend.match(None, queries[number % len(queries)]), times)


def match_over_http(port: int, chains: Sequence[Sequence[bytes]], blocks: int, times: int) -> Latency:
    """The same as a router asks it: POST /v1/match on one connection that stays open, the answer decoded."""
    bodies = [json.dumps({"block_hashes": [one.hex() for one in query]}) for query in _queries(chains, blocks)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Content-Type": "application/json"}

    def ask(number: int) -> object:
        connection.request("POST", "/v1/match", bodies[number % len(bodies)], headers)
        return json.loads(connection.getresponse().read())["workers"]

    found = ask(0)
    assert isinstance(found, list)
    assert found[0]["blocks"] == blocks, found
    latency = _measure(ask, times)
    connection.close()
    return latency
