"""The description of the API is valid, complete, and true of what is served."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.http.app import make_app
from kvcensus.daemon.http.openapi_page import reference_page

from .served import Client, View, chain, name, serving, status

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "http.md"
MADE_PAGE = PAGE.with_name("http-api.md")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    backend = MemoryBackend()
    backend.apply([chain(0, 3), chain(0, 2, "ghost", rank=1)])
    with serving(View(backend, [status("w"), status("idle", committed_ms=0, engine_ms=0)])) as client:
        yield client


@pytest.fixture(scope="module")
def description(client: Client) -> dict[str, Any]:
    answer = client.get("/openapi.json")
    assert answer.status == 200
    described: dict[str, Any] = answer.json
    return described


def _operations(description: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in description["paths"].items() for method in methods}


def test_the_description_is_valid_openapi(description: dict[str, Any]) -> None:
    assert description["openapi"] == "3.1.0"
    assert [error.message for error in OpenAPIV31SpecValidator(description).iter_errors()] == []


def test_every_route_is_described_and_the_other_way_round(description: dict[str, Any]) -> None:
    app = make_app(View(MemoryBackend()), HttpConfig())
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}

    assert _operations(description) == routes


def test_the_reference_page_has_every_endpoint(description: dict[str, Any]) -> None:
    page = PAGE.read_text()

    assert [one for one in sorted(_operations(description)) if f"`{one[0]} {one[1]}`" not in page] == []


def _undescribed(description: dict[str, Any]) -> list[str]:
    """Types, fields and parameters without a word of what they mean."""
    named = list(description["components"]["schemas"].items())
    named += [(f"{kind}.{field}", its) for kind, schema in named for field, its in schema.get("properties", {}).items()]
    named += [
        (f"{path}?{one['name']}", one)
        for path, methods in description["paths"].items()
        for operation in methods.values()
        for one in operation.get("parameters", ())
    ]
    assert len(named) > 120
    return [name for name, its in named if not its.get("description", "").strip()]


def test_every_type_field_and_parameter_says_what_it_means(description: dict[str, Any]) -> None:
    assert _undescribed(description) == []


def test_what_says_nothing_would_be_noticed(description: dict[str, Any]) -> None:
    changed = copy.deepcopy(description)
    del changed["components"]["schemas"]["Residency"]["properties"]["bytes"]["description"]
    changed["paths"]["/v1/locate"]["get"]["parameters"][0]["description"] = " "

    assert _undescribed(changed) == ["Residency.bytes", "/v1/locate?block_hash"]


def test_the_made_page_is_current(description: dict[str, Any]) -> None:
    assert reference_page(description) == MADE_PAGE.read_text()


def _schema(description: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": description["components"]})


QUESTIONS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/match", {"block_hashes": [name(0), 1], "scope": {"model_id": "m"}, "trusted_only": False}),
    ("POST", "/v1/locate", {"block_hash": name(0), "scope": None, "group": 0}),
    ("GET", f"/v1/locate?block_hash={name(0)}", None),
    ("POST", "/v1/children", {"scope": {"model_id": "m", "adapter_id": None}, "prefix_hash": "root"}),
    ("GET", "/v1/children?model_id=m&prefix_hash=root", None),
    ("GET", "/v1/workers", None),
    ("GET", "/v1/daemon", None),
    ("GET", "/v1/streams", None),
    ("GET", "/livez", None),
    ("GET", "/readyz", None),
    ("POST", "/v1/match", {"block_hashes": [None]}),
    ("GET", "/v1/locate", None),
]


@pytest.mark.parametrize(("method", "target", "body"), QUESTIONS)
def test_answers_and_questions_are_as_described(
    client: Client, description: dict[str, Any], method: str, target: str, body: dict[str, Any] | None
) -> None:
    operation = description["paths"][target.partition("?")[0]][method.lower()]
    answer = client.post(target, body) if body else client.get(target)

    described = operation["responses"][str(answer.status)]["content"]["application/json"]["schema"]
    _schema(description, described).validate(answer.json)
    if body:
        asked = operation["requestBody"]["content"]["application/json"]["schema"]
        assert _schema(description, asked).is_valid(body) == (answer.status == 200)


def test_a_line_of_the_snapshot_is_as_described(client: Client, description: dict[str, Any]) -> None:
    content = description["paths"]["/v1/snapshot"]["get"]["responses"]["200"]["content"]
    lines = client.get("/v1/snapshot").raw.splitlines()

    validator = _schema(description, content["application/x-ndjson"]["schema"])
    for line in lines:
        validator.validate(json.loads(line))
    assert len(lines) == 5


CONTRACT = {
    "MatchBody": {"block_hashes", "scope", "trusted_only"},
    "MatchedWorker": {"worker_id", "rank", "trust", "last_seq", "age_ms", "tiers", "blocks"},
    "StreamReport": {"source", "rank", "epoch", "last_seq", "state"},
    "Residency": {
        *("model_id", "tokenizer_id", "adapter_id", "tenant_id", "prefix_hash", "block_hash", "block_index"),
        *("token_count", "worker_id", "tier", "bytes", "last_access_ms", "ref_count", "pinned", "rank", "group"),
    },
}
"""What outside tools rely on. It may grow, never shrink."""


@pytest.mark.parametrize("body", CONTRACT)
def test_what_outside_tools_rely_on_is_described(description: dict[str, Any], body: str) -> None:
    schema = description["components"]["schemas"][body]

    assert CONTRACT[body] <= schema["properties"].keys()
    if body != "MatchBody":
        assert CONTRACT[body] <= set(schema["required"])
    else:
        assert schema["required"] == ["block_hashes"]
