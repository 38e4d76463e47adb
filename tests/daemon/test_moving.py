"""Whole indexes, moved, compared and checked: from the same stream they are the same in every backend."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import msgspec
import pytest

from kvcensus.backends.errors import BackendBusy, BackendError
from kvcensus.backends.interface import IndexBackend
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.memory import MemoryBackend
from kvcensus.backends.model import CacheResidency, ClearBlocks, Cursor, GroupKind, GroupSpec, Operation
from kvcensus.backends.registry import open_backend, why_unusable
from kvcensus.daemon.config import Config, HttpConfig
from kvcensus.daemon.moving.checking import findings
from kvcensus.daemon.moving.copying import TargetNotEmpty, copy
from kvcensus.daemon.moving.differing import Difference, Kind, differences
from kvcensus.daemon.moving.location import Content, Location
from kvcensus.daemon.moving.ordering import in_order
from kvcensus.daemon.service import Service
from kvcensus.translators.translation import TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator
from tests.backends.building import DRAM, LORA, block, blocks, key, residency, store
from tests.captures_reader import load_capture
from tests.valkey_servers import why_untested, with_server

KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]
CAPTURES = ("vllm-0.32.0-evict", "vllm-0.32.0-swa", "vllm-0.32.0-lora", "vllm-0.32.0-dups")
ON_DISK = [name for name in ("lmdb", "filesystem", "rocksdb") if not why_unusable(name)]
EVERY = ["memory", *ON_DISK, "valkey", "holt"]
WINDOW = GroupSpec(GroupKind.WINDOW, 128, 16)


def feed(backend: IndexBackend) -> None:
    """Every message of some captures, one worker each, and what no capture has."""
    for name in CAPTURES:
        translator = VllmTranslator(TranslatorOptions(name, "model", "tokenizer"))
        facts = 0
        for message in load_capture(name).messages:
            translation = translator.translate(message.payload, facts)
            facts = translation.facts
            backend.apply(translation.operations, [Cursor(name, 1, message.seq, b"print", worker_id=name)])
    backend.apply([store(*blocks(1, 2, 3), worker="w", tier=DRAM, rank=3, scope=LORA, group=1, spec=WINDOW, size=8)])
    backend.apply([store(*blocks(1, 2), worker="w", tier=DRAM, rank=3, scope=LORA, group=1)])
    backend.apply([store(worker="empty", rank=7, spec=WINDOW)])
    backend.put(residency(key(block(9), parent=None, index=None, tokens=0), worker="w", pinned=True, ref_count=5))
    backend.put(residency(key(block(8), parent=block(7), index=1 << 30), worker="w", last_access_ms=1 << 41, rank=2))


def content(backend: IndexBackend) -> Content:
    return Content(backend.snapshot, backend.cursors(), backend.holdings())


def found(a: IndexBackend, b: IndexBackend, folder: Path, *, cursors: bool = False) -> list[Difference]:
    folder.mkdir()
    return list(differences(content(a), content(b), folder, part_rows=100, cursors=cursors))


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[dict[str, IndexBackend]]:
    backends: dict[str, IndexBackend] = {"memory": MemoryBackend()}
    for name in EVERY[1:]:
        if not why_untested(name):
            backends[name] = open_backend(name, tmp_path / name, with_server(name, {}))
    for backend in backends.values():
        feed(backend)
    yield backends
    for backend in backends.values():
        backend.close()


# comparing


def test_any_two_backends_fed_the_same_differ_in_nothing(fed: dict[str, IndexBackend], tmp_path: Path) -> None:
    for a, b in combinations(fed, 2):
        assert found(fed[a], fed[b], tmp_path / f"{a}-{b}", cursors=True) == []


def test_each_kind_of_difference_is_found_once(tmp_path: Path) -> None:
    a, b = MemoryBackend(), MemoryBackend()
    for backend in (a, b):
        backend.apply([store(*blocks(*range(1, 1000)), worker="w", rank=1)])
    same: CacheResidency = a.find(block(500))[0]
    a.put(msgspec.structs.replace(same, ref_count=2, pinned=True))
    a.put(residency(key(block(2000)), worker="w"))
    b.put(residency(key(block(3)), worker="w", tier=DRAM))
    b.apply([store(worker="v", spec=WINDOW)], [Cursor("stream", 1, 5, b"\x01", committed_ms=3)])

    one, two, three, four, five = found(a, b, tmp_path / "first", cursors=True)

    assert (one.difference, one.what, one.identity["worker_id"]) == (Kind.ONLY_B, "place", "v")
    assert one.b["spec"] == {"kind": "window", "window": 128, "block_size": 16}
    assert (two.difference, two.identity["block_hash"], two.identity["tier"]) == (
        Kind.ONLY_B,
        block(3).hex(),
        "cpu_dram",
    )
    assert (three.difference, three.identity["block_hash"]) == (Kind.DIFFERS, block(500).hex())
    assert (three.a, three.b) == ({"ref_count": 2, "pinned": True}, {"ref_count": 1, "pinned": False})
    assert (four.difference, four.identity["block_hash"], four.b) == (Kind.ONLY_A, block(2000).hex(), {})
    assert (five.what, five.identity, five.b["fingerprint"]) == ("cursor", {"stream": "stream"}, "01")
    assert found(a, b, tmp_path / "second") == [one, two, three, four]


def test_when_a_cursor_was_told_is_no_difference(tmp_path: Path) -> None:
    a, b = MemoryBackend(), MemoryBackend()
    a.apply([], [Cursor("s", 1, 5, committed_ms=1, since_ms=1)])
    b.apply([], [Cursor("s", 1, 5, committed_ms=2, since_ms=2)])
    assert found(a, b, tmp_path / "same", cursors=True) == []
    b.apply([], [Cursor("s", 1, 6)])
    (one,) = found(a, b, tmp_path / "other", cursors=True)
    assert (one.a, one.b) == ({"seq": 5}, {"seq": 6})


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 64 * 7, 64 * 7 + 1, 1000])
def test_rows_are_in_order_whatever_fits_into_memory(rows: int, tmp_path: Path) -> None:
    given = [(f"{number * 7919 % 1009:04}".encode(), bytes(number % 5)) for number in range(rows)]
    assert list(in_order(iter(given), tmp_path, part_rows=7)) == sorted(given)
    assert list(tmp_path.iterdir()) == []


# copying


@pytest.mark.parametrize("name", EVERY)
def test_a_copy_is_equal_in_all_and_answers_alike(name: str, fed: dict[str, IndexBackend], tmp_path: Path) -> None:
    if problem := why_untested(name):
        pytest.skip(problem)
    source, target = fed["memory"], open_backend(name, tmp_path / "copy", with_server(name, {}))
    told: list[int] = []
    try:
        copy(content(source), target, told.append)

        assert found(source, target, tmp_path / "sorted", cursors=True) == []
        assert sum(told) == len(source)
        assert target.cursors() == source.cursors()
        assert sorted(map(repr, target.holdings())) == sorted(map(repr, source.holdings()))
        assert list(findings(target)) == []
        for capture in CAPTURES:
            for stage in load_capture(capture).stages:
                for probe in stage.probes:
                    assert target.match(None, probe.block_hashes) == source.match(None, probe.block_hashes)
    finally:
        target.close()


def test_a_target_that_has_anything_is_left_as_it_is() -> None:
    something: list[tuple[list[Operation], list[Cursor]]] = [
        ([store(block(1))], []),
        ([store(spec=WINDOW)], []),
        ([], [Cursor("s", 1, 5)]),
    ]
    for operations, cursors in something:
        target = MemoryBackend()
        target.apply(operations, cursors)
        before = content(target)
        with pytest.raises(TargetNotEmpty):
            copy(content(MemoryBackend()), target, lambda _: None)
        assert (target.cursors(), target.holdings()) == before[1:]


def test_a_copy_that_fails_leaves_nothing() -> None:
    source, target = MemoryBackend(), MemoryBackend()
    feed(source)

    def records() -> Iterator[CacheResidency]:
        yield next(source.snapshot())
        raise BackendError("the disk has died")

    with pytest.raises(BackendError, match="died"):
        copy(content(source)._replace(records=records), target, lambda _: None)
    assert (len(target), target.cursors(), target.holdings()) == (0, {}, [])


def test_until_a_copy_is_whole_each_worker_has_a_cursor_that_a_daemon_drops_with_it() -> None:
    """At every moment: either every cursor is there, or all that is there belongs to a stream that nobody follows."""
    source = MemoryBackend()
    feed(source)

    class Watched(MemoryBackend):
        whole = 0

        def put_all(self, residencies: object) -> None:
            super().put_all(residencies)  # type: ignore[arg-type]
            self.look()

        def forget_stream(self, stream: str) -> None:
            self.look()
            super().forget_stream(stream)

        def look(self) -> None:
            after = MemoryBackend()
            after.apply([], list(self.cursors().values()))
            held = {one.worker_id for one in self.holdings()}
            for cursor in self.cursors().values():
                if cursor.stream not in source.cursors() and cursor.worker_id:
                    held.discard(cursor.worker_id)
            if source.cursors().items() <= self.cursors().items():
                assert held == {one.worker_id for one in source.holdings()}
                self.whole += 1
            else:
                assert held == set()

    target = Watched()
    copy(content(source), target, lambda _: None)
    assert target.whole == len({one.worker_id for one in source.holdings()})


# checking


@pytest.mark.parametrize("name", EVERY)
def test_a_sound_index_has_no_findings(name: str, fed: dict[str, IndexBackend]) -> None:
    if problem := why_untested(name):
        pytest.skip(problem)
    assert list(findings(fed[name])) == []
    fed[name].apply([ClearBlocks(CAPTURES[0])])
    assert list(findings(fed[name])) == []


def test_what_does_not_fit_is_found() -> None:
    index = MemoryBackend()
    index.apply([store(*blocks(1, 2, 3)), store(block(9), parent=block(3))])
    (place,) = index._every_place()
    place.unlink(block(3), block(9))
    place.records += 1
    place.bytes += 5

    wheres = [finding.where for finding in findings(index)]

    assert wheres[0] == f"block {block(9).hex()}"
    assert wheres[1:] == ["place w hbm 0", "the number of records", "the bytes of all blocks"]


# LMDB compacted


def test_a_compacted_index_is_the_same_and_smaller_and_goes_on(tmp_path: Path) -> None:
    index, kept = LmdbBackend(tmp_path / "data"), MemoryBackend()
    for number in range(20):
        index.apply([store(*blocks(*range(number * 1000 + 1, number * 1000 + 1001)), worker=f"w{number}")])
    for number in range(18):
        index.clear_worker(f"w{number}")
    while index.reclaim(10_000):
        pass
    copy(content(index), kept, lambda _: None)
    before = index.stored_bytes()

    index.compact()

    assert index.stored_bytes() < before / 3
    assert found(index, kept, tmp_path / "sorted", cursors=True) == []
    for one in (index, kept):
        one.apply([store(block(99_999), worker="w19")], [Cursor("s", 1, 5)])
    index.close()
    again = LmdbBackend(tmp_path / "data")
    assert found(again, kept, tmp_path / "again", cursors=True) == []
    again.close()
    assert not list((tmp_path / "data").glob("snapshot-*"))


def test_an_index_that_is_read_by_another_process_is_not_compacted(tmp_path: Path) -> None:
    index = LmdbBackend(tmp_path / "data")
    index.apply([store(block(1))])
    reads = (
        "import sys; from pathlib import Path; from kvcensus.backends.lmdb import LmdbReader; "
        "reader = LmdbReader.open(Path(sys.argv[1])); reader.cursors(); print('reads', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reads, str(tmp_path / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reads\n"
        with pytest.raises(BackendBusy, match="another process reads"):
            index.compact()
        assert len(list(index.snapshot())) == 1
        reader.kill()
    index.compact()
    assert len(list(index.snapshot())) == 1
    index.close()


# the commands


def kvcensus(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVCENSUS, "backend", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def make(name: str, directory: Path) -> str:
    backend = open_backend(name, directory)
    feed(backend)
    backend.close()
    return f"{name}:{directory}"


@contextmanager
def writer(name: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns an index and goes on changing it: each record has the copies that its cursor says.

    Its files come and go meanwhile as they would in hours: the journal is snapshot, the database is merged.
    """
    writes = """
import sys, itertools
from pathlib import Path
from kvcensus.backends.registry import open_backend
from kvcensus.backends.model import Cursor
from tests.backends.building import blocks, store
name = sys.argv[1]
options = {"segment_bytes": 1 << 16, "snapshot_after_bytes": 1 << 18} if name == "filesystem" else {}
backend = open_backend(name, Path(sys.argv[2]), options)
for number in itertools.count(1):
    backend.apply([store(*blocks(*range(1, 500)))], [Cursor("s", 1, number)])
    if name == "rocksdb" and number % 200 == 0:
        backend.compact()
    if number == 1:
        print("writes", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", writes, name, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writes\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ON_DISK)
def test_copied_to_another_backend_and_compared(name: str, tmp_path: Path) -> None:
    source, target = make("lmdb", tmp_path / "a"), f"{name}:{tmp_path / 'b'}"

    copied = kvcensus("copy", source, target)
    assert copied.returncode == 0, copied.stderr
    assert " records and 4 cursors from lmdb:" in copied.stderr

    assert (kvcensus("diff", source, target, "--cursors").stdout, kvcensus("verify", target).returncode) == ("", 0)
    backend = open_backend(name, tmp_path / "b")
    one = backend.find(block(9))[0]
    backend.put(msgspec.structs.replace(one, ref_count=6))
    backend.close()
    compared = kvcensus("diff", source, target)
    assert compared.returncode == 1
    (line,) = compared.stdout.splitlines()
    told = json.loads(line)
    assert (told["difference"], told["identity"]["block_hash"]) == ("differs", block(9).hex())
    assert (told["a"], told["b"]) == ({"ref_count": 5}, {"ref_count": 6})
    assert kvcensus("diff", source, target, "--ignore", "ref_count").returncode == 0
    again = kvcensus("copy", source, target)
    assert again.returncode == 74
    assert "nothing was copied" in again.stderr


@pytest.mark.parametrize("name", ON_DISK)
def test_a_backup_is_of_one_moment_while_a_process_writes(name: str, tmp_path: Path) -> None:
    source = f"{name}:{tmp_path / 'data'}"
    with writer(name, tmp_path / "data"):
        time.sleep(0.1)
        done = kvcensus("backup", source, tmp_path / "kept")
        assert done.returncode == 0, done.stderr
        assert kvcensus("verify", source).returncode == 0
        assert kvcensus("diff", source, f"{name}:{tmp_path / 'kept'}", "--cursors").returncode == 1
        busy = kvcensus("compact", source)
        assert busy.returncode == 75
        assert "this needs an index that no daemon has" in busy.stderr
    backup = open_backend(name, tmp_path / "kept")
    records = list(backup.snapshot())
    assert len(records) == 499
    assert {one.ref_count for one in records} == {backup.cursors()["s"].seq}
    backup.close()
    assert kvcensus("backup", source, tmp_path / "kept").returncode == 74
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "kept"]


@pytest.mark.parametrize("name", ON_DISK)
def test_compacted_and_backed_up_by_command(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "a")
    compacted = kvcensus("compact", source)
    assert compacted.returncode == 0, compacted.stderr
    assert " bytes before, " in compacted.stderr
    assert kvcensus("backup", source, tmp_path / "b").returncode == 0
    compared = kvcensus("diff", source, f"{name}:{tmp_path / 'b'}", "--cursors")
    assert (compared.returncode, compared.stdout, compared.stderr) == (0, "", "")


def test_copied_to_a_server_and_back(tmp_path: Path) -> None:
    if problem := why_untested("valkey"):
        pytest.skip(problem)
    options = "&".join(f"{key}={json.dumps(value)}" for key, value in with_server("valkey", {}).items())
    source, server = make("lmdb", tmp_path / "a"), f"valkey:{tmp_path / 'v'}?{options}"
    assert kvcensus("copy", source, server).returncode == 0
    assert kvcensus("verify", server).returncode == 0
    assert kvcensus("copy", server, f"lmdb:{tmp_path / 'b'}").returncode == 0
    compared = kvcensus("diff", source, f"lmdb:{tmp_path / 'b'}", "--cursors")
    assert (compared.returncode, compared.stdout) == (0, "")
    refused = kvcensus("backup", server, tmp_path / "c")
    assert refused.returncode == 69
    assert "on a server" in refused.stderr


@pytest.mark.parametrize(
    ("command", "name", "noted_in"), [("backup", "filesystem", "journal"), ("backup", "lmdb", ""), ("copy", "lmdb", "")]
)
def test_what_a_machine_crash_made_worthless_is_not_taken_for_an_index(
    command: str, name: str, noted_in: str, tmp_path: Path
) -> None:
    source = make(name, tmp_path / "a")
    boot = json.dumps({"boot_id": "another", "durability": "process", "clean": False})
    (tmp_path / "a" / noted_in / "boot.json").write_text(boot)
    ended = kvcensus(command, source, tmp_path / "b" if command == "backup" else f"{name}:{tmp_path / 'b'}")
    assert ended.returncode == 69
    assert "not to be believed" in ended.stderr
    assert not list(tmp_path.glob("*b*"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["diff", "lmdb:/nowhere", "lmdb:/nowhere"], 69, "there is no index here"),
        (["diff", "filesystem:/nowhere", "lmdb:/nowhere"], 69, "there is no index here"),
        (["diff", "/nowhere", "lmdb:/nowhere"], 2, "is not NAME:DIRECTORY"),
        (["backup", "rocksdb:/nowhere", "/nowhere-else"], 69, "there is no index here"),
        (["verify", "redis:/nowhere"], 2, "there is no backend 'redis'"),
        (["copy", "memory:/nowhere", "lmdb:/nowhere"], 2, "memory has no index"),
        (["diff", "lmdb:/a", "lmdb:/b", "--ignore", "rank"], 2, "there are prefix_hash"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], code: int, text: str) -> None:
    ended = kvcensus(*arguments)
    assert ended.returncode == code
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr


def test_options_of_a_backend_follow_its_directory() -> None:
    assert Location.parse('lmdb:data?durability=full&map_size=1048576&servers=["a:1"]') == Location(
        "lmdb", Path("data"), {"durability": "full", "map_size": 1048576, "servers": ["a:1"]}
    )


def test_an_interrupted_copy_leaves_an_empty_target(tmp_path: Path) -> None:
    source = LmdbBackend(tmp_path / "a")
    source.apply([store(*blocks(*range(1, 200_001)))])
    source.close()
    with subprocess.Popen(
        [*KVCENSUS, "backend", "copy", f"lmdb:{tmp_path / 'a'}", f"lmdb:{tmp_path / 'b'}"], stderr=subprocess.PIPE
    ) as copying:
        while not (tmp_path / "b" / "index.mdb").exists() or (tmp_path / "b" / "index.mdb").stat().st_size < 1 << 20:
            assert copying.poll() is None
            time.sleep(0.005)
        copying.send_signal(signal.SIGINT)
        assert copying.wait() == 130
    target = LmdbBackend(tmp_path / "b")
    assert (len(target), target.cursors(), target.holdings()) == (0, {}, [])
    target.close()


def test_a_copy_that_was_killed_is_dropped_by_the_daemon_that_finds_it(tmp_path: Path) -> None:
    source = LmdbBackend(tmp_path / "a")
    source.apply([store(*blocks(*range(1, 200_001)), worker="w")], [Cursor("s", 1, 5, worker_id="w")])
    source.close()
    with subprocess.Popen(
        [*KVCENSUS, "backend", "copy", f"lmdb:{tmp_path / 'a'}", f"lmdb:{tmp_path / 'b'}"], stderr=subprocess.PIPE
    ) as copying:
        while not (tmp_path / "b" / "index.mdb").exists() or (tmp_path / "b" / "index.mdb").stat().st_size < 1 << 20:
            assert copying.poll() is None
            time.sleep(0.005)
        copying.kill()
    target = LmdbBackend(tmp_path / "b")
    assert 0 < len(target) < 200_000
    assert list(target.cursors()) == ["unfinished copy of w"]
    target.close()

    service = Service(Config(data_dir=str(tmp_path / "b"), http=HttpConfig(listen="")))
    service.start()
    assert (len(service.backend), service.backend.cursors()) == (0, {})
    assert service.stop(10)


def test_compacting_that_is_killed_leaves_the_whole_index(tmp_path: Path) -> None:
    data, chance = tmp_path / "data", random.Random(7)
    index, kept = LmdbBackend(data), MemoryBackend()
    for one in (index, kept):
        one.apply([store(*blocks(*range(1, 30_001)))], [Cursor("s", 1, 5)])
    index.close()
    compacts = (
        "import sys; from pathlib import Path; from kvcensus.backends.lmdb import LmdbBackend\n"
        "index = LmdbBackend(Path(sys.argv[1])); print('compacts', flush=True)\n"
        "while True: index.compact()"
    )
    for kill in range(6):
        with subprocess.Popen([sys.executable, "-c", compacts, str(data)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"compacts\n"
            time.sleep(chance.uniform(0, 0.3))
            assert process.poll() is None
            process.kill()
        index = LmdbBackend(data)
        assert found(index, kept, tmp_path / str(kill), cursors=True) == []
        for one in (index, kept):
            one.apply([store(block(100_000 + kill))], [Cursor("s", 1, 6 + kill)])
        index.close()
