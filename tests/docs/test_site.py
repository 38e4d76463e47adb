"""The site is built from docs/ without a network: no broken link, no page left out, nothing loaded from elsewhere.

It can be read without a server, search included.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..browser import browsing, needs_browser
from .pages import DOCS, ROOT

CONFIGURATION = ROOT / "mkdocs.yml"
_IN_SHADOWS = """
    const found = [];
    const look = (root) => {
      for (const one of root.querySelectorAll("*")) {
        if (!one.shadowRoot) continue;
        found.push(...one.shadowRoot.querySelectorAll(arguments[0]));
        look(one.shadowRoot);
      }
    };
    look(document);
    return found;
"""
"""The search draws itself in a shadow tree, which no selector of the page reaches into."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    project = tmp_path_factory.mktemp("project")
    shutil.copy(CONFIGURATION, project)
    shutil.copytree(DOCS, project / "docs")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=project, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return project / "build" / "site"


def test_every_page_stands_in_the_navigation_once() -> None:
    named = re.findall(r"^ +- ([\w/.-]+\.md)$", CONFIGURATION.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_page_is_built(site: Path) -> None:
    pages = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.rglob("*.md")}
    assert pages <= {str(page.relative_to(site)) for page in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
    )
    for page in site.rglob("*.html"):
        assert [one[0] for one in loading.finditer(page.read_text()) if "canonical" not in one[0]] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text()), sheet


@needs_browser
def test_the_search_works_in_a_page_that_is_opened_as_a_file(site: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with browsing() as browser:
        browser.get((site / "how-to" / "nats.html").as_uri())
        waiting = WebDriverWait(browser, 60)
        waiting.until(lambda _: browser.find_element(By.CSS_SELECTOR, ".md-search__button")).click()
        waiting.until(lambda _: browser.execute_script(_IN_SHADOWS, "input"))[0].send_keys("quarantine")
        waiting.until(lambda _: browser.execute_script(_IN_SHADOWS, f"a[href*='{site}/how-to/quarantine.html']"))
        log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]

    asked = {one["params"]["request"]["url"] for one in log if one["method"] == "Network.requestWillBeSent"}
    assert [url for url in sorted(asked) if not url.startswith((site.as_uri(), "data:"))] == []
