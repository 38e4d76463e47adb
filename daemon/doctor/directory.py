"""Checks of the data directory: who may use it, who does, and what lies about in it. Pure."""

from __future__ import annotations

from functools import partial

from ..top.words import size
from .facts import Directory, Finding, Verdict

_finding = partial(Finding, "permissions")
_OTHERS_MAY_WRITE = 0o022
_OTHERS_MAY_READ = 0o055


def usable(directory: Directory) -> Finding:
    """Whether we could write into it."""
    path = directory.path
    if not directory.exists:
        if directory.writable:
            return _finding("data directory", Verdict.OK, f"{path} is not there yet and can be made")
        says = f"{path} is no directory that user {directory.our_uid} can see, and cannot be made"
        return _finding("data directory", Verdict.PROBLEM, says, "run as the daemon's user, or make it for that user")
    if not directory.writable:
        says = f"{path} cannot be written by user {directory.our_uid}: it belongs to {directory.uid}"
        advice = "run as the daemon's user, or give it the directory with chown -R"
        return _finding("data directory", Verdict.PROBLEM, says, advice)
    if directory.uid != directory.our_uid:
        says = f"{path} belongs to user {directory.uid}, and this is {directory.our_uid}"
        advice = "run the doctor and the daemon as the same user: what root makes, others cannot open"
        return _finding("data directory", Verdict.WARNING, says, advice)
    return _finding("data directory", Verdict.OK, f"{path} is ours to write")


def closed(directory: Directory) -> Finding:
    """Whether others can look into it, or change it."""
    if not directory.exists:
        return _finding("mode", Verdict.OK, "it will be made with mode 0700")
    says = f"mode {directory.mode & 0o777:04o}"
    if directory.mode & _OTHERS_MAY_WRITE:
        return _finding("mode", Verdict.PROBLEM, f"{says}: others may write into it", f"chmod 700 {directory.path}")
    if directory.mode & _OTHERS_MAY_READ:
        return _finding("mode", Verdict.WARNING, f"{says}: others may look into it", f"chmod 700 {directory.path}")
    return _finding("mode", Verdict.OK, says)


def one_owner(directory: Directory) -> Finding:
    """Whether every file belongs to the user of the directory."""
    if not directory.of_others:
        return _finding("files", Verdict.OK, "all belong to one user")
    says = f"{', '.join(directory.of_others[:5])} belong to another user than the directory"
    advice = f"a command was run as root: chown -R {directory.uid} {directory.path}"
    return _finding("files", Verdict.PROBLEM, says, advice)


def leftovers(directory: Directory) -> Finding:
    """What takes room and is needed by nobody."""
    if not directory.leftovers:
        return _finding("leftovers", Verdict.OK, "none")
    total = sum(amount for _, amount in directory.leftovers)
    names = ", ".join(name for name, _ in directory.leftovers[:3])
    says = f"{names}: {size(total)}"
    return _finding("leftovers", Verdict.WARNING, says, "delete what was looked at; copies for snapshots go at a start")


def directory_findings(directory: Directory) -> list[Finding]:
    """Every check of the directory."""
    return [usable(directory), closed(directory), one_owner(directory), leftovers(directory)]
