"""docs/reference/http-api.md, from the description that a daemon serves:

`curl -s http://127.0.0.1:9480/openapi.json | python -m kvcensus.daemon.http.openapi_page > docs/reference/http-api.md`
"""

from __future__ import annotations

import json
import sys
from typing import Any

_HEAD = """# HTTP API

Every endpoint with its parameters, bodies, answers and errors, made from `GET /openapi.json`. What it all means, with
examples, is in [HTTP](http.md).

This page is made by `curl -s http://127.0.0.1:9480/openapi.json | python -m kvcensus.daemon.http.openapi_page`.
"""


def reference_page(description: dict[str, Any]) -> str:
    """The page of an OpenAPI document as `describe` makes it."""
    parts = [_HEAD]
    for path, methods in description["paths"].items():
        parts += [_operation(f"{method.upper()} {path}", operation) for method, operation in methods.items()]
    parts.append("\n## Types\n")
    parts += [_type(name, schema) for name, schema in description["components"]["schemas"].items()]
    return "".join(parts)


def _operation(title: str, operation: dict[str, Any]) -> str:
    parts = [f"\n## {title}\n\n{operation['summary']}"]
    if operation.get("security") == []:
        parts.append(" Never needs a token.")
    parts.append("\n")
    if "parameters" in operation:
        parts.append("\n| parameter | type | required | meaning |\n|---|---|---|---|\n")
        parts += [
            _row(one["name"], {**one["schema"], "description": one["description"]}, one["required"])
            for one in operation["parameters"]
        ]
    if "requestBody" in operation:
        parts.append(f"\nBody: {_contents(operation['requestBody']['content'])}.\n")
    parts.append("\n| status | answer | meaning |\n|---|---|---|\n")
    for status, response in operation["responses"].items():
        parts.append(f"| {status} | {_contents(response['content'])} | {_cell(response['description'])} |\n")
    return "".join(parts)


def _type(name: str, schema: dict[str, Any]) -> str:
    parts = [f"\n### {name}\n"]
    if "description" in schema:
        parts.append(f"\n{' '.join(schema['description'].split())}\n")
    if "enum" in schema:
        return "".join([*parts, f"\nOne of {', '.join(f'`{value}`' for value in schema['enum'])}.\n"])
    required = schema.get("required", ())
    parts.append("\n| field | type | always there | meaning |\n|---|---|---|---|\n")
    parts += [_row(field, its, field in required) for field, its in schema.get("properties", {}).items()]
    return "".join(parts)


def _row(name: str, schema: dict[str, Any], required: bool) -> str:
    return f"| `{name}` | {_kind(schema)} | {'yes' if required else ''} | {_meaning(schema)} |\n"


def _contents(content: dict[str, Any]) -> str:
    """The type of a body, and the encodings that it may have."""
    kinds = list(dict.fromkeys(_kind(one["schema"]) for one in content.values()))
    return f"{' or '.join(kinds)} ({', '.join(f'`{media}`' for media in content)})"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"array of {_kind(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _meaning(schema: dict[str, Any]) -> str:
    """The field's description, that of its items, and its default."""
    found = [schema.get("description"), schema.get("items", {}).get("description")]
    default = f"Default: `{json.dumps(schema['default'])}`." if "default" in schema else None
    return _cell(" ".join(part for part in (*found, default) if part))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference_page(json.load(sys.stdin)))
