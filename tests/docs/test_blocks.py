"""Every block of code on every page is what it says: settings, commands and options that exist, JSON, Python, shell."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib

import click
import msgspec
import pytest

from kvcensus.daemon.cli import main
from kvcensus.daemon.config import Config

from .pages import PAGES, Block, blocks, commands

CONSOLE = [(block, command) for block in blocks("console", "sh", "bash") for command in commands(block) or [block.text]]
OURS = [
    (block, part)
    for block, command in CONSOLE
    for part in re.findall(r"(?<![\w/.-])kvcensus [a-z].*?(?=[|;&>]|$)", command)
]


def parsed(words: list[str]) -> click.Command:
    """The command that these words call. Raises UsageError for an option or a command that does not exist."""
    command: click.Command = main
    context = click.Context(main, info_name="kvcensus")
    while True:
        _, words, _ = command.make_parser(context).parse_args(args=list(words))
        if not isinstance(command, click.Group) or not words:
            return command
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)


def test_there_is_something_to_look_at() -> None:
    assert len(PAGES) > 30
    assert len(OURS) > 30
    with pytest.raises(click.UsageError):
        parsed(["run", "--no-such-option"])


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_has_settings_that_exist(block: Block) -> None:
    """A file of credentials that an example names need not be here; the tests of its page make it."""
    try:
        msgspec.convert(tomllib.loads(block.text), Config, strict=False)
    except msgspec.ValidationError as error:
        if "No such file" not in str(error):
            raise


@pytest.mark.parametrize(("block", "command"), OURS, ids=str)
def test_our_commands_and_their_options_exist(block: Block, command: str) -> None:
    words = [word for word in shlex.split(command.replace("…", "")) if word]
    parsed(words[1:])


@pytest.mark.parametrize(("block", "command"), CONSOLE, ids=lambda value: str(value)[:40])
def test_the_shell_understands_it(block: Block, command: str) -> None:
    checked = subprocess.run(["sh", "-n"], input=command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    msgspec.json.decode(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")
