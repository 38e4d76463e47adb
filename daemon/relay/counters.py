"""Plain numbers that the relay's threads add to. Each has one writing thread, so an addition needs no lock."""

from __future__ import annotations

from enum import StrEnum

from ..counters import COMMIT_BOUNDS_S, LAG_BOUNDS_S, Histogram


class DropCause(StrEnum):
    """Why a message was never published."""

    BOUND = "bound"
    """The spool had reached its bound."""
    FULL = "full"
    """The file or the disk of the spool had no room."""
    TOO_LARGE = "too_large"
    """The server takes no message of that size."""


class Failure(StrEnum):
    """Why records had to be published again."""

    TIMEOUT = "timeout"
    """No acknowledgement in time."""
    REFUSED = "refused"
    """The server answered with an error."""
    DISCONNECTED = "disconnected"
    """The connection was lost with records on their way."""


class StreamSpoolCounters:
    """What is counted of one stream between the engine and the bus."""

    def __init__(self) -> None:
        self.spooled = 0
        """Messages with a payload that went into the spool."""
        self.acknowledged = 0
        """Records, control records included, that the bus has."""
        self.dropped = dict.fromkeys(DropCause, 0)
        """Messages with a payload that were given up."""
        self.overtaken = 0
        """Records that the server had taken before one that it lost."""


class SpoolerCounters:
    """What the thread that fills the spool counts of itself."""

    def __init__(self) -> None:
        self.commits = 0
        self.commit_errors = 0
        self.commit_s = Histogram(COMMIT_BOUNDS_S)


class PublisherCounters:
    """What the thread that empties the spool counts of itself."""

    def __init__(self) -> None:
        self.sent = 0
        """Records sent, each time that they were."""
        self.republished = 0
        """Records sent again."""
        self.acknowledged = 0
        self.duplicates = 0
        """Acknowledgements that said that the server had the record already."""
        self.failures = dict.fromkeys(Failure, 0)
        self.connected = 0
        self.connections = 0
        self.beats = 0
        self.delay_s = Histogram(LAG_BOUNDS_S)
        """Time from the spool to the acknowledgement."""
