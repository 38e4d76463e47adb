"""Runs a command as the kubelet would start a container: own network, read-only root, no capability, another user.

Started as `unshare --mount --net --propagation private python confinement.py`, with a JSON object on stdin: `command`,
`environment`, `user`, `volumes` (paths of empty writable directories), `files` (path to content, each folder of them a
mount of its own), `port`, `paths` (to ask until they answer) and
`readable` (paths that the user must be able to read, though a directory above is closed to it). Stops the command with
SIGTERM, and prints a JSON object: `written` (paths that can be written to), `answers` (path to status), `exit`, `log`.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_WAIT_S = 60.0
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_MUST_STAY = ("/proc", "/sys", "/dev")


def confine(volumes: list[str], files: dict[str, str], readable: list[str]) -> None:
    """In a mount and a network namespace of its own: loopback up, volumes in their places, all else read-only."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    _open_ways(readable)
    for volume in [*volumes, *sorted({str(Path(path).parent) for path in files})]:
        _mount_volume(Path(volume))
    for path, text in files.items():
        Path(path).write_text(text)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4].encode().decode("unicode_escape")
        is_in_sight = os.path.ismount(place)
        if is_in_sight and place not in volumes and not place.startswith(_MUST_STAY):
            _mount("-o", "remount,bind,ro", place)


def _mount_volume(volume: Path) -> None:
    """Leaves no directory behind on the disk."""
    if not volume.exists():
        _mount("-t", "tmpfs", "-o", "mode=0755", "open", str(next(one for one in volume.parents if one.exists())))
        volume.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "mode=0777", "volume", str(volume))


def _open_ways(paths: list[str]) -> None:
    """Put an open directory over every closed one above a path, with only these paths in it."""
    aside = Path("/mnt")
    _mount("-t", "tmpfs", "aside", str(aside))
    closed: dict[Path, list[Path]] = {}
    for path in {Path(path).resolve() for path in paths}:
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(path)
                break
    for number, (above, inside) in enumerate(closed.items()):
        kept = aside / str(number)
        kept.mkdir()
        _mount("--rbind", str(above), str(kept))
        _mount("-t", "tmpfs", "-o", "mode=0755", "open", str(above))
        for path in inside:
            path.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", str(kept / path.relative_to(above)), str(path))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def run(task: dict[str, Any]) -> dict[str, Any]:
    confine(task["volumes"], task["files"], task["readable"])
    limits = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--clear-groups"]
    confined = ["setpriv", f"--reuid={task['user']}", f"--regid={task['user']}", *limits]
    probe = "import os,sys; print(*(p for p in sys.argv[1:] if os.access(p, os.W_OK)))"
    places = ["/", "/tmp", "/var/tmp", os.getcwd(), *task["volumes"]]
    written = subprocess.run([*confined, sys.executable, "-c", probe, *places], capture_output=True, text=True)
    log = Path("/dev/shm") / f"confined-{os.getpid()}"
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*confined, *task["command"]], env=task["environment"], stdout=out, stderr=out, cwd="/"
            )
        answers = {path: _answer(process, task["port"], path) for path in task["paths"]}
        process.send_signal(signal.SIGTERM)
        code = process.wait(_WAIT_S)
        return {"written": written.stdout.split(), "answers": answers, "exit": code, "log": log.read_text()}
    finally:
        log.unlink()


def _answer(process: subprocess.Popen[bytes], port: int, path: str) -> int:
    """The status, once there is one; 0 when the process has ended."""
    deadline = time.monotonic() + _WAIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            time.sleep(0.05)
    return 0


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
