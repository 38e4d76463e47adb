"""Log lines of a real process: JSON in a pipe, readable on a terminal, stable keys, nothing lost."""

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest


def _run(code: str, *, stderr: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[bytes]:
    setup = (
        "import logging, sys, warnings\n"
        "from kvcensus.daemon.config import LogFormat, LogLevel\n"
        "from kvcensus.daemon.logs import configure, get_logger\n"
        "log = get_logger('zmq')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, **env},
        timeout=30,
        check=True,
    )
    assert done.stdout == b""
    return done


def _lines(code: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _run(code).stderr.splitlines()]


def _on_terminal(code: str, **env: str) -> str:
    ours, theirs = pty.openpty()
    try:
        _run(code, stderr=theirs, **env)
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_line_is_json_with_the_stable_keys_first() -> None:
    (line,) = _lines("configure(); log.info('gap_seen', missing=3, epoch=2, seq=17, worker='a/0', source='a')")

    assert list(line)[:8] == ["timestamp", "level", "event", "logger", "source", "worker", "seq", "epoch"]
    when = datetime.fromisoformat(line.pop("timestamp"))
    assert when.utcoffset() == datetime.now(UTC).utcoffset()
    assert abs((when - datetime.now(UTC)).total_seconds()) < 60
    assert line == {
        "level": "info",
        "event": "gap_seen",
        "logger": "zmq",
        "source": "a",
        "worker": "a/0",
        "seq": 17,
        "epoch": 2,
        "missing": 3,
    }


def test_an_exception_is_one_field_of_one_line() -> None:
    (line,) = _lines("configure()\ntry: 1 / 0\nexcept ZeroDivisionError: log.exception('broke', seq=1)")

    assert (line["level"], line["event"]) == ("error", "broke")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ZeroDivisionError: division by zero")
    assert "exc_info" not in line


def test_the_standard_librarys_logging_comes_out_the_same_way() -> None:
    first, second, third = _lines(
        "configure()\n"
        "logging.getLogger('aiohttp.server').warning('from %s', '10.0.0.1')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('asyncio').exception('lost')\n"
        "warnings.warn('odd', UserWarning, stacklevel=1)\n"
    )

    assert (first["level"], first["event"], first["logger"]) == ("warning", "from 10.0.0.1", "aiohttp.server")
    assert second["exception"].endswith("ZeroDivisionError: division by zero")
    assert third["logger"] == "py.warnings"
    assert "UserWarning: odd" in third["event"]


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_levels(level: str, events: list[str]) -> None:
    lines = _lines(
        f"configure(LogLevel.{level})\nfor name in ('debug', 'info', 'warning', 'error'): getattr(log, name)(name)\n"
    )
    assert [line["event"] for line in lines] == events


def test_configuring_again_changes_loggers_that_were_used() -> None:
    lines = _lines(
        "bound = log.bind(source='a')\n"
        "configure(LogLevel.ERROR); log.info('1'); bound.info('2')\n"
        "configure(LogLevel.DEBUG); log.info('3'); bound.debug('4')\n"
    )
    assert [(line["event"], line.get("source")) for line in lines] == [("3", None), ("4", "a")]


def test_values_that_json_does_not_know() -> None:
    (line,) = _lines(
        "import pathlib\n"
        "configure(); log.info('odd', hash=b'\\xab\\xcd', path=pathlib.Path('/x'), bad='\\udcff', level_=LogLevel.INFO)"
    )
    assert (line["hash"], line["bad"], line["level_"]) == ("abcd", "\udcff", "info")
    assert "/x" in line["path"]


def test_a_newline_in_a_value_does_not_make_two_lines() -> None:
    (line,) = _lines("configure(); log.info('odd', detail='a\\n{\"event\": \"forged\"}')")
    assert line["event"] == "odd"


def test_a_terminal_gets_readable_lines() -> None:
    code = "configure()\ntry: 1 / 0\nexcept ZeroDivisionError: log.exception('broke', source='a', secret_count=1)"
    colored = _on_terminal(code, NO_COLOR="", TERM="xterm")
    plain = _on_terminal(code, NO_COLOR="1", TERM="xterm")

    assert "\x1b[" in colored
    assert "\x1b[" not in plain
    assert "broke" in plain
    assert "source=a" in plain
    assert "ZeroDivisionError: division by zero" in plain


def test_the_format_may_be_forced() -> None:
    assert json.loads(_on_terminal("configure(format=LogFormat.JSON); log.info('x')"))["event"] == "x"
    assert b"{" not in _run("configure(format=LogFormat.CONSOLE); log.info('x', a=1)").stderr


def test_a_terminal_obeys_nobody_who_names_a_worker() -> None:
    code = "configure(format=LogFormat.CONSOLE); log.info('worker_joined', worker='\\x1b[2J', reason='a\\nb')"
    (line,) = _run(code).stderr.splitlines()
    assert b"worker=\\x1b[2J" in line
    assert b"a\\nb" in line


def test_nothing_is_printed_to_stdout_before_configuring() -> None:
    assert b"early" in _run("log.warning('early')").stderr


def test_the_journal_gets_the_priority_of_each_line(tmp_path: Path) -> None:
    code = "configure(); log.info('a'); log.warning('b'); log.error('c')"
    with (tmp_path / "journal").open("wb+") as journal:
        found = os.fstat(journal.fileno())
        _run(code, stderr=journal.fileno(), JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
        journal.seek(0)
        lines = journal.read().decode().splitlines()
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>"]
    assert [json.loads(line[3:])["event"] for line in lines] == ["a", "b", "c"]
    assert _run(code, JOURNAL_STREAM="1:1").stderr.startswith(b"{")


def test_a_process_that_was_started_without_stderr_runs() -> None:
    code = (
        "from kvcensus.daemon.logs import configure, get_logger\n"
        "configure(); get_logger('zmq').error('gap_seen'); print('on it goes')"
    )
    shell = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    assert subprocess.run(shell, stdout=subprocess.PIPE, timeout=30, check=False).stdout == b"on it goes\n"
