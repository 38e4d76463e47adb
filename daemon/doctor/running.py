"""Checks of a daemon that runs, and of its sources: as it says, or as a probe says where none runs. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ..probe.findings import BusFinding, ProbeFindings, StreamFinding
from ..status import StreamState, Trust
from .facts import Directory, Finding, Running, Verdict

_daemon = partial(Finding, "daemon")
_source = partial(Finding, "sources")

MOST_SHOWN = 20


def answers(running: Running, directory: Directory | None) -> Finding:
    """Whether there is one."""
    if not running.problem:
        return _daemon("http", Verdict.OK, f"answers at {running.address}")
    if not running.address:
        return _daemon("http", Verdict.OK, running.problem)
    if directory is not None and directory.owner_pid is not None:
        advice = "see http.listen, its token and its TLS settings, and its log"
        return _daemon("http", Verdict.PROBLEM, f"one runs and does not answer: {running.problem}", advice)
    return _daemon("http", Verdict.OK, f"none runs: {running.problem}")


def same_version(running: Running) -> Finding:
    """Whether the command and the daemon are one release."""
    if running.version == running.our_version:
        return _daemon("version", Verdict.OK, running.version)
    says = f"the daemon is {running.version}, this command {running.our_version}"
    return _daemon("version", Verdict.WARNING, says, "restart the daemon after an upgrade")


def ready(running: Running) -> list[Finding]:
    """What it says of itself."""
    readiness = running.readiness
    if readiness is None:
        return []
    if readiness.ready and not readiness.problems:
        return [_daemon("ready", Verdict.OK, "yes")]
    verdict = Verdict.WARNING if readiness.ready else Verdict.PROBLEM
    told = readiness.problems or ["it does not say why"]
    return [_daemon("ready", verdict, problem, "see docs/how-to/lmdb-hazards.md and its log") for problem in told]


def followed(running: Running) -> list[Finding]:
    """The sources of a running daemon."""
    if running.streams is None:
        return []
    found = []
    for stream in running.streams.streams:
        name = stream.stream
        if stream.state in (StreamState.CONNECTING, StreamState.DISCONNECTED):
            says = f"the daemon does not reach {stream.endpoint}"
            advice = "is the engine up and its endpoint right? kvcensus check --probe says more where no daemon runs"
            found.append(_source(name, Verdict.PROBLEM, says, advice))
        elif stream.trust is Trust.UNTRUSTED:
            advice = "reset the engine's prefix cache, or restart it: then its worker is trusted again"
            found.append(_source(name, Verdict.WARNING, f"untrusted: {stream.reason}", advice))
    found += [
        _source(bus.bus, Verdict.PROBLEM, bus.problem, "see docs/how-to/nats.md")
        for bus in running.streams.buses
        if bus.problem
    ]
    if not found:
        followed_ones = len(running.streams.streams)
        return [_source("streams", Verdict.OK, f"{followed_ones} followed, all reached")]
    return _few(found)


def probed(findings: ProbeFindings) -> list[Finding]:
    """The sources as a probe found them."""
    found: list[Finding] = []
    every: list[tuple[str, StreamFinding | BusFinding]] = [(one.stream, one) for one in findings.streams]
    every += [(one.bus, one) for one in findings.buses]
    for name, one in every:
        replay = one.replay.problem if isinstance(one, StreamFinding) and one.replay is not None else ""
        if not one.reached:
            says = one.problem or replay or "it is not reached"
            found.append(_source(name, Verdict.PROBLEM, says, "kvcensus check --probe has all that it found"))
        found += [
            _source(name, Verdict.WARNING, warning, "kvcensus check --probe has more") for warning in one.warnings
        ]
    return _few(found) or [_source("streams", Verdict.OK, f"{len(every)} reached")]


def _few(found: list[Finding]) -> list[Finding]:
    if len(found) <= MOST_SHOWN:
        return found
    rest = len(found) - MOST_SHOWN
    worst = sorted(found, key=lambda one: one.verdict is not Verdict.PROBLEM)[:MOST_SHOWN]
    verdict = Verdict.PROBLEM if any(one.verdict is Verdict.PROBLEM for one in found) else Verdict.WARNING
    return [*worst, _source("others", verdict, f"{rest} more like these", "begin with these")]


def daemon_findings(running: Running, directory: Directory | None) -> list[Finding]:
    """Every check of the daemon itself."""
    found = [answers(running, directory)]
    if not running.problem:
        found += [same_version(running), *ready(running)]
    return found


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict."""
    verdicts = {one.verdict for one in findings}
    return next((one for one in (Verdict.PROBLEM, Verdict.WARNING) if one in verdicts), Verdict.OK)
