"""The dashboard in Grafana's own models of its JSON: every key is one that they know, every value one that they allow.

They are the package grafana-foundation-sdk of Grafana 11.4, which is the one whose dashboards have our schemaVersion.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="the extra `dev` is not installed")
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import prometheus, units
from grafana_foundation_sdk.models.dashboard import Dashboard, DashboardLink

from .grafana_stage import board, data_panels

CUSTOM_UNITS = ("prefix:", "suffix:", "time:", "si:", "count:", "currency:")
"""How a unit begins that is not in the list, says Grafana's manual under standard options."""


@pytest.fixture(scope="module", autouse=True)
def _models_of_panels() -> None:
    register_default_plugins()


def decoded(written: dict[str, Any]) -> Dashboard:
    """The dashboard in the models, the links of its panels too, which these leave as they are."""
    read = Dashboard.from_json(written)
    for panel in read.panels or ():
        if links := getattr(panel, "links", None):
            panel.links = [DashboardLink.from_json(link) for link in links]
    return read


def lost(written: Any, back: Any, at: str = "$") -> Iterator[str]:
    """What was written and does not come back from the models, or comes back as something else."""
    if isinstance(written, dict) and isinstance(back, dict):
        for key, value in written.items():
            if key in back:
                yield from lost(value, back[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}"
    elif isinstance(written, list) and isinstance(back, list) and len(written) == len(back):
        for number, (one, other) in enumerate(zip(written, back, strict=True)):
            yield from lost(one, other, f"{at}[{number}]")
    elif (written, type(written)) != (back, type(back)):
        yield at


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a model states."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, dict):
        values = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(fits(one, arguments[-1]) for one in values)
    if issubclass(hint, Enum):
        return value in {member.value for member in hint}
    return isinstance(value, (int, float) if hint is float else hint)


def wrong(value: Any, at: str = "$") -> Iterator[str]:
    """Where a decoded value is not of its stated type: a number that is text, a word that is not of its closed set."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from wrong(one, f"{at}[{number}]")
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from wrong(one, f"{at}.{key}")
    elif hasattr(value, "to_json"):
        hints = typing.get_type_hints(type(value))
        for name, its in vars(value).items():
            if not fits(its, hints[name]):
                yield f"{at}.{name}"
            yield from wrong(its, f"{at}.{name}")


def faults(written: dict[str, Any]) -> list[str]:
    """Everything in a dashboard that the models do not know."""
    read = decoded(written)
    unknown = [
        f"{panel.title}: {panel.type_val}"
        for panel in read.panels or ()
        if panel.type_val != "row"
        and not (
            hasattr(panel.options, "to_json") and all(isinstance(one, prometheus.Dataquery) for one in panel.targets)
        )
    ]
    return [*unknown, *lost(written, json.loads(JSONEncoder().encode(read))), *wrong(read)]


def test_the_models_are_of_the_stated_schema() -> None:
    assert board()["schemaVersion"] == Dashboard().schema_version


def test_every_key_and_value_is_one_that_grafana_has() -> None:
    assert faults(board()) == []


def test_every_unit_is_one_that_grafana_has() -> None:
    known = {value for value in vars(units).values() if isinstance(value, str)}
    used = {panel["fieldConfig"]["defaults"]["unit"] for panel in data_panels()}
    assert {"s", "bytes"} <= known
    assert [one for one in sorted(used) if one not in known and not one.startswith(CUSTOM_UNITS)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("panels", 1, "fieldConfig", "defaults", "untis"), "s"),
        (("panels", 1, "options", "colorModus"), "value"),
        (("panels", 1, "type"), "statistic"),
        (("panels", 1, "links", 0, "href"), "x"),
        (("panels", 7, "options", "tooltip", "mode"), "many"),
        (("panels", 7, "targets", 0, "query"), "up"),
        (("templating", "list", 1, "refresh"), "2"),
        (("templating", "list", 1, "definitions"), "x"),
    ],
)
def test_what_grafana_has_not_would_be_noticed(path: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(board())
    *way, last = path
    inner: Any = changed
    for step in way:
        inner = inner[step]
    inner[last] = value

    assert faults(changed) != []
