"""A truncated or overwritten index: refused, or opened and right, or found by the long look; never the end by a signal.

Every damaged file is looked at in another process, because LMDB itself ends the process when it maps what is not there.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcensus.backends.errors import BackendCorrupt
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import INDEX_FILE, SUSPECT_FILE
from kvcensus.backends.lmdb.verify import IndexCheck
from kvcensus.backends.model import CacheTier, Cursor

from .building import clear, remove, store

PAGE = 4096
SEEDS = 50

LOOK = """
import json, pathlib, random, sys
from kvcensus.backends.errors import BackendError
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import INDEX_FILE
from kvcensus.backends.lmdb.verify import IndexCheck

directory, kind, first, last = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
path = directory / INDEX_FILE
sound = path.read_bytes()
truth = {tuple(one) for one in json.loads((directory / "truth.json").read_text())}
said = {}
for seed in range(first, last):
    damaged = bytearray(sound)
    chance = random.Random(seed)
    pages = range(2) if kind == "meta" else range(2, len(sound) // 4096)
    start = chance.choice(pages) * 4096
    room = 152 if kind == "meta" else 4096
    for _ in range(chance.choice((1, 2, 16))):
        damaged[start + chance.randrange(room)] ^= chance.randrange(1, 256)
    path.write_bytes(damaged)
    print("seed", seed, flush=True, file=sys.stderr)
    try:
        found = list(IndexCheck(path).findings())
        backend = LmdbBackend(directory)
    except BackendError as error:
        said[seed] = type(error).__name__
        continue
    if found:
        said[seed] = "found"
    else:
        held = {(one.worker_id, one.tier, one.key.block_hash.hex(), (one.key.prefix_hash or b"").hex(), one.key.group)
                for one in backend.snapshot()}
        said[seed] = "right" if held == truth and len(backend) == len(truth) else "WRONG"
    backend._env.close()
    backend._owner.release()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with several workers, tiers, dead rows, links and free pages."""
    directory = tmp_path_factory.mktemp("made")
    random_bytes = random.Random(1).randbytes
    backend = LmdbBackend(directory)
    for number in range(40):
        runs = [
            store(
                *(random_bytes(8) for _ in range(50)), worker=f"w{at % 3}", tier=tuple(CacheTier)[at % 2], size=at + 1
            )
            for at in range(4)
        ]
        backend.apply(runs, [Cursor("s", 1, number)])
        backend.apply([remove(*runs[0].block_hashes[40:], worker=runs[0].worker_id)])
    backend.apply([clear("w2")])
    backend.reclaim(100)
    held = [
        (one.worker_id, one.tier, one.key.block_hash.hex(), (one.key.prefix_hash or b"").hex(), one.key.group)
        for one in backend.snapshot()
    ]
    backend.close()
    (directory / "truth.json").write_text(json.dumps(held))
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def looked_at(directory: Path, kind: str, seeds: range) -> dict[str, str]:
    command = [sys.executable, "-c", LOOK, str(directory), kind, str(seeds.start), str(seeds.stop)]
    look = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert look.returncode == 0, (look.returncode, look.stderr[-2000:])
    said: dict[str, str] = json.loads(look.stdout)
    return said


def test_a_sound_index_has_no_findings_and_every_record_is_counted(directory: Path) -> None:
    check = IndexCheck(directory / INDEX_FILE)
    assert list(check.findings()) == []
    assert check.records == len(json.loads((directory / "truth.json").read_text()))
    assert check.pages * PAGE >= (directory / INDEX_FILE).stat().st_size > 50 * PAGE
    assert check.links > 0


@pytest.mark.parametrize("kind", ["meta", "page"])
def test_flipped_bytes_are_refused_or_found_or_change_nothing(directory: Path, kind: str) -> None:
    said = list(looked_at(directory, kind, range(SEEDS)).values())
    assert len(said) == SEEDS
    assert "WRONG" not in said
    assert said.count("BackendCorrupt" if kind == "meta" else "found") > SEEDS // 5


@pytest.mark.parametrize("pages", [0.5, 1, 2, 3, 10])
def test_a_truncated_file_is_refused(directory: Path, pages: float) -> None:
    path = directory / INDEX_FILE
    size = path.stat().st_size
    kept = size // 2 if pages == 0.5 else int(pages) * PAGE
    with path.open("r+b") as file:
        file.truncate(kept)
    code = """
import pathlib, sys
from kvcensus.backends.errors import BackendCorrupt
from kvcensus.backends.lmdb import LmdbBackend, LmdbReader
for opened in (LmdbReader.open, LmdbBackend):
    try:
        opened(pathlib.Path(sys.argv[1]))
    except BackendCorrupt as error:
        print(error)
"""
    look = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=60)
    assert look.returncode == 0, look.stderr
    assert look.stdout.count("is damaged") == 2
    assert path.stat().st_size == kept
    assert list(IndexCheck(path).findings())


def test_a_damaged_index_is_moved_aside_when_that_is_wanted(directory: Path) -> None:
    path = directory / INDEX_FILE
    (directory / f"{INDEX_FILE}.corrupt-20260101T000000Z").write_bytes(b"the last time")
    path.write_bytes(path.read_bytes()[: 10 * PAGE])
    damaged = path.read_bytes()

    backend = LmdbBackend(directory, rebuild=True)

    assert backend.is_empty()
    assert backend.cursors() == {}
    assert backend.moved_aside is not None
    assert backend.moved_aside.read_bytes() == damaged
    assert list(directory.glob(f"{INDEX_FILE}.corrupt-*")) == [backend.moved_aside]
    backend.close()


def test_what_is_suspected_is_looked_at_whole_before_it_is_opened(directory: Path) -> None:
    """As after an end by a signal: the damage is in a page that the short look does not see."""
    path = directory / INDEX_FILE
    raw = path.read_bytes()
    bad = next(at for at in range(2, len(raw) // PAGE) if opens_but_is_damaged(directory, raw, at))
    (directory / SUSPECT_FILE).write_text("Fatal Python error: Bus error\n")

    with pytest.raises(BackendCorrupt, match=f"page {bad}: table blocks"):
        LmdbBackend(directory)
    assert (directory / SUSPECT_FILE).exists()

    path.write_bytes(raw)
    backend = LmdbBackend(directory)
    assert backend.suspected == "Fatal Python error: Bus error"
    assert not (directory / SUSPECT_FILE).exists()
    backend.close()


def opens_but_is_damaged(directory: Path, raw: bytes, at: int) -> bool:
    """Overwrite the keys of page `at`; whether only the long look finds it."""
    path = directory / INDEX_FILE
    path.write_bytes(raw[: at * PAGE + 16] + b"\xff" * 64 + raw[at * PAGE + 80 :])
    if not any(finding.where == f"page {at}" and "blocks" in finding.what for finding in IndexCheck(path).findings()):
        return False
    try:
        LmdbBackend(directory).close()
    except BackendCorrupt:
        return False
    return True
