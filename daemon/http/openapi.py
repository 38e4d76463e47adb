"""The description of the API, made from the table of endpoints and the bodies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import msgspec
from aiohttp.typedefs import Handler

from kvcensus.backends.model import CacheTier, GroupKind

from ..status import StreamState, Trust
from .answers import JSON, MSGPACK
from .bodies import ErrorAnswer
from .snapshot import NDJSON

_REFERENCE = "#/components/schemas/{name}"
_TEXT = "text/plain"
HTML = "text/html"


class Endpoint(NamedTuple):
    """One method on one path. `body` and `query` are what a request carries, `answer` the JSON type of a 200.

    `lines`: the answer is a stream of such objects, one a line. `errors` are the statuses that carry an ErrorAnswer;
    `unwell` says that a 503 has the same body as a 200. Without `answer` the answer is of type `media`.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    lines: bool = False
    unwell: bool = False
    media: str = _TEXT
    errors: tuple[int, ...] = ()


def describe(endpoints: Sequence[Endpoint], version: str, open_paths: Collection[str] = ()) -> dict[str, Any]:
    """An OpenAPI 3.1 document of `endpoints`. All but `open_paths` may ask for a token."""
    types = {kind for one in endpoints for kind in (one.answer, one.body) if kind is not None} | {ErrorAnswer}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    for closed in (CacheTier, GroupKind, StreamState, Trust):
        schemas[closed.__name__]["enum"] = list(closed)  # msgspec puts them in the order of the alphabet
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint if endpoint.path in open_paths else _guarded(endpoint))
        if endpoint.path in open_paths:
            operation["security"] = []
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvcensus",
            "version": version,
            "summary": "Which inference worker holds which KV-cache block on which tier.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "security": [{}, {"token": []}],
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _guarded(endpoint: Endpoint) -> Endpoint:
    return endpoint._replace(errors=tuple(sorted({*endpoint.errors, 401})))


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    name = endpoint.path.strip("/").replace("/", "_").replace(".", "_") or "index"
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}_{name}",
        "summary": endpoint.summary,
        "responses": _responses(endpoint),
    }
    if endpoint.body is not None:
        schema = {"schema": _reference(endpoint.body)}
        operation["requestBody"] = {"required": True, "content": {JSON: schema, MSGPACK: schema}}
    if endpoint.query is not None:
        operation["parameters"] = _parameters(endpoint.query)
    return operation


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    responses = {"200": {"description": endpoint.summary, "content": _content(endpoint)}}
    if endpoint.unwell:
        responses["503"] = {"description": "No, and the body says why.", "content": _content(endpoint)}
    failed = {"schema": _reference(ErrorAnswer)}
    for status in endpoint.errors:
        responses[str(status)] = {"description": _MEANINGS[status], "content": {JSON: failed, MSGPACK: failed}}
    return responses


_MEANINGS = {
    400: "The request is malformed, or one of its fields is invalid: `error.field` names it.",
    401: "The server has tokens (`http.token_file`), and the request has none of them.",
    408: "The body did not arrive within `http.body_timeout_ms`.",
    413: "The body is longer than `http.max_body_bytes`.",
    415: "The body is neither JSON nor msgpack.",
    429: "As many snapshots as `http.max_snapshots` are being read.",
    500: "A fault of the daemon; the log has it under the id in the message.",
    503: "The index cannot answer.",
}


def _content(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.answer is None:
        return {endpoint.media: {"schema": {"type": "object" if endpoint.media == JSON else "string"}}}
    schema = {"schema": _reference(endpoint.answer)}
    return {NDJSON: schema} if endpoint.lines else {JSON: schema, MSGPACK: schema}


def _parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    described = msgspec.json.schema(query)["$defs"][query.__name__]
    required = described.get("required", ())
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": schema.pop("description", ""),
            "schema": schema,
        }
        for name, schema in described["properties"].items()
    ]


def _reference(body: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=body.__name__)}
