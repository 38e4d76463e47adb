"""What others say, made fit to be shown: a peer chooses names, and a terminal obeys control characters."""

from __future__ import annotations


def printable(text: str) -> str:
    """Others' words, with escapes for what a terminal would obey and a table could not hold."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
