"""The pages on following an engine: their configurations load, and `check --probe` prints what they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcensus.daemon.config import SourceType, load_config

from .probing import engine_of, probe, publishing, source
from .test_probe import published_frames

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = {"vllm": SourceType.VLLM, "sglang": SourceType.SGLANG, "dynamo": SourceType.DYNAMO}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (HOW_TO / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


def without_chance(report: str) -> str:
    """The report without addresses, times and clocks."""
    report = re.sub(r"tcp://[\d.]+:\d+", "ENDPOINT", report)
    report = re.sub(r"in \d+ ms|in [\d.]+ s", "in TIME", report)
    report = re.sub(r"^  clock .*\n", "", report, flags=re.MULTILINE)
    return re.sub(r"^  warning +the clocks differ.*\n", "", report, flags=re.MULTILINE)


def shown_on(page: str) -> str:
    (console,) = [one for one in blocks(page, "console") if "--probe" in one]
    return without_chance(console.partition("\n")[2])


def printed(report: str) -> str:
    """The report less what `check` prints without --probe."""
    return without_chance(report[re.search(r"^(stream|bus) ", report, re.MULTILINE).start() :])  # type: ignore[union-attr]


@pytest.mark.parametrize(("page", "kind"), PAGES.items())
def test_the_configurations_of_a_page_load(tmp_path: Path, page: str, kind: SourceType) -> None:
    examples = blocks(page, "toml")
    assert examples
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.toml"
        file.write_text(example)
        config = load_config(file, {})
        kinds = [one.type for one in config.sources] + [one.type for one in config.nats]
        assert kinds == [kind]
        assert config.warnings() == []


@pytest.mark.parametrize(
    ("page", "capture", "before", "count"),
    [("vllm", "vllm-0.32.0-lora", 30, 20), ("sglang", "sglang-0.5.23-evict", 20, 15)],
)
def test_the_report_on_an_engine_is_the_one_that_is_shown(
    tmp_path: Path, page: str, capture: str, before: int, count: int
) -> None:
    engine = engine_of(capture, before)
    _, report = probe(tmp_path, source(engine, type=page), publishing(engine, count), arguments=())
    engine.stop()
    assert printed(report) == shown_on(page)


def test_the_report_on_dynamo_is_the_one_that_is_shown(tmp_path: Path) -> None:
    endpoint, publish, end = published_frames("dynamo-1.6.1-zmq")
    toml = f"[[sources]]\nname = 'dynamo'\ntype = 'dynamo'\nendpoint = '{endpoint}'\n"
    _, report = probe(tmp_path, toml, publish, arguments=())
    end()
    assert printed(report) == shown_on("dynamo")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_is_there(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (HOW_TO / f"{page}.md").read_text()):
        assert (HOW_TO / target).exists(), target
