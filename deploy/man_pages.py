"""Writes a man page for kvcensus and for each of its commands.

python deploy/man_pages.py DIRECTORY      with kvcensus and click-man installed; SOURCE_DATE_EPOCH is their date
"""

import sys
from importlib.metadata import version
from pathlib import Path

import click
from click_man.core import write_man_pages

from kvcensus.daemon.cli import main


def load(group: click.Group) -> None:
    """click-man sees only what is loaded, and ours is when it is called; it cuts what has no short help."""
    group.short_help = first_line(group)
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        command.short_help = first_line(command)
        group.add_command(command, name)
        if isinstance(command, click.Group):
            load(command)


def first_line(command: click.Command) -> str:
    return (command.help or "").strip().partition("\n")[0].removesuffix(".")


def write(directory: Path) -> None:
    load(main)
    directory.mkdir(parents=True, exist_ok=True)
    write_man_pages("kvcensus", main, version=version("kvcensus"), target_dir=str(directory))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
