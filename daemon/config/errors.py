"""What is wrong with a configuration, and where."""

from __future__ import annotations

EXIT_CONFIG = 78
"""Exit code of a process with an unusable configuration: EX_CONFIG of sysexits.h."""


class ConfigError(Exception):
    """The configuration cannot be used. Its text is `FILE:LINE: KEY: REASON`, without the parts that are not known.

    `path` is the file, or where else the value came from ("environment", "command line"); `line` counts from 1.
    """

    def __init__(self, path: str | None, line: int | None, key: str, reason: str) -> None:
        place = f"{path}:{line}" if path and line else path
        super().__init__(": ".join(part for part in (place, key, reason) if part))
        self.path = path
        self.line = line
        self.key = key
        self.reason = reason


class InvalidValue(ValueError):
    """A value that its own type cannot refuse: `key` is the field of the struct that is being checked."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason
