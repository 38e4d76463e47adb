"""The events in the operator's table are those that the code logs, at the level that the table says."""

from __future__ import annotations

import re

from .pages import DOCS, ROOT

PAGE = (DOCS / "how-to" / "operations.md").read_text()
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "daemon").rglob("*.py")))
MADE_OF_PARTS = {
    "backend_full": 'log.error(f"backend_{error.problem}"',
    "backend_has_room": 'event = "backend_is_back" if self._is_away else "backend_has_room"',
    "backend_is_back": 'event = "backend_is_back" if self._is_away else "backend_has_room"',
    "event_refused": '"event_refused" if rejection.event is not None else "message_refused"',
    "message_refused": '"event_refused" if rejection.event is not None else "message_refused"',
}
"""Events whose name does not stand in the call, and the code that makes it."""


def _events() -> list[tuple[str, str]]:
    """Each event of the table with its level."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\w+) \|", PAGE, re.MULTILINE)
    return [(event, level) for events, level in rows for event in re.findall(r"\w+", events)]


def test_every_event_is_logged_at_its_level() -> None:
    events = _events()
    assert len(events) > 25
    wrong = [
        (event, level)
        for event, level in events
        if not (
            MADE_OF_PARTS[event] in SOURCE
            if event in MADE_OF_PARTS
            else re.search(rf'log\.{level}\(\s*(?:"\w+" if [^"]*"\w+" else )?"{event}"', SOURCE)
        )
    ]
    assert wrong == []
