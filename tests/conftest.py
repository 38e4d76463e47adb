"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("kvcensus", deadline=None, print_blob=True)
"""No deadline: how long an example takes says more of the machine than of the code."""
settings.load_profile("kvcensus")
