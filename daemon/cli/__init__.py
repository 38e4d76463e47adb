"""The command line. Each command is a module of this package, imported when it runs: `--help` imports none of them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from .ending import EXIT_IO, Failure

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a process that SIGINT or SIGPIPE ended."""

COMMANDS = {
    "run": "Follow engines, keep the index, answer over HTTP.",
    "relay": "Publish engines' messages to JetStream, through a spool on disk.",
    "check": "Say what a configuration would run, or what is wrong with it.",
    "top": "Watch workers, streams and the index of a running daemon, live.",
    "tap": "Print the events of a live stream, a bus or a recording, as they pass.",
    "doctor": "Check machine, configuration, index, daemon and sources, with advice.",
    "query": "Ask a running daemon: match, locate, children, workers, streams.",
    "snapshot": "Write the whole index as JSON lines.",
    "backend": "Copy, compare, check, compact, back up whole indexes.",
    "verify": "Look at every page and row of an index.",
    "quarantine": "Look at what was refused, try it again, drop it.",
    "record": "Write the raw messages of a live stream to a file.",
    "replay": "Publish a recording as an engine would.",
    "simulate": "Publish what engines would, and tell what they really hold.",
    "keys": "Make a pair of CURVE keys.",
    "drill": "Inject faults and hold the index to the truth.",
    "demo": "Replay a recorded engine into a daemon and show live figures.",
    "bench": "Measure ingest and match on this machine.",
    "completion": "Print the completion script of a shell.",
}
"""Name and help of each command; the module of that name has it under that name."""


class LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        named = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return named + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """End quietly when the user interrupts or the reader of our output goes away, never with a traceback of I/O."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)
        except OSError as error:
            raise Failure(str(error), EXIT_IO) from error
        return result


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvcensus", prog_name="kvcensus")
def main() -> None:
    """Knows which inference worker holds which KV-cache block on which tier."""
