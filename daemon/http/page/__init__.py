"""The status page: one answer with its style and its scripts inside, and none of the daemon's data."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

_PART = re.compile(r'<(?:link rel="stylesheet" href|script src)="(?P<name>[a-z]+\.(?P<kind>css|js))">(?:</script>)?')
_TAGS = {"css": "style", "js": "script"}


class Page(NamedTuple):
    """The page as it is sent, with the headers that say what it may do."""

    text: str
    headers: Mapping[str, str]


def status_page() -> Page:
    """The page, put together from the files beside this one. The browser runs exactly these scripts and no others."""
    folder = files(__package__)
    digests: dict[str, list[str]] = {"css": [], "js": []}

    def inlined(part: re.Match[str]) -> str:
        content = folder.joinpath(part["name"]).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        digests[part["kind"]].append(f"'sha256-{digest}'")
        tag = _TAGS[part["kind"]]
        return f"<{tag}>{content}</{tag}>"

    text = _PART.sub(inlined, folder.joinpath("index.html").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; script-src {' '.join(digests['js'])}; style-src {' '.join(digests['css'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return Page(text, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})
