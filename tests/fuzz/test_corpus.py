"""Inputs that once failed stay harmless, and a short campaign finds none. The long one: python tests/fuzz/run.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import campaign
from .campaign import CORPUS
from .decoders import Target
from .targets import TARGETS

_INPUTS = {"http": 300}
_INPUTS_USUALLY = 3000


@pytest.fixture(scope="module", params=TARGETS)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, Target]]:
    target = TARGETS[request.param]()
    yield request.param, target
    target.close()


def test_inputs_that_once_failed_are_harmless(named: tuple[str, Target]) -> None:
    name, target = named
    for path in sorted((CORPUS / name).glob("*")):
        report = campaign.Report(name, 0)
        assert campaign.tried(target, path.read_bytes(), report) is None, path


def test_a_short_campaign_finds_nothing(named: tuple[str, Target], tmp_path: Path) -> None:
    name, target = named
    report = campaign.run(name, target, seed=11, inputs=_INPUTS.get(name, _INPUTS_USUALLY), minutes=0, corpus=tmp_path)
    assert not report.failed, report.shown
    assert report.slow == 0, report.shown


def test_a_campaign_notices_exceptions_and_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "HANG_S", 0.2)

    def run(data: bytes) -> None:
        if data[:1] < b"\x80":
            raise ValueError("seen")
        while data[:1] > b"\xf0":
            pass

    report = campaign.run("bad", Target([bytes(8)], [b"\xff"], run), seed=1, inputs=60, minutes=0, corpus=tmp_path)
    assert report.exceptions
    assert report.hangs
    assert list((tmp_path / "bad").iterdir())
