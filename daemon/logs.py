"""Log lines on stderr: one event name per thing that happens, with stable keys.

JSON lines when stderr is not a terminal, readable ones when it is. To the journal of systemd they begin with their
priority (sd-daemon(3)), which it takes off. Lines of the standard library's logging (aiohttp,
asyncio, warnings) come out the same way.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from .config import LogFormat, LogLevel
from .printable import printable

FIRST_KEYS = ("timestamp", "level", "event", "logger", "source", "worker", "seq", "epoch")
"""These keys come first, where a line has them."""

_PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
"""Those of syslog(3)."""


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `logger=name`. Events are names (`stream_opened`), facts are keywords."""
    return cast(FilteringBoundLogger, structlog.stdlib.get_logger(name))


def configure(
    level: LogLevel = LogLevel.INFO,
    format: LogFormat = LogFormat.AUTO,  # noqa: A002 - the name of the configuration's key
) -> None:
    """Log lines from `level` up to stderr. May be called again; loggers that exist follow."""
    if sys.stderr is None:  # started with it closed: its number must not become that of a socket, or of the index
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    console = format is LogFormat.CONSOLE or (format is LogFormat.AUTO and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    formatter = _JournalFormatter if not console and _is_journal(sys.stderr) else structlog.stdlib.ProcessorFormatter
    handler.setFormatter(
        formatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(console)],
        )
    )
    root = logging.getLogger()
    for other in root.handlers[:]:
        if isinstance(other.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def _rendering(console: bool) -> list[Processor]:
    if console:
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        plain = structlog.dev.plain_traceback
        return [_escaped, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, _first_keys_first, structlog.processors.JSONRenderer()]


class _JournalFormatter(structlog.stdlib.ProcessorFormatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelname, _PRIORITIES['INFO'])}>{super().format(record)}"


def _is_journal(stream: TextIO) -> bool:
    """Whether the journal reads it: systemd says which file that is."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def _first_keys_first(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in FIRST_KEYS if key in event}
    return {**first, **event}


def _escaped(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A terminal obeys what a peer may have put into a name."""
    for key, value in event.items():
        if isinstance(value, str) and key not in ("event", "exception", "stack"):
            event[key] = printable(value)
    return event


def _bytes_as_hex(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, bytes):
            event[key] = value.hex()
    return event


_SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
    _bytes_as_hex,
]

structlog.configure(
    processors=[structlog.stdlib.filter_by_level, *_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)
