"""Checks of the LMDB index: docs/how-to/lmdb-hazards.md has what each of them can do. Pure."""

from __future__ import annotations

from functools import partial

from ..top.words import share, size
from .facts import Directory, Finding, Index, Running, Settings, Verdict

_finding = partial(Finding, "index")

FULL = 0.9
FILLING = 0.5
LAG_MAX = 1_000
"""Commits: where the daemon begins to warn."""


def readable(index: Index, path: str) -> Finding:
    """Whether it is an index of this version, and sound as far as a short look can tell."""
    if not index.exists:
        return _finding("file", Verdict.OK, "there is none yet: the first start makes it")
    if index.problem == "format":
        advice = "use the version that wrote it, or move it aside: the engines fill a new one"
        return _finding("file", Verdict.PROBLEM, index.detail, advice)
    if index.problem == "corrupt":
        return _finding("file", Verdict.PROBLEM, index.detail, "stop the daemon, and do what it says")
    if index.problem:
        return _finding("file", Verdict.PROBLEM, index.detail, "see docs/how-to/lmdb-hazards.md")
    if not index.opened:
        return _finding("file", Verdict.OK, f"{size(index.file)}; it was not opened, since nobody has it open")
    says = f"{size(index.file)}, {size(index.live)} in use, of the schema of this version"
    return _finding("file", Verdict.OK, says)


def fullness(index: Index, settings: Settings) -> Finding:
    """How near the map is to its end."""
    used, limit = index.live, settings.map_size
    if index.exists and not index.opened:
        return _finding("map", Verdict.OK, "it was not opened")
    says = f"{share(used, limit)} of {size(limit)}"
    if limit and used >= FULL * limit:
        return _finding("map", Verdict.PROBLEM, f"{says} is used", "raise index.map_size_bytes and restart")
    if limit and used >= FILLING * limit:
        advice = "raise index.map_size_bytes: a commit needs room for every page that it touches a second time"
        return _finding("map", Verdict.WARNING, f"{says} is used", advice)
    return _finding("map", Verdict.OK, f"{says} is used")


def lock_file(index: Index, directory: Directory) -> Finding:
    """A lock file that is deleted under a daemon lets the next process read what is written over."""
    if index.exists and not index.has_lock_file and directory.owner_pid is not None:
        says = "index.mdb-lock is gone while a daemon runs"
        return _finding("lock file", Verdict.PROBLEM, says, "restart the daemon, and let nobody delete that file")
    return _finding("lock file", Verdict.OK, "in place" if index.has_lock_file else "not needed yet")


def readers(index: Index, directory: Directory) -> Finding:
    """Who keeps old pages. Where the owner cannot be seen, neither can others: then nobody is called dead."""
    dead = [one.pid for one in index.readers if not one.alive and directory.owner_pid is not None]
    slow = [one for one in index.readers if one.lag is not None and one.lag > LAG_MAX]
    if slow:
        worst = max(slow, key=lambda one: one.lag or 0)
        says = f"process {worst.pid} reads what is {worst.lag} commits old: every page freed since is kept"
        return _finding(
            "readers", Verdict.WARNING, says, f"end process {worst.pid}; the file does not shrink by itself"
        )
    if dead:
        says = f"{len(dead)} of {len(index.readers)} have ended without leaving, such as process {dead[0]}"
        return _finding("readers", Verdict.WARNING, says, "nothing to do: a running daemon lets them go")
    return _finding("readers", Verdict.OK, f"{len(index.readers)}, none that holds pages back")


def owner(directory: Directory, running: Running) -> Finding:
    """Who writes it, and whether that process can be seen from here."""
    answers = not running.problem
    if directory.owner_pid is not None:
        says = f"process {directory.owner_pid} writes it"
        if answers or not running.address:
            return _finding("owner", Verdict.OK, says)
        advice = f"see its log, and whether it listens at {running.address}: the next daemon here ends with 75"
        return _finding("owner", Verdict.WARNING, f"{says}, and no daemon answers", advice)
    if answers and running.loopback:
        says = f"a daemon answers at {running.address}, and no process that can be seen from here has the directory"
        advice = (
            "is it the daemon of this directory? Then it is in another PID namespace, where LMDB mistakes processes "
            "for one another: give the pod shareProcessNamespace: true"
        )
        return _finding("owner", Verdict.WARNING, says, advice)
    return _finding("owner", Verdict.OK, "nobody has it")


def crash(index: Index, settings: Settings) -> Finding:
    """What the last writer left, and whether it is believed."""
    if index.machine_crashed:
        says = "the machine went down while it was written without syncing: the next start deletes it"
        advice = 'nothing to do; with index.durability = "consistent" it would survive'
        return _finding("durability", Verdict.WARNING, says, advice)
    if index.durability not in (None, settings.durability):
        says = f"it was written with {index.durability}, and the configuration says {settings.durability}"
        return _finding("durability", Verdict.OK, f"{says}, from the next start on")
    return _finding("durability", Verdict.OK, settings.durability)


def suspicion(index: Index) -> Finding:
    """Whether the next start looks at all of it."""
    if not index.suspect:
        return _finding("last end", Verdict.OK, "without a note of damage")
    first = index.suspect.splitlines()[0][:200]
    says = f"a process that used it left a note: {first}"
    return _finding(
        "last end", Verdict.WARNING, says, "look now with kvcensus verify; else the next start does, and takes long"
    )


def index_findings(index: Index, directory: Directory, settings: Settings, running: Running) -> list[Finding]:
    """Every check of the index."""
    return [
        readable(index, directory.path),
        fullness(index, settings),
        lock_file(index, directory),
        readers(index, directory),
        owner(directory, running),
        crash(index, settings),
        suspicion(index),
    ]
