"""The command line as a process: what it imports, how it ends, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcensus.daemon.cli import COMMANDS
from kvcensus.daemon.cli.asking import DEFAULT_HTTP
from kvcensus.daemon.config import HttpConfig

CAPTURES = Path(__file__).parents[1] / "captures"
KVCENSUS = [sys.executable, "-m", "kvcensus.daemon.cli"]
HEAVY = {"aiohttp", "lmdb", "msgspec", "nats", "prometheus_client", "rich", "structlog", "textual", "zmq"}
NOBODY = "127.0.0.1:1"


def kvcensus(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVCENSUS, *arguments], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


def imported_by(*arguments: str) -> set[str]:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *KVCENSUS[1:], *arguments], capture_output=True, text=True, check=False
    )
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["query", "workers", "--http", NOBODY], ["completion", "bash"]]
)
def test_what_needs_no_library_imports_none(arguments: list[str]) -> None:
    imported = imported_by(*arguments)
    assert "click" in imported
    assert not imported & HEAVY


def test_help_names_every_command() -> None:
    for flag in ("-h", "--help"):
        shown = kvcensus(flag)
        assert shown.returncode == 0
        assert all(f"  {name} " in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    shown = kvcensus(name, "-h")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"Usage: python -m kvcensus.daemon.cli {name} ")


def test_an_unknown_command_is_an_error_of_usage() -> None:
    ended = kvcensus("rnu")
    assert ended.returncode == 2
    assert "No such command 'rnu'" in ended.stderr


def test_the_default_address_is_that_of_the_daemon() -> None:
    assert HttpConfig().listen == DEFAULT_HTTP


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef kvcensus"), ("fish", "complete ")]
)
def test_completion_prints_the_script_of_a_shell(shell: str, word: str) -> None:
    shown = kvcensus("completion", shell)
    assert shown.returncode == 0
    assert word in shown.stdout
    assert "_KVCENSUS_COMPLETE" in shown.stdout


def test_completion_offers_commands_without_importing_them(tmp_path: Path) -> None:
    code = (
        "import sys; from kvcensus.daemon.cli import main\n"
        "try: main(prog_name='kvcensus')\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    environ = {"_KVCENSUS_COMPLETE": "bash_complete", "COMP_WORDS": "kvcensus rec", "COMP_CWORD": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert ended.stdout.split() == ["plain,record"]
    assert "kvcensus.daemon.cli.record" not in ended.stderr


def test_check_says_what_would_run(tmp_path: Path) -> None:
    file = tmp_path / "kvcensus.toml"
    file.write_text(
        "[[sources]]\nname='engine'\nendpoint='tcp://0.0.0.0:5557'\nreplay_endpoint='tcp://e:5657'\nranks=2\n"
        "replay_attempts=7\nmedia={odd='hbm'}\n"
    )
    shown = kvcensus("check", "--config", file, KVCENSUS__HTTP__LISTEN="localhost:1234")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == f"{file}: ok"
    assert any(line.split() == ["http.listen", "localhost:1234"] for line in lines)
    assert lines[-1].split() == [
        *("engine/1", "vllm", "tcp://0.0.0.0:5558", "connect", "tcp://e:5658", "-", "-"),
        *('media={"odd":"hbm"}', "replay_attempts=7"),
    ]
    assert shown.stderr.startswith("warning: source engine: tcp://0.0.0.0:5557 ")

    printed = json.loads(kvcensus("check", "--config", file, "--json").stdout)
    assert [stream["stream"] for stream in printed["streams"]] == ["engine/0", "engine/1"]
    assert printed["config"]["sources"][0]["media"] == {"odd": "hbm"}
    assert len(printed["warnings"]) == 1


def test_check_names_the_line_the_key_and_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "kvcensus.toml"
    file.write_text("[http]\n\nlisten = 'x'\n")
    ended = kvcensus("check", "--config", file)
    assert ended.returncode == 78
    assert ended.stdout == ""
    assert ended.stderr == f"Error: {file}:3: http.listen: 'x' is not HOST:PORT\n"


@pytest.mark.parametrize(
    "arguments",
    [["match", "00"], ["locate", "00"], ["children", "--model", "m"], ["workers"], ["streams"]],
    ids=lambda arguments: arguments[0],
)
def test_a_daemon_that_is_not_there(arguments: list[str]) -> None:
    ended = kvcensus("query", *arguments, "--http", NOBODY)
    assert ended.returncode == 69
    assert ended.stderr.startswith(f"Error: http://{NOBODY}/v1/")
    assert ended.stderr.endswith(": Connection refused\n")


@pytest.mark.parametrize("address", ["localhost", "ftp://localhost:1", "localhost:x", "http://:1"])
def test_an_address_that_is_none(address: str) -> None:
    ended = kvcensus("query", "workers", "--http", address)
    assert ended.returncode == 2
    assert "Invalid value for --http" in ended.stderr


def test_snapshot_of_a_directory_without_an_index(tmp_path: Path) -> None:
    ended = kvcensus("snapshot", "--data-dir", tmp_path)
    assert ended.returncode == 69
    assert ended.stderr == f"Error: {tmp_path}/index.mdb: there is no index here\n"


def replaying(path: Path, *arguments: str, **options: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*KVCENSUS, "replay", str(path), *arguments],
        stdout=options.get("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
    )


def addresses(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    printed = process.stdout.readline()
    assert printed, process.communicate()[1]
    answer: dict[str, str] = json.loads(printed)
    return answer


@pytest.mark.parametrize("name", ["copy.jsonl", "copy.jsonl.gz"])
def test_a_replay_that_is_recorded_gives_the_recording_again(tmp_path: Path, name: str) -> None:
    from kvcensus.daemon.recording import Recording

    capture, copy = CAPTURES / "vllm-0.32.0-restart.jsonl.gz", tmp_path / name
    replay = replaying(capture, "--speed", "0", "--linger-seconds", "0")
    recorded = kvcensus("record", addresses(replay)["endpoint"], copy, "--max-messages", "101")
    assert recorded.returncode == 0
    assert recorded.stderr == f"{copy}: 101 messages, 0 missing, 1 restarts\n"
    assert replay.communicate(timeout=30)[1] == "published 101 messages\n"
    assert replay.returncode == 0
    assert [one.frames for one in Recording(copy)] == [one.frames for one in Recording(capture)]


def test_a_recorder_that_binds_and_an_engine_that_connects(tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    path = f"ipc://{tmp_path}/engine.sock"
    replay = replaying(CAPTURES / "vllm-0.32.0-dups.jsonl.gz", "--speed", "0", "--connect", path, "--replay-bind", "")
    recorded = kvcensus("record", path, copy, "--bind", "--max-messages", "54")
    assert recorded.returncode == 0, recorded.stderr
    assert addresses(replay) == {"endpoint": path, "replay_endpoint": ""}
    replay.terminate()
    assert replay.wait(30) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_replay_and_a_recording_whole(tmp_path: Path, number: int, code: int) -> None:
    import gzip

    copy = tmp_path / "copy.jsonl.gz"
    replay = replaying(CAPTURES / "vllm-0.32.0-dups.jsonl.gz", "--speed", "0", "--loop", "2")
    record = subprocess.Popen(
        [*KVCENSUS, "record", addresses(replay)["endpoint"], copy], stderr=subprocess.PIPE, text=True
    )
    assert replay.stderr is not None
    assert replay.stderr.readline() == "published 108 messages\n"
    deadline = time.monotonic() + 10
    while not copy.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    record.send_signal(number)
    replay.send_signal(number)
    assert (record.wait(30), replay.wait(30)) == (code, code)
    assert record.communicate()[1] == f"{copy}: 108 messages, 0 missing, 1 restarts\n"
    assert gzip.decompress(copy.read_bytes()).count(b"\n") == 108
    assert replay.communicate()[1] == ""


def test_record_ends_after_its_duration(tmp_path: Path) -> None:
    ended = kvcensus("record", f"tcp://{NOBODY}", tmp_path / "copy.jsonl", "--duration", "0.2")
    assert ended.returncode == 0
    assert ended.stderr == f"{tmp_path}/copy.jsonl: 0 messages, 0 missing, 0 restarts\n"


def test_record_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_text("precious")
    ended = kvcensus("record", f"tcp://{NOBODY}", tmp_path / "copy.jsonl", "--duration", "0.2")
    assert ended.returncode == 74
    assert "exists already; it is not overwritten" in ended.stderr
    assert (tmp_path / "copy.jsonl").read_text() == "precious"


def test_record_and_replay_refuse_what_is_no_endpoint(tmp_path: Path) -> None:
    assert "is not tcp://HOST:PORT" in kvcensus("record", "engine:1", tmp_path / "copy").stderr
    assert "is not tcp://HOST:PORT" in kvcensus("replay", CAPTURES / "README.md", "--bind", "engine:1").stderr
    assert "neither a number" in kvcensus("replay", CAPTURES / "README.md", "--loop", "often").stderr


def test_replay_of_what_is_no_recording(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n")
    ended = kvcensus("replay", bad, "--wait-subscribers", "0", "--speed", "0")
    assert ended.returncode == 65
    assert ended.stderr.startswith(f"Error: {bad}:1: is no recorded message: ")


def test_replay_gives_up_on_subscribers_that_do_not_come() -> None:
    ended = kvcensus("replay", CAPTURES / "vllm-0.32.0-dups.jsonl.gz", "--wait-timeout-seconds", "0.2")
    assert ended.returncode == 69
    assert ended.stderr == "Error: 0 of 1 subscribers after 0.2 s\n"


def test_replay_of_an_address_that_is_taken() -> None:
    capture = CAPTURES / "vllm-0.32.0-dups.jsonl.gz"
    first = replaying(capture)
    second = kvcensus("replay", capture, "--bind", addresses(first)["endpoint"])
    first.terminate()
    assert first.wait(30) == 0
    assert second.returncode == 74
    assert "Address already in use" in second.stderr


def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [*KVCENSUS, "completion", "zsh"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert ended.returncode == 141
    assert ended.stderr == ""


def test_output_that_cannot_be_written_is_an_error_without_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*KVCENSUS, "completion", "zsh"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 74
    assert ended.stderr.splitlines()[0] == "Error: [Errno 28] No space left on device"
    assert "Traceback" not in ended.stderr


def test_record_shows_its_progress_on_a_terminal(tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    ended = subprocess.run(
        [*KVCENSUS, "record", f"tcp://{NOBODY}", tmp_path / "copy.jsonl", "--duration", "0.3"],
        stderr=inner,
        check=False,
    )
    os.close(inner)
    assert ended.returncode == 0
    assert b"recording" in os.read(outer, 65536)
    os.close(outer)
