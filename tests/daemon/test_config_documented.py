"""The reference pages say what the program does: every setting with its default, every option of every command."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import click
import msgspec
import pytest

from kvcensus.daemon.cli import COMMANDS
from kvcensus.daemon.config import (
    Config,
    FilesystemConfig,
    HttpConfig,
    IndexConfig,
    LogConfig,
    NatsConfig,
    NatsServers,
    QuarantineConfig,
    RelayConfig,
    RocksdbConfig,
    ShadowConfig,
    SourceConfig,
    ValkeyConfig,
    WriterConfig,
    load_config,
)

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SETTINGS = (REFERENCE / "configuration.md").read_text()
COMMAND_PAGE = (REFERENCE / "commands.md").read_text()
HEADINGS: dict[str, type[msgspec.Struct]] = {
    "Top level": Config,
    "`[http]`": HttpConfig,
    "`[index]`": IndexConfig,
    "`[writer]`": WriterConfig,
    "`[quarantine]`": QuarantineConfig,
    "`[log]`": LogConfig,
    "`[[sources]]`": SourceConfig,
    "`[[nats]]`": NatsConfig,
    "`[nats.connection]`": NatsServers,
    "`[relay]`": RelayConfig,
    "`[shadow]`": ShadowConfig,
    "`[filesystem]`": FilesystemConfig,
    "`[rocksdb]`": RocksdbConfig,
    "`[valkey]`": ValkeyConfig,
}
DERIVED = {"name", "tokenizer", "connection"}
"""Settings whose default is made from another one."""


def section(page: str, heading: str) -> str:
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def documented(heading: str) -> dict[str, str]:
    """Key to default, of the rows of a section's tables."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(SETTINGS, heading), re.MULTILINE))


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_setting_is_documented_with_its_default(heading: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(HEADINGS[heading])}
    if heading == "Top level":
        fields = {name: field for name, field in fields.items() if name in {"data_dir", "backend", "options"}}
    rows = documented(heading)
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        if field.required:
            assert rows[name] == "required"
        elif name not in DERIVED:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            assert rows[name] == f"`{msgspec.json.encode(default).decode()}`", name


def test_every_section_has_a_heading() -> None:
    names = {field.name for field in msgspec.structs.fields(Config)} - {"data_dir", "backend", "options"}
    headings = {heading.strip("`[]") for heading in HEADINGS} - {"Top level"}
    assert names == {heading for heading in headings if "." not in heading}


@pytest.mark.parametrize("page", ["configuration.md", "dynamo.md"])
def test_every_example_is_a_configuration(page: str, tmp_path: Path) -> None:
    examples = re.findall(r"^```toml\n(.*?)^```", (REFERENCE / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) >= 3
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.toml"
        file.write_text(example)
        config = load_config(file, {})
        assert config.sources or config.nats


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_documented(name: str) -> None:
    text = section(COMMAND_PAGE, name)
    command = getattr(import_module(f"kvcensus.daemon.cli.{name}"), name)
    commands = [command, *command.commands.values()] if isinstance(command, click.Group) else [command]
    for one in commands:
        assert f"kvcensus {name} {one.name}" in text or one is command
        for parameter in one.params:
            if isinstance(parameter, click.Option):
                assert re.search(rf"{parameter.opts[-1]}(?![\w-])", text), parameter.opts
