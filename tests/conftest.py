"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

settings.register_profile("kvcensus", deadline=None, print_blob=True)
"""No deadline: how long an example takes says more of the machine than of the code."""
settings.load_profile("kvcensus")

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell that starts the tests in the background has it ignored, and every process under test would inherit that."""
