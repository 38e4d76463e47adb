"""The units under a real systemd: installed as docs/how-to/systemd.md says, started, reloaded, killed, wedged, stopped.

    sudo .venv/bin/python tests/drills/systemd.py

It needs root, systemd, Debian's python3, and namespaces. The systemd is the first process of a copy of this machine
whose changes are in memory (systemd_host.sh); nothing of it is left. A simulated engine outside is the truth.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
PORT = 19480
WAIT_S = 60.0
EXPOSURE_MAX = 1.5
DAEMON = "kvcensus.service"
WATCHDOG = "[Service]\nWatchdogSec=4s\n"
SHORT_START = "[Service]\nTimeoutStartSec=8s\n"
LARGE_INDEX = """
import sys
from pathlib import Path
from kvcensus.backends.lmdb import LmdbBackend
from kvcensus.backends.lmdb.files import SUSPECT_FILE
from kvcensus.backends.model import ROOT, CacheTier, IdentityScope, StoreRun
index = LmdbBackend(Path(sys.argv[1]))
for first in range(1 << 40, (1 << 40) + 3_000_000, 10_000):
    runs = [range(start, start + 50) for start in range(first, first + 10_000, 50)]
    hashes = [tuple(number.to_bytes(8, "big") for number in run) for run in runs]
    index.apply([StoreRun("old", None, IdentityScope("m", "t"), CacheTier.HBM, one, ROOT, 0, 16, 0) for one in hashes])
index.close()
Path(sys.argv[1], SUSPECT_FILE).write_text("the drill")
"""
SHORT_STOP = "[Service]\nTimeoutStopSec=2s\n"
HOLD_INDEX = """
import sys, time
from pathlib import Path
import lmdb
index = lmdb.open(sys.argv[1], subdir=False, max_dbs=16, map_size=1 << 40)
with index.begin(write=True):
    Path("/run/held").touch()
    time.sleep(6)
"""
SECRET = "[Service]\nLoadCredential=tokens:/etc/kvcensus/secrets/tokens\n"


class Machine:
    """The copy of this machine that its own systemd runs."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", "-t", str(pid), "--mount", "--pid", "--uts", "--ipc", "--cgroup", "-r", "-w"]

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run([*self._enter, *command], capture_output=True, text=True, timeout=300, check=False)
        if check and done.returncode:
            journal = self.run("journalctl", "-n", "40", "--no-pager", "-o", "short", check=False)
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}{journal}")
        return done.stdout.strip()

    def write(self, path: str, text: str) -> None:
        self.run("install", "-D", "-m", "0644", "/dev/null", path)
        subprocess.run([*self._enter, "tee", path], input=text, text=True, stdout=subprocess.DEVNULL, check=True)

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit)

    def drop_in(self, name: str, text: str) -> None:
        self.write(f"/etc/systemd/system/{DAEMON}.d/{name}.conf", text)
        self.run("systemctl", "daemon-reload")


@contextmanager
def machine() -> Iterator[Machine]:
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"]
    with tempfile.TemporaryDirectory() as place, Path(place, "console").open("wb") as console:
        host = subprocess.Popen(
            [*namespaces, "sh", str(Path(__file__).with_name("systemd_host.sh")), place],
            stdout=console,
            stderr=console,
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: bool(children(host.pid)), "the namespaces are made")
            one = Machine(children(host.pid)[0])
            wait_until(
                lambda: one.run("systemctl", "is-system-running", check=False) in ("running", "degraded"),
                "it has booted",
            )
            yield one
        finally:
            host.kill()
            host.wait()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def engine() -> Iterator[dict[str, Any]]:
    command = ["simulate", "--engines", "2", "--ranks", "1", "--rate", "200", "--truth", "0", "--seed", "7"]
    with subprocess.Popen([sys.executable, "-m", "kvcensus.daemon.cli", *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up waiting: {what}")
        time.sleep(0.1)


def told(step: str) -> None:
    print(f"ok  {step}", flush=True)


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: {found!r}, not {wanted!r}")


def ask(path: str, token: str = "", port: int = PORT) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def answers(port: int = PORT) -> bool:
    try:
        return bool(ask("/livez", port=port))
    except OSError:
        return False


def source(rank: dict[str, Any], name: str) -> str:
    endpoints = f"endpoint = '{rank['endpoint']}'\nreplay_endpoint = '{rank['replay_endpoint']}'\n"
    return f"[[sources]]\nname = '{name}'\n{endpoints}"


def config(*sources: str, more: str = "", port: int = PORT) -> str:
    return f"[http]\nlisten = '127.0.0.1:{port}'\n{more}\n{''.join(sources)}"


def last_seq(name: str) -> int:
    seqs = [one["last_seq"] for one in ask("/v1/streams")["streams"] if one["source"] == name]
    return int(seqs[0]) if seqs else -1


def is_fresh(name: str) -> bool:
    return any(one["source"] == name and one["trust"] == "fresh" for one in ask("/v1/streams")["streams"])


def install(one: Machine) -> None:
    """The commands of docs/how-to/systemd.md."""
    if subprocess.run(["/usr/bin/python3", "-c", "import ensurepip"], check=False).returncode:
        one.run("sh", "-c", "apt-get update -qq && apt-get install -y -qq python3-venv")
    one.run("/usr/bin/python3", "-m", "venv", "/opt/kvcensus")
    environment = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))]
    one.run("sh", "-c", f"mkdir /tmp/source && git -C {ROOT} archive HEAD | tar -x -C /tmp/source")
    one.run("env", *environment, "/opt/kvcensus/bin/pip", "install", "--quiet", "/tmp/source")
    for unit in UNITS.glob("*.service"):
        one.run("install", "-m", "0644", str(unit), "/etc/systemd/system/")
    one.run("systemctl", "daemon-reload")


def starts(one: Machine, ranks: list[dict[str, Any]]) -> None:
    one.write("/etc/kvcensus/kvcensus.toml", config(source(ranks[0], "gpu-1")))
    one.run("systemctl", "start", DAEMON)
    expect("after the start", one.show(DAEMON, "ActiveState"), "active")
    expect("it answers as soon as it is started", answers(), True)
    wait_until(lambda: last_seq("gpu-1") > 0, "messages are applied")
    wait_until(lambda: one.show(DAEMON, "StatusText").startswith("workers: 1 fresh"), "the status says how it goes")
    told(f"started, ready, status: {one.show(DAEMON, 'StatusText')}")
    user = one.run("ps", "-o", "user=", "-p", one.show(DAEMON, "MainPID"))
    if user in ("root", "0"):
        raise SystemExit("it runs as root")
    lines = one.run("systemd-analyze", "security", "--no-pager", DAEMON).splitlines()
    exposure = float(lines[-1].partition(": ")[2].split()[0])
    if exposure > EXPOSURE_MAX:
        raise SystemExit(f"exposure {exposure}")
    told(f"user {user}, exposure {exposure}")


def reloads(one: Machine, ranks: list[dict[str, Any]]) -> None:
    one.write("/etc/kvcensus/kvcensus.toml", config(source(ranks[0], "gpu-1"), source(ranks[1], "gpu-2")))
    one.run("systemctl", "reload", DAEMON)
    wait_until(lambda: last_seq("gpu-2") > 0, "the new source is followed")
    expect("after a reload", one.show(DAEMON, "NRestarts"), "0")
    told("reloaded: a source more, no restart")


def survives_kills(one: Machine) -> None:
    before = last_seq("gpu-1")
    one.run("kill", "-9", one.show(DAEMON, "MainPID"))
    wait_until(lambda: one.show(DAEMON, "NRestarts") == "1" and answers(), "it is started again")
    wait_until(lambda: last_seq("gpu-1") > before and is_fresh("gpu-1"), "it goes on from its cursor")
    told("kill -9: started again, fresh")


def watchdog_bites(one: Machine) -> None:
    one.drop_in("watchdog", WATCHDOG)
    one.run("systemctl", "restart", DAEMON)
    wait_until(answers, "it answers")
    time.sleep(6)
    expect("a process that goes on is left alone", one.show(DAEMON, "NRestarts"), "0")
    one.run("kill", "-STOP", one.show(DAEMON, "MainPID"))
    wait_until(lambda: one.show(DAEMON, "NRestarts") == "1" and answers(), "the watchdog has ended it")
    said = one.run("journalctl", "-u", DAEMON, "-o", "cat")
    expect("the journal says why", "Watchdog timeout" in said, True)
    told("a stopped process: ended by the watchdog, started again")


def starts_for_long(one: Machine) -> None:
    """Three million blocks of an index that is suspected, and a time for starts that is not enough."""
    one.run("systemctl", "stop", DAEMON)
    data = "/var/lib/private/kvcensus"
    one.run("/opt/kvcensus/bin/python", "-c", LARGE_INDEX, data)
    one.run("chown", "-R", f"--reference={data}", data)
    one.drop_in("start", SHORT_START)
    began_s = time.monotonic()
    one.run("systemctl", "start", DAEMON)
    took_s = time.monotonic() - began_s
    if took_s < 10:
        raise SystemExit(f"the start took {took_s:.1f} s: that was not long enough to show anything")
    expect("starts", one.show(DAEMON, "NRestarts"), "0")
    told(f"a start of {took_s:.0f} s, with TimeoutStartSec=8s: more time was asked for and given")
    one.drop_in("start", "")


def stops_for_long(one: Machine) -> None:
    """What is queued cannot be written for six seconds, and a time for stops that is not enough."""
    one.drop_in("stop", SHORT_STOP)
    index = "/var/lib/private/kvcensus/index.mdb"
    one.run("systemd-run", "--quiet", "/opt/kvcensus/bin/python", "-c", HOLD_INDEX, index)
    wait_until(lambda: one.run("ls", "/run/held", check=False) != "", "somebody else has the index")
    began_s = time.monotonic()
    one.run("systemctl", "stop", DAEMON)
    took_s = time.monotonic() - began_s
    expect("after a long stop", one.show(DAEMON, "Result"), "success")
    if took_s < 3:
        raise SystemExit(f"the stop took {took_s:.1f} s: that was not long enough to show anything")
    told(f"a stop of {took_s:.0f} s, with TimeoutStopSec=2s: what was queued is committed")
    one.drop_in("stop", "")


def reads_its_secrets(one: Machine, ranks: list[dict[str, Any]]) -> None:
    one.write("/etc/kvcensus/secrets/tokens", "0123456789abcdef0123456789abcdef\n")
    one.run("chmod", "-R", "go=", "/etc/kvcensus/secrets")
    one.drop_in("secrets", SECRET)
    more = f"token_file = '/run/credentials/{DAEMON}/tokens'"
    one.write("/etc/kvcensus/kvcensus.toml", config(source(ranks[0], "gpu-1"), more=more))
    one.run("systemctl", "restart", DAEMON)
    wait_until(answers, "it answers")
    try:
        ask("/v1/streams")
    except urllib.error.HTTPError as error:
        expect("without the token", error.code, 401)
    else:
        raise SystemExit("it answers without the token")
    expect("with the token", len(ask("/v1/streams", "0123456789abcdef0123456789abcdef")["streams"]), 1)
    told("a token that only root can read")


def says_what_is_wrong(one: Machine) -> None:
    began_s = time.monotonic()
    one.run("systemctl", "stop", DAEMON)
    told(f"stopped in {time.monotonic() - began_s:.1f} s, {one.show(DAEMON, 'Result')}")
    expect("after the stop", one.show(DAEMON, "Result"), "success")
    one.write("/etc/kvcensus/kvcensus.toml", "nonsense = 1\n")
    one.run("systemctl", "start", DAEMON, check=False)
    wait_until(lambda: one.show(DAEMON, "ActiveState") == "failed", "it gives up")
    expect("exit code", one.show(DAEMON, "ExecMainStatus"), "78")
    expect("starts", one.show(DAEMON, "NRestarts"), "0")
    warnings = one.run("journalctl", "-u", DAEMON, "-p", "warning", "-o", "cat").splitlines()
    infos = [line for line in warnings if '"level": "info"' in line]
    expect("lines of priority warning and above that are none", infos, [])
    told("a wrong configuration: exit 78, not started again; journalctl -p warning shows warnings only")


def other_units(one: Machine, ranks: list[dict[str, Any]]) -> None:
    one.write("/etc/kvcensus/blue.toml", config(source(ranks[0], "gpu-1"), port=PORT + 1))
    one.write(
        "/etc/kvcensus/relay.toml",
        config(
            source(ranks[1], "gpu-2"),
            port=PORT + 2,
            more="[relay]\nstream = 'KV'\n[relay.connection]\nservers = ['nats://127.0.0.1:9']",
        ),
    )
    for unit, port in (("kvcensus@blue.service", PORT + 1), ("kvcensus-relay.service", PORT + 2)):
        one.run("systemctl", "start", unit)
        expect(f"{unit} after the start", one.show(unit, "ActiveState"), "active")
        expect(f"{unit} answers", answers(port), True)
        one.run("systemctl", "reload", unit)
        wait_until(lambda unit=unit: '"reloaded"' in one.run("journalctl", "-u", unit, "-o", "cat"), "it has reloaded")  # type: ignore[misc]
        expect(f"{unit} answers after a reload", answers(port), True)
        expect(f"{unit} after a reload", one.show(unit, "NRestarts"), "0")
        one.run("systemctl", "stop", unit)
        expect(f"{unit} after the stop", one.show(unit, "Result"), "success")
    told("an instance of the template, and a relay without its bus: started, reloaded and stopped")


def main() -> None:
    if os.geteuid() or not shutil.which("unshare") or not Path("/lib/systemd/systemd").exists():
        raise SystemExit("this drill needs root, unshare and systemd")
    with machine() as one, engine() as engines:
        ranks = [rank for each in engines["engines"] for rank in each["ranks"]]
        told(one.run("systemctl", "--version").splitlines()[0])
        install(one)
        starts(one, ranks)
        reloads(one, ranks)
        survives_kills(one)
        watchdog_bites(one)
        starts_for_long(one)
        stops_for_long(one)
        reads_its_secrets(one, ranks)
        says_what_is_wrong(one)
        other_units(one, ranks)


if __name__ == "__main__":
    main()
