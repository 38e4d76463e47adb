"""Threads that end."""

from __future__ import annotations

import threading


def join_if_started(thread: threading.Thread, timeout_s: float | None = None) -> None:
    """Wait for a thread. One that was never started has nothing to wait for: a start that failed is stopped, too."""
    if thread.ident is not None:
        thread.join(timeout_s)
