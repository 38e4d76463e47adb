"""Numbers as a person reads them at a glance. Pure."""

from __future__ import annotations

_NOTHING = "-"
_UNITS = ("", "k", "M", "G", "T")
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(number: float | None) -> str:
    """At most five characters, as in 950, 12.3k, 1.20M; - for None."""
    if number is None:
        return _NOTHING
    if 0 < number < 10 and number != int(number):
        return f"{number:.1f}"
    value, unit = float(number), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if not unit:
        return f"{value:.0f}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{_UNITS[unit]}"


def size(amount: float | None) -> str:
    """Bytes, as in 1.4 GiB."""
    if amount is None:
        return _NOTHING
    value, unit = float(amount), 0
    while value >= 1024 and unit < len(_SIZES) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_SIZES[unit]}" if not unit or value >= 100 else f"{value:.1f} {_SIZES[unit]}"


def duration(seconds: float | None) -> str:
    """Two units at most, as in 3.2 ms, 14 s, 3h12m."""
    if seconds is None:
        return _NOTHING
    if seconds < 1:
        ms = 1000 * seconds
        return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // (24 * 60)}d{minutes // 60 % 24:02d}h"


def share(part: float, whole: float) -> str:
    """As in 12 %; - where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else _NOTHING
