"""The status page in a real browser: over the real daemon and simulated engines, and over a server with odd workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcensus.backends.memory import MemoryBackend
from kvcensus.daemon.config import HttpConfig
from kvcensus.daemon.status import Readiness, Trust

from ..browser import browsing, needs_browser
from ..daemon.served import View, chain, name, serving, status
from .daemon_process import DaemonProcess, wait_until

pytestmark = needs_browser

WAIT_S = 60.0
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
KEYS = {"down": "\ue015", "up": "\ue013", "left": "\ue012", "right": "\ue014", "enter": "\ue007", "esc": "\ue00c"}


class Tab:
    """The page as somebody sees it who asks about its elements by selector."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, port: int, fragment: str = "") -> None:
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(f"http://127.0.0.1:{port}/{fragment}")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.trim())"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def text(self, selector: str) -> str:
        return " ".join(self.texts(selector))

    def wait(self, selector: str, text: str) -> None:
        wait_until(lambda: text in self.text(selector), f"{selector} says {text}", WAIT_S)

    def workers(self) -> list[str]:
        return self.texts("#workers-table tbody th button")

    def keys(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*(KEYS.get(key, key) for key in keys))

    def focused(self) -> str:
        return str(self.driver.switch_to.active_element.text)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def said(self) -> list[str]:
        """What the console has."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked(self) -> set[str]:
        """Origins of every request that was made."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return {"/".join(url.split("/")[:3]) for url in urls if not url.startswith("data:")}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browsing() as driver:
        yield Tab(driver)


@pytest.fixture(scope="module")
def odd() -> View:
    """1,000 workers, one of them with a name that would be markup."""
    backend = MemoryBackend()
    names = [f"w-{number}" for number in range(999)]
    backend.apply([chain(0, 3, HOSTILE), *(chain(0, 1 + number % 7, one) for number, one in enumerate(names))])
    gone = {"trust": Trust.UNTRUSTED, "reason": HOSTILE}
    return View(backend, [status(HOSTILE, **gone), *(status(one) for one in names)])


def test_a_name_of_a_worker_is_text_and_a_thousand_are_sorted_and_filtered(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port)
        tab.wait("#workers-shown", "1,000 of 1,000")
        tab.find("#workers-filter").send_keys("<img")
        tab.wait("#workers-shown", "1 of 1,000")
        assert tab.workers() == [HOSTILE]
        assert tab.texts("#workers-table .why") == [HOSTILE]
        assert tab.texts("img") == []
        tab.keys("esc")
        tab.wait("#workers-shown", "1,000 of 1,000")

        tab.find("#workers-table th:nth-child(3) button").click()
        assert tab.texts("#workers-table tbody tr:first-child .tier") == ["hbm\n7"]
        assert tab.driver.execute_script("return document.querySelector('[aria-sort]').ariaSort") == "descending"
        assert tab.workers()[:2] == ["w-6", "w-13"]

        tab.open(server.port, f"#hash={name(0)}")
        tab.wait("#found h4", "Held by 1,000 workers")
        assert tab.texts("img") == []
        assert "owned" not in tab.driver.title
        assert tab.said() == []


def test_a_chain_is_walked_with_the_keyboard_alone(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port)
        tab.keys("/", "1", "enter")
        tab.wait("#found h3", name(1))
        assert "integer: 1 is 0000000000000001" in tab.text("#hash-said")
        assert tab.focused().startswith(f"Block {name(1)}")

        tab.keys("right")
        assert tab.focused() == name(2)
        tab.keys("enter")
        tab.wait("#found h3", name(2))
        tab.keys("left")
        tab.wait("#found h3", name(1))
        tab.keys("left")
        tab.wait("#found h3", name(0))
        tab.keys("left")
        tab.wait("#found h3", "Starts of chains")
        assert tab.texts(".children a") == [name(0)]
        tab.driver.back()
        tab.wait("#found h3", name(0))


def test_of_many_chains_the_first_are_listed(tab: Tab) -> None:
    backend = MemoryBackend()
    backend.apply([chain(10 * number, 1) for number in range(250)])
    with serving(View(backend, [status("w")])) as server:
        tab.open(server.port, "#root=&model=m&tokenizer=m&tenant=")
        tab.wait("#found h4", "The first 200 children by hash; there are more")
        assert tab.texts(".children a") == [name(10 * number) for number in range(200)]


def test_a_row_is_reached_opened_and_closed_with_the_keyboard_and_stays_through_a_look(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port)
        tab.wait("#workers-shown", "1,000 of 1,000")
        tab.find("#workers-table th:last-child button").click()
        tab.keys("\ue004", "down", "down")
        third = tab.workers()[2]
        assert tab.focused() == third
        tab.keys("enter")
        assert "hbm, group 0" in tab.text("#workers-table .more")
        asked = tab.text("#asof")[:20]
        wait_until(lambda: not tab.text("#asof").startswith(asked), "another look", WAIT_S)
        assert tab.focused() == third
        tab.keys("esc")
        assert tab.texts("#workers-table .more") == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [("abc", "is one missing"), ("12g4", "neither hex"), ("9" * 31, "no 64-bit integer"), ("  ", "type or paste")],
)
def test_what_is_no_hash_is_said_to_be_none(tab: Tab, odd: View, typed: str, said: str) -> None:
    with serving(odd) as server:
        tab.open(server.port)
        tab.find("#hash").send_keys(typed, KEYS["enter"])
        wait_until(lambda: said in tab.text("#hash-problem").lower(), said, WAIT_S)


HIDDEN = """
Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
document.dispatchEvent(new Event("visibilitychange"));
"""


def test_a_page_that_nobody_sees_rests(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port)
        tab.wait("#state", "● ready")
        tab.driver.execute_script(HIDDEN, True)
        tab.wait("#state", "paused")
        tab.driver.execute_script(HIDDEN, False)
        tab.wait("#state", "● ready")


def test_a_hash_is_copied(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port, f"#hash={name(1)}")
        tab.wait("#found h3", name(1))
        tab.find("#found h3 button").click()
        tab.wait("#found h3 button", "Copied")
        tab.find("#hash").clear()
        tab.find("#hash").send_keys("\ue009", "v")
        assert tab.find("#hash").get_property("value") == name(1)


def test_an_address_that_names_no_hash_is_no_outage(tab: Tab, odd: View) -> None:
    with serving(odd) as server:
        tab.open(server.port, "#hash=xyz")
        tab.wait("#hash-problem", "hex digits")
        tab.wait("#state", "● ready")


def test_problems_are_said_in_words(tab: Tab) -> None:
    view = View(MemoryBackend())
    view.ready = Readiness(False, ["nothing can be written: full"])
    with serving(view) as server:
        tab.open(server.port)
        tab.wait("#state", "not ready")
        assert tab.texts("#problems li") == ["nothing can be written: full"]


CONTRAST = """
const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const colour = rgb(getComputedStyle(one).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
};
return [...document.querySelectorAll("body *")]
  .filter((one) => one.checkVisibility() && [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((one) => {
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), one.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
"""


def test_both_themes_can_be_read_and_one_is_kept(tab: Tab) -> None:
    backend = MemoryBackend()
    backend.apply([chain(0, 3, trust) for trust in Trust])
    with serving(View(backend, [status(trust, trust=trust, reason="of a test") for trust in Trust])) as server:
        tab.open(server.port, f"#hash={name(0)}")
        tab.wait("#found h4", "Held by 4 workers")
        for theme in ("light", "dark"):
            tab.find("#theme").click()
            assert tab.text("#theme") == f"Theme: {theme}"
            assert tab.driver.execute_script(CONTRAST) == []
        tab.driver.refresh()
        tab.wait("#theme", "dark")


def test_a_token_is_asked_for_and_kept_in_the_tab(tab: Tab, odd: View, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a-good-token\n")
    tokens.chmod(0o600)
    with serving(odd, HttpConfig(token_file=str(tokens))) as server:
        tab.open(server.port)
        tab.wait("#ask-why", "one of its tokens")
        tab.find("#token").send_keys("a-bad-token", KEYS["enter"])
        tab.wait("#ask-why", "refused the token")
        tab.find("#token").send_keys("a-good-token", KEYS["enter"])
        tab.wait("#workers-shown", "1,000 of 1,000")
        tab.driver.refresh()
        tab.wait("#workers-shown", "1,000 of 1,000")
        assert tab.driver.execute_script("return JSON.stringify(localStorage)").find("token") < 0
        assert tab.asked() == {f"http://127.0.0.1:{server.port}"}


def test_a_real_daemon_is_shown_is_missed_and_comes_back(tab: Tab, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "simulate", "--rate", "20", "--name", "engine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as engine:
        try:
            assert engine.stdout is not None
            rank = json.loads(engine.stdout.readline())["engines"][0]["ranks"][0]
            arguments = ("--engine", rank["endpoint"], "--replay-endpoint", rank["replay_endpoint"])
            with DaemonProcess(tmp_path, *arguments, "--worker", "gpu-7") as daemon:
                tab.open(daemon.port)
                tab.wait("#state", "ready")
                tab.wait("#workers-table", "gpu-7")
                tab.wait("#streams-table", "live")
                wait_until(lambda: _rate(tab) > 0, "messages are counted", WAIT_S)
                assert tab.said() == []
                assert tab.asked() == {f"http://127.0.0.1:{daemon.port}"}
                daemon.kill()
                tab.wait("#state", "not answering")
                tab.wait("#trouble", "does not answer")
                daemon.start()
                tab.wait("#state", "● ready")
                wait_until(lambda: not tab.find("#trouble").is_displayed(), "the trouble is over", WAIT_S)
        finally:
            engine.kill()


def _rate(tab: Tab) -> float:
    found = tab.texts("#streams-table td:last-child")
    return float(found[0].replace(",", "")) if found and found[0][:1].isdigit() else 0.0
