"""`kvcensus keys`: a pair of CURVE keys in files."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .ending import EXIT_IO, Failure


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", default="kvcensus", show_default=True, help="Name of the files.")
def keys(directory: Path, name: str) -> None:
    """Make a pair of CURVE keys in DIRECTORY: NAME.key to give away, NAME.key_secret to keep.

    The secret one is made with mode 0600, and DIRECTORY with 0700 if it is not there. Nothing is overwritten.
    """
    import zmq

    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(
            directory / f"{name}.key_secret",
            0o600,
            f'curve\n    public-key = "{public}"\n    secret-key = "{secret}"\n',
        )
        _write(directory / f"{name}.key", 0o644, f'curve\n    public-key = "{public}"\n')
    except FileExistsError as error:
        raise Failure(f"{error.filename}: exists already; it is not overwritten", EXIT_IO) from error
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", EXIT_IO) from error
    click.echo(f"{directory / name}.key\n{directory / name}.key_secret")


def _write(path: Path, mode: int, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"# CURVE keys in Z85, in the format of zmq.auth.\nmetadata\n{text}")
