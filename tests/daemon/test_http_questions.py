"""match, locate and children over real HTTP, on each backend."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheResidency, CacheTier, Holding, IdentityScope, WorkerMatch
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.status import StreamStatus, Trust

from .served import Client, View, block, chain, name, record, serving, status

LORA = IdentityScope("m", "m", "lora")
TENANT = IdentityScope("m", "t", "", "acme")


@pytest.fixture(params=["memory", "lmdb"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[IndexBackend]:
    opened: IndexBackend = MemoryBackend() if request.param == "memory" else LmdbBackend(tmp_path / "data")
    opened.apply(
        [
            chain(0, 4, "w"),
            chain(0, 2, "w", tier=CacheTier.CPU_DRAM),
            chain(0, 3, "dp/1", rank=1),
            chain(100, 2, "w", scope=LORA),
            chain(200, 2, "hybrid", scope=TENANT, group=1),
        ]
    )
    yield opened
    opened.close()


@pytest.fixture
def client(backend: IndexBackend) -> Iterator[Client]:
    view = View(backend, [status("w"), status("dp/1", rank=1, trust=Trust.CATCHING_UP, reason="replaying", last_seq=7)])
    with serving(view, HttpConfig(max_hashes_per_query=3000)) as client:
        yield client


def _names(first: int, count: int) -> list[str]:
    return [name(number) for number in range(first, first + count)]


def test_match_tells_the_prefix_by_worker_and_tier_and_how_far_to_believe_it(client: Client) -> None:
    answer = client.post("/v1/match", {"block_hashes": _names(0, 6)})

    assert answer.status == 200
    workers = answer.json["workers"]
    assert [worker.pop("age_ms") > 0 for worker in workers] == [True, True]
    assert workers == [
        {
            "worker_id": "w",
            "rank": None,
            "trust": "fresh",
            "reason": "",
            "last_seq": 41,
            "tiers": {"hbm": 4, "cpu_dram": 2},
            "blocks": 4,
            "blocks_any_tier": 4,
        },
        {
            "worker_id": "dp/1",
            "rank": 1,
            "trust": "catching_up",
            "reason": "replaying",
            "last_seq": 7,
            "tiers": {"hbm": 3},
            "blocks": 3,
            "blocks_any_tier": 3,
        },
    ]


def _matched(client: Client, **body: Any) -> dict[str, int]:
    answer = client.post("/v1/match", body)
    assert answer.status == 200, answer
    return {worker["worker_id"]: worker["blocks"] for worker in answer.json["workers"]}


def test_only_trusted_workers_when_asked_for(client: Client) -> None:
    assert _matched(client, block_hashes=_names(0, 6), trusted_only=True) == {"w": 4}
    assert _matched(client, block_hashes=_names(0, 6), trusted_only=False) == {"w": 4, "dp/1": 3}


def test_a_scope_without_tokenizer_has_the_models(client: Client) -> None:
    assert _matched(client, block_hashes=_names(0, 4), scope={"model_id": "m"}) == {"w": 4, "dp/1": 3}
    assert _matched(client, block_hashes=_names(0, 4), scope={"model_id": "m", "tokenizer_id": "other"}) == {}


def test_a_null_adapter_is_not_an_empty_one(client: Client) -> None:
    empty = {"model_id": "m", "tokenizer_id": "t", "adapter_id": "", "tenant_id": "acme"}
    assert _matched(client, block_hashes=_names(200, 2), scope=empty) == {"hybrid": 2}
    assert _matched(client, block_hashes=_names(200, 2), scope={**empty, "adapter_id": None}) == {}
    assert _matched(client, block_hashes=_names(100, 2), scope={"model_id": "m", "adapter_id": "lora"}) == {"w": 2}
    assert _matched(client, block_hashes=_names(100, 2), scope=None) == {"w": 2}


def test_hashes_in_capitals_and_as_integers_of_either_sign(client: Client, backend: IndexBackend) -> None:
    top = (2**64 - 1).to_bytes(8, "big")
    backend.apply([msgspec.structs.replace(chain(0, 1, "neg"), block_hashes=(b"\xab" * 8, top))])

    assert _matched(client, block_hashes=[0, name(1), 2]) == {"w": 3, "dp/1": 3}
    assert _matched(client, block_hashes=["AB" * 8, -1]) == {"neg": 2}
    assert _matched(client, block_hashes=["aB" * 8, 2**64 - 1]) == {"neg": 2}


def test_hashes_of_different_lengths_in_one_question(client: Client, backend: IndexBackend) -> None:
    backend.apply([msgspec.structs.replace(chain(0, 1, "long"), block_hashes=(b"\x01" * 32, b"\x02" * 8))])

    assert _matched(client, block_hashes=["01" * 32, "02" * 8]) == {"long": 2}


def test_no_hash_matches_nobody(client: Client) -> None:
    assert _matched(client, block_hashes=[]) == {}


def test_a_long_match_is_answered_like_a_short_one(client: Client, backend: IndexBackend) -> None:
    backend.apply([chain(10_000, 2500, "long")])

    assert _matched(client, block_hashes=_names(10_000, 2600)) == {"long": 2500}


def test_a_worker_without_a_stream_is_untrusted_and_the_answer_says_why(client: Client, backend: IndexBackend) -> None:
    backend.apply([chain(300, 1, "ghost")])

    (worker,) = client.post("/v1/match", {"block_hashes": [name(300)]}).json["workers"]

    assert (worker["trust"], worker["last_seq"], worker["age_ms"]) == ("untrusted", -1, None)
    assert worker["reason"] == "no stream is configured for this worker"


def test_msgpack_both_ways(client: Client) -> None:
    question = {"block_hashes": [name(0), 1, name(2)], "scope": {"model_id": "m"}}
    for media_type in ("application/msgpack", "application/x-msgpack"):
        answer = client.post("/v1/match", msgspec.msgpack.encode(question), Content_Type=media_type, Accept=media_type)
        assert answer.headers["content-type"] == "application/msgpack"
        workers = msgspec.msgpack.decode(answer.raw)["workers"]
        assert {worker["worker_id"]: worker["blocks"] for worker in workers} == {"w": 3, "dp/1": 3}


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "application/json"),
        ("application/json, application/msgpack;q=0.5", "application/json"),
        ("application/json;q=0.2, application/msgpack;q=0.5", "application/msgpack"),
        ("application/msgpack, */*", "application/msgpack"),
        ("application/msgpack;q=nonsense", "application/json"),
        ("text/html", "application/json"),
    ],
)
def test_the_answer_is_in_the_preferred_encoding(client: Client, accept: str, content_type: str) -> None:
    assert client.get("/v1/streams", Accept=accept).headers["content-type"] == content_type


def test_locate_finds_a_block_on_every_worker_and_tier(client: Client) -> None:
    answer = client.post("/v1/locate", {"block_hash": name(1)})

    residencies = sorted(answer.json["residencies"], key=lambda one: (one["worker_id"], one["tier"]))
    assert [one.pop("age_ms") > 0 for one in residencies] == [True] * 3
    fresh = {"trust": "fresh", "reason": "", "last_seq": 41}
    assert residencies == [
        record(1, worker_id="dp/1", rank=1, trust="catching_up", reason="replaying", last_seq=7),
        record(1, tier="cpu_dram", **fresh),
        record(1, **fresh),
    ]


def _located(client: Client, body: dict[str, Any]) -> list[tuple[str, str, int]]:
    answer = client.post("/v1/locate", body)
    assert answer.status == 200, answer
    return sorted((one["worker_id"], one["tier"], one["group"]) for one in answer.json["residencies"])


def test_locate_within_a_scope_and_a_group(client: Client) -> None:
    tenant = {"model_id": "m", "tokenizer_id": "t", "adapter_id": "", "tenant_id": "acme"}
    assert _located(client, {"block_hash": name(200), "scope": tenant}) == [("hybrid", "hbm", 1)]
    assert _located(client, {"block_hash": name(200), "scope": {"model_id": "m"}}) == []
    assert _located(client, {"block_hash": name(200), "group": 1}) == [("hybrid", "hbm", 1)]
    assert _located(client, {"block_hash": name(200), "group": 0}) == []
    assert _located(client, {"block_hash": name(999)}) == []


def test_locate_by_query_parameters(client: Client) -> None:
    def found(query: str) -> int:
        answer = client.get(f"/v1/locate?{query}")
        assert answer.status == 200, answer
        return len(answer.json["residencies"])

    assert found(f"block_hash={name(1)}") == 3
    assert found(f"block_hash={name(1).upper()}&model_id=m") == 3
    assert found(f"block_hash={name(100)}&model_id=m&adapter_id=lora") == 1
    assert found(f"block_hash={name(200)}&model_id=m&tokenizer_id=t&adapter_id=&tenant_id=acme&group=1") == 1
    assert found(f"block_hash={name(200)}&model_id=m&tokenizer_id=t&tenant_id=acme") == 0


def test_children_of_a_block_and_of_the_root(client: Client, backend: IndexBackend) -> None:
    backend.apply([chain(50, 1, "w", parent=block(0))])

    def children(prefix: str | int) -> set[str]:
        answer = client.post("/v1/children", {"scope": {"model_id": "m"}, "prefix_hash": prefix})
        assert answer.status == 200, answer
        by_query = client.get(f"/v1/children?model_id=m&prefix_hash={prefix}") if isinstance(prefix, str) else answer
        without_age = [
            sorted((one["block_hash"], one["worker_id"], one["tier"], one["trust"]) for one in got.json["residencies"])
            for got in (answer, by_query)
        ]
        assert without_age[0] == without_age[1]
        return {one["block_hash"] for one in answer.json["residencies"]}

    assert children("root") == {name(0)}
    assert children(name(0)) == children(0) == {name(1), name(50)}
    assert children(name(3)) == set()


def test_a_limit_of_children_leaves_out_whole_blocks_and_says_so(client: Client, backend: IndexBackend) -> None:
    backend.apply([chain(50, 1, "w"), chain(60, 1, "w"), chain(50, 1, "dp/1", rank=1)])

    answer = client.get("/v1/children?model_id=m&prefix_hash=root&limit=2").json
    held = [(one["block_hash"], one["worker_id"]) for one in answer["residencies"] if one["tier"] == "hbm"]
    assert sorted(held) == [(name(0), "dp/1"), (name(0), "w"), (name(50), "dp/1"), (name(50), "w")]
    assert answer["more"] is True
    body = {"scope": {"model_id": "m"}, "prefix_hash": "root"}
    assert client.post("/v1/children", body).json["more"] is False
    assert client.post("/v1/children", {**body, "limit": 3}).json["more"] is False
    assert client.post("/v1/children", {**body, "limit": 0}).error == (400, "invalid", "limit")
    assert client.post("/v1/children", {**body, "limit": 2**63 - 1}).json["more"] is False
    assert client.post("/v1/children", {**body, "limit": 2**63}).error == (400, "invalid", "limit")
    assert client.get(f"/v1/children?model_id=m&prefix_hash=root&limit={2**64}").error == (400, "invalid", "limit")


class _Moved(MemoryBackend):
    """While it is read, the streams go on: what they commit then may not be in what is found."""

    def __init__(self, move: Callable[[], None]) -> None:
        super().__init__()
        self._move = move

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        found = super().match(scope, block_hashes)
        self._move()
        return found

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        found = super().find(block_hash, scope)
        self._move()
        return found

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        found = super().prefix_scan(scope, prefix_hash)
        self._move()
        return found

    def holdings(self) -> list[Holding]:
        found = super().holdings()
        self._move()
        return found


def test_the_number_of_an_answer_is_one_whose_blocks_are_in_it_and_other_workers_are_not_looked_at() -> None:
    asked: list[str] = []

    class Streams(View):
        def standings(self) -> dict[str, Callable[[], StreamStatus]]:
            def ask(one: StreamStatus) -> StreamStatus:
                asked.append(one.worker_id)
                return one

            return {one.worker_id: partial(ask, one) for one in self.shown}

    view = Streams(_Moved(lambda: view.shown.__setitem__(0, status("w", last_seq=42))), [status("w"), status("other")])
    view.backend.apply([chain(0, 2, "w")])
    with serving(view) as client:
        for found in (
            lambda: client.post("/v1/match", {"block_hashes": _names(0, 2)}).json["workers"],
            lambda: client.get(f"/v1/locate?block_hash={name(0)}").json["residencies"],
            lambda: client.get(f"/v1/children?model_id=m&tokenizer_id=m&prefix_hash={name(0)}").json["residencies"],
        ):
            view.shown[0] = status("w")
            assert [one["last_seq"] for one in found()] == [41]
            assert view.shown[0].last_seq == 42
    assert set(asked) == {"w"}


def test_the_number_of_a_worker_is_one_whose_blocks_are_counted_with_it() -> None:
    view = View(_Moved(lambda: view.shown.__setitem__(0, status("w", last_seq=42))), [status("w")])
    view.backend.apply([chain(0, 2, "w")])
    with serving(view) as client:
        [worker] = client.get("/v1/workers").json["workers"]
    assert (worker["last_seq"], worker["blocks"]) == (41, 2)
    assert view.shown[0].last_seq == 42
