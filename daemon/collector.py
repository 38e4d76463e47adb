"""How often Python looks for reference cycles."""

from __future__ import annotations

import gc

_THRESHOLDS = (50_000, 20, 50)
"""Allocations before a young collection, young ones before a middle one, middle ones before a full one.

A message makes some ten short-lived objects and no cycle. At Python's defaults (700, 10, 10) the collector takes 15 to
20 % of the writer's time to find nothing.
"""


def settle_collector() -> None:
    """Leave what start-up made out of every collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
