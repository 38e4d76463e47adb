"""The tutorial is typed as it stands, into one shell, against real processes; what comes has the shape that it shows.

Only the installation is taken as done, and the ports are free ones.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import DOCS, ROOT

PAGE = (DOCS / "tutorial.md").read_text()
PORTS = ("5557", "5558", "5559", "5560", "5600", "9480")
_UNITS = r"(?:s|ms|µs|B|KiB|MiB|GiB)"
_DEADLINE_S = 110
_MARK = r'printf "\ntyped=%d\n" $?'
_REPEATABLE = ("kvcensus query", "kvcensus top")
"""Commands that only look: asked again until the answer is the one shown, for a machine that is busy."""


def _block_of_free_ports() -> int:
    """The first of len(PORTS) ports in a row, all free a moment ago, below those that connections are given."""
    while True:
        base = random.randrange(20_000, 32_000)
        try:
            for port in range(base, base + len(PORTS)):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base


def _on_ports(text: str, base: int) -> str:
    ports = {named: str(base + place) for place, named in enumerate(PORTS)}
    return re.sub("|".join(PORTS), lambda found: ports[found[0]], text)


def _steps(text: str) -> list[tuple[str, list[str]]]:
    """Each command of the console blocks, with the lines that the page shows below it."""
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command = re.match(r"(?:.*\\\n)*.*\n", part)
            assert command is not None
            steps.append((command[0], [line for line in part[command.end() :].splitlines() if line not in ("", "…")]))
    return steps


def _shape(line: str) -> re.Pattern[str]:
    """A pattern for lines like `line`: words with digits may be others, so may units, and spaces more or fewer."""
    words = [
        r"\S+" if re.search(r"\d", word) else _UNITS if re.fullmatch(_UNITS, word) else re.escape(word)
        for word in line.split()
    ]
    return re.compile(r"\s*" + r"\s+".join(words) + r"\s*")


def _missing(shown: list[str], came: list[str]) -> list[str]:
    """Lines of the page for which none came, in their order."""
    rest = iter(came)
    return [line for line in shown if not any(_shape(line).fullmatch(other) for other in rest)]


class Shell:
    """One bash that commands are typed into. It and what it started are killed at the end, or after the deadline."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._timer = threading.Timer(_DEADLINE_S, self._kill)
        self._timer.start()

    def type(self, command: str) -> tuple[int, list[str]]:
        """The exit code and what was printed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n{_MARK}\n")
        self._process.stdin.flush()
        came: list[str] = []
        for line in self._process.stdout:
            if line.startswith("typed="):
                return int(line.removeprefix("typed=")), came
            came.append(line.rstrip("\n"))
        raise AssertionError(f"the shell ended, or the deadline passed, in: {command}\n" + "\n".join(came))

    def close(self) -> None:
        self._timer.cancel()
        self._kill()
        self._process.communicate()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """In a clone as deploy/demo.sh leaves it, with a `pip` that has nothing left to do."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("grafana", "kubernetes"))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\n[ "$2" = pip ] || exec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (programs / "python3").symlink_to(sys.executable)
    (programs / "kvcensus").symlink_to(Path(sys.executable).parent / "kvcensus")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVCENSUS")}
    shell = Shell(tmp_path, environment | {"PYTHON": sys.executable})
    yield shell
    shell.close()


def test_a_line_of_another_shape_is_noticed() -> None:
    assert _missing(["sim-0/0  fresh  22  0.1 s"], ["sim-0/0 fresh 3971 35 ms"]) == []
    assert _missing(["sim-0/0  fresh  22  0.1 s"], ["sim-0/0 untrusted 3971 35 ms"]) != []
    assert _missing(["b", "a"], ["a", "b"]) == ["a"]


def test_every_command_does_what_the_page_shows(shell: Shell, tmp_path: Path) -> None:
    base = _block_of_free_ports()
    page = _on_ports(PAGE, base)
    program = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert program is not None
    (tmp_path / "compare.py").write_text(program[1])
    shell.type(f"export KVCENSUS__HTTP__LISTEN=127.0.0.1:{base + PORTS.index('9480')}")

    steps = _steps(page)
    assert len(steps) > 15
    for command, shown in steps:
        until = time.monotonic() + (60 if command.startswith(_REPEATABLE) else 0)
        code, came = shell.type(command)
        while (code or _missing(shown, came)) and time.monotonic() < until:
            code, came = shell.type(command)
        printed = "\n".join(came)
        assert code == 0, f"{command}{printed}"
        assert _missing(shown, came) == [], f"{command}{printed}"
