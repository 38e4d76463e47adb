"""The pages of the project, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of these languages on all pages."""
    return [
        Block(page, text[: found.start()].count("\n") + 2, found[1], found[2])
        for page in PAGES
        for text in [page.read_text()]
        for found in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if found[1] in languages
    ]


def commands(block: Block) -> list[str]:
    """What a console block types: the lines after `$ ` or root's `# `, with those that continue them."""
    found = re.finditer(r"^[$#] ((?:.*\\\n)*.*)$", block.text, re.MULTILINE)
    return [one[1].replace("\\\n", " ") for one in found]
