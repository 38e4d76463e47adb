"""`kvcensus quarantine` as a process: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvcensus.daemon.followed import FollowedStream
from kvcensus.daemon.quarantine import QUARANTINE_FILE, KeptEntries, Quarantine, QuarantineLimits
from kvcensus.daemon.streams.state import StreamLimits
from kvcensus.translators.translation import Rejection, RejectReason, TranslatorOptions
from kvcensus.translators.vllm import VllmTranslator

encode = msgspec.msgpack.encode
STORED = {
    "type": "BlockStored",
    "block_hashes": [7, b"\x00\x01\x02\x03\x04\x05\x06\x07"],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "medium": "TAPE",
}
UNKNOWN = ["BlockFrobbed", "\x1b[2J"]


def quarantine(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcensus.daemon.cli", "quarantine", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )


def answer(*arguments: object) -> Any:
    ended = quarantine(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def keep(data: Path, *payloads: bytes, rank: int | None = None, limits: QuarantineLimits | None = None) -> None:
    """Refuse these payloads as the daemon would with default options, numbered from 1."""
    kept = Quarantine(data, limits or QuarantineLimits(64 << 20, 168, 1 << 20))
    stream = FollowedStream(
        source="w",
        stream="w",
        rank=None,
        endpoint="",
        limits=StreamLimits(),
        translator=VllmTranslator(TranslatorOptions("w")),
        cursor=None,
    )
    for seq, payload in enumerate(payloads, 1):
        translation = stream.translator.translate(payload, 0)
        if translation.rank != rank:
            translation.rejections.append(Rejection(RejectReason.RANK, "another rank", "data_parallel_rank"))
        for rejection in translation.rejections:
            kept.add(stream, rank, 3, seq, payload, rejection)
    kept.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Entries 1: unknown medium, 2: unknown event, 3: a payload cut short."""
    keep(tmp_path / "data", encode([1.5, [STORED, UNKNOWN]]), encode([1.5, [STORED]])[:-3])
    return tmp_path / "data"


@pytest.fixture
def knowing(tmp_path: Path) -> Path:
    """A configuration that knows the medium."""
    file = tmp_path / "kvcensus.toml"
    file.write_text(
        f'data_dir = "{tmp_path}/data"\n[[sources]]\nname = "w"\nendpoint = "tcp://e:1"\nmedia = {{TAPE = "hbm"}}\n'
    )
    return file


def test_list_is_a_table_with_a_line_for_each(data: Path) -> None:
    head, *rows = quarantine("list", "--data-dir", data).stdout.splitlines()
    assert head.split() == ["ID", "TIME", "STREAM", "EPOCH", "SEQ", "EVENT", "REASON", "FIELD", "BYTES", "DETAIL"]
    columns = [row.split() for row in rows]
    assert [[one[0], *one[2:8]] for one in columns] == [
        ["1", "w", "3", "1", "0", "medium", "events[0].medium"],
        ["2", "w", "3", "1", "1", "event_type", "events[1]"],
        ["3", "w", "3", "2", "-", "payload", "-"],
    ]
    assert rows[0].endswith("the medium 'TAPE' is no known spelling of a tier")


def test_list_as_json_has_all_but_the_bytes(data: Path) -> None:
    first, _, last = answer("list", "--data-dir", data)["entries"]
    assert first["time"].endswith("Z")
    assert (first["id"], first["source"], first["engine"], first["rank"], first["event"]) == (1, "w", "vllm", None, 0)
    assert (first["raw_bytes"], first["cut"], last["event"]) == (len(encode(STORED)), False, None)
    assert "raw" not in first


def test_the_directory_is_that_of_the_flag_the_environment_or_the_file(
    data: Path, knowing: Path, tmp_path: Path
) -> None:
    everywhere = [
        quarantine("list", "--data-dir", data),
        quarantine("list", "--config", knowing),
        quarantine("list", KVCENSUS__DATA_DIR=str(data)),
    ]
    assert len({one.stdout for one in everywhere}) == 1
    assert "TAPE" in everywhere[0].stdout
    assert "no data directory" in quarantine("list", "--config", knowing, "--data-dir", tmp_path / "none").stderr


def test_show_prints_the_bytes_and_what_they_mean(data: Path) -> None:
    shown = quarantine("show", 1, "--data-dir", data).stdout
    assert "\nreason      medium\n" in shown
    offsets = [line for line in shown.splitlines() if line.startswith("000000")]
    assert bytes.fromhex("".join(line[10:58] for line in offsets)) == encode(STORED)
    assert offsets[0].endswith("|..type.BlockStor|")
    decoded = json.loads(shown.partition("\nmsgpack:\n")[2])
    assert decoded == {**STORED, "block_hashes": [7, "0x0001020304050607"]}


def test_show_of_what_is_no_msgpack_still_shows_the_bytes(data: Path) -> None:
    shown = answer("show", 3, "--data-dir", data)
    assert shown["decoded"] is None
    assert shown["undecodable"] == "cannot be read: Input data was truncated"
    assert bytes.fromhex(shown["raw_hex"]) == encode([1.5, [STORED]])[:-3]


def test_nothing_of_a_peer_reaches_the_terminal_raw(data: Path, tmp_path: Path) -> None:
    for arguments in (["list"], ["show", 2], ["retry", "--all"]):
        shown = quarantine(*arguments, "--data-dir", data)
        assert shown.returncode == 0
        assert all(one.isprintable() or one == "\n" for one in shown.stdout + shown.stderr)


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"\x91" * 100_000, b"\xdd\x7f\xff\xff\xff", encode(float("nan")), b"\x81\x91\x01\x02"),
        *(b"\xc7\x05\x30hello", b"\x91" * 400 + b"\xc0"),
    ],
    ids=["empty", "too deep", "2 GiB length", "no number", "odd key", "extension", "deep"],
)
def test_show_survives_hostile_bytes(tmp_path: Path, payload: bytes) -> None:
    keep(tmp_path, payload)
    assert answer("show", 1, "--data-dir", tmp_path)["raw_hex"] == payload.hex()
    assert quarantine("show", 1, "--data-dir", tmp_path).returncode == 0


def test_retry_says_what_is_understood_now(data: Path, knowing: Path) -> None:
    results = answer("retry", "--all", "--config", knowing)
    assert [(one["id"], one["verdict"], one["reason"]) for one in results["entries"]] == [
        (1, "translated", ""),
        (2, "refused", "event_type"),
        (3, "refused", "payload"),
    ]
    assert results["dropped"] == []
    assert len(KeptEntries(data).listed()) == 3

    ended = quarantine("retry", 1, 2, "--config", knowing)
    assert ended.stdout.splitlines()[1].split() == ["1", "w", "3", "1", "0", "translated", "1", "-", "-", "-"]
    assert "1 of 2 can be translated now, 0 dropped" in ended.stderr
    assert "--drop-translated" in ended.stderr


def test_retry_without_the_configuration_says_so(data: Path) -> None:
    ended = quarantine("retry", "--all", "--data-dir", data)
    assert "0 of 3 can be translated now" in ended.stderr
    assert "warning: source w is not in this configuration; the defaults were used" in ended.stderr


def test_retry_drops_what_is_understood_when_asked(data: Path, knowing: Path) -> None:
    assert answer("retry", "--all", "--drop-translated", "--config", knowing)["dropped"] == [1]
    assert [one.id for one in KeptEntries(data).listed()] == [2, 3]


def test_retry_of_a_payload_of_another_rank(tmp_path: Path) -> None:
    data = tmp_path / "data"
    keep(data, encode([1.5, [], 1]), rank=0)
    (entry,) = answer("retry", "--all", "--data-dir", data)["entries"]
    assert (entry["verdict"], entry["detail"]) == ("refused", "data-parallel rank is 1, this stream's is 0")


def test_retry_of_what_was_cut(tmp_path: Path) -> None:
    keep(tmp_path, encode([1.5, [{**STORED, "medium": "x" * 5000}]]), limits=QuarantineLimits(1 << 20, 168, 1000))
    (entry,) = answer("retry", "--all", "--data-dir", tmp_path)["entries"]
    assert entry["verdict"] == "cut"
    assert entry["detail"].startswith("only 1000 of ")


def test_drop(data: Path) -> None:
    assert quarantine("drop", 2, 2, "--data-dir", data).stdout == "1 dropped\n"
    assert [one.id for one in KeptEntries(data).listed()] == [1, 3]
    assert answer("drop", "--all", "--data-dir", data) == {"dropped": [1, 3]}
    assert answer("list", "--data-dir", data) == {"entries": []}


@pytest.mark.parametrize("command", ["retry", "drop"])
def test_entries_are_named_or_all_of_them(data: Path, command: str) -> None:
    for arguments in ([], [1, "--all"]):
        ended = quarantine(command, *arguments, "--data-dir", data)
        assert (ended.returncode, "give the IDs of entries, or --all" in ended.stderr) == (2, True)
    assert len(KeptEntries(data).listed()) == 3


@pytest.mark.parametrize("missing", [9, 2**63])
@pytest.mark.parametrize("arguments", [["show"], ["retry", 1], ["drop", 1]])
def test_an_entry_that_is_not_there(data: Path, arguments: list[object], missing: int) -> None:
    ended = quarantine(*arguments, missing, "--data-dir", data)
    assert (ended.returncode, ended.stderr) == (69, f"Error: no entry {missing}: see kvcensus quarantine list\n")
    assert len(KeptEntries(data).listed()) == 3


def test_a_directory_without_quarantine_is_an_empty_list(tmp_path: Path) -> None:
    ended = quarantine("list", "--data-dir", tmp_path)
    assert (ended.returncode, len(ended.stdout.splitlines())) == (0, 1)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    ended = quarantine("list", "--data-dir", tmp_path / "none")
    assert (ended.returncode, ended.stderr) == (69, f"Error: {tmp_path}/none: there is no data directory here\n")
    (tmp_path / QUARANTINE_FILE).write_bytes(b"nonsense" * 1000)
    ended = quarantine("list", "--data-dir", tmp_path)
    assert (ended.returncode, ended.stderr) == (74, f"Error: {tmp_path}/{QUARANTINE_FILE}: file is not a database\n")
    (tmp_path / "bad.toml").write_text("nonsense = 1\n")
    assert quarantine("list", "--config", tmp_path / "bad.toml").returncode == 78
