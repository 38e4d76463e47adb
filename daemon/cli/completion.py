"""`kvcensus completion`: the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from . import main

_VARIABLE = "_KVCENSUS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash   kvcensus completion bash > ~/.local/share/bash-completion/completions/kvcensus
    zsh    kvcensus completion zsh > "${fpath[1]}/_kvcensus"
    fish   kvcensus completion fish > ~/.config/fish/completions/kvcensus.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "kvcensus", _VARIABLE).source())
