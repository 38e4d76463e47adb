"""How long a `match` takes, in process and over HTTP."""

from __future__ import annotations

import json
import random
import socket
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


def measure(ask: Callable[[int], object], times: int) -> Latency:
    """How long `ask` takes, asked `times` times with the number of the question, after a warm-up."""
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
    return measure(lambda number: backend.match(None, queries[number % len(queries)]), times)


def match_over_http(port: int, chains: Sequence[Sequence[bytes]], blocks: int, times: int) -> Latency:
    """The same as a router asks it: POST /v1/match on one connection that stays open, the answer decoded."""
    queries = _queries(chains, blocks)
    requests = [_request(json.dumps({"block_hashes": [one.hex() for one in query]}).encode()) for query in queries]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask(number: int) -> dict[str, list[dict[str, object]]]:
            connection.sendall(requests[number % len(requests)])
            answer: dict[str, list[dict[str, object]]] = json.loads(_body(connection))
            return answer

        found = ask(0)["workers"]
        assert found[0]["blocks"] == blocks, found
        return measure(ask, times)


def _request(body: bytes) -> bytes:
    return (
        b"POST /v1/match HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def _body(connection: socket.socket) -> bytes:
    received = connection.recv(65536)
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return body
