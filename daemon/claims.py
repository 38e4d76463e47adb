"""Which source follows which worker: no two may."""

from __future__ import annotations

import threading


class Claims:
    """Names of streams, each claimed by one source. Safe from any thread."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}
        self._lock = threading.Lock()

    def claim(self, stream: str, source: str) -> bool:
        """Whether the stream is now that of the source."""
        with self._lock:
            return self._owners.setdefault(stream, source) == source

    def release(self, stream: str, source: str) -> None:
        """Give up a claim, if it is the source's."""
        with self._lock:
            if self._owners.get(stream) == source:
                del self._owners[stream]

    def owner(self, stream: str) -> str:
        """Who follows it, "" for nobody."""
        return self._owners.get(stream, "")
