"""The exact commands of the manifests, run as their containers would be: no engine, nothing writable but the volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .confined import PROGRAM, REPOSITORY, UNSHARE, why_not
from .manifests import Container, build, containers, needs_kustomize

pytestmark = [needs_kustomize, pytest.mark.skipif(bool(why_not()), reason=why_not())]


def container(example: str, name: str) -> Container:
    """The first of that name."""
    return next(one for one in containers(build(example)) if one.spec["name"] == name)


@pytest.mark.parametrize(
    ("example", "name", "paths"),
    [
        ("sidecar", "kvcensus", {"/livez": 200, "/readyz": 200, "/metrics": 200}),
        ("fleet", "kvcensus-relay", {"/livez": 200, "/readyz": 503, "/metrics": 200}),
        ("fleet", "kvcensus", {"/livez": 200, "/readyz": 503, "/metrics": 200}),
        ("agent", "kvcensus", {"/livez": 200, "/readyz": 200, "/metrics": 200}),
    ],
)
def test_a_container_starts_without_its_engine_answers_and_ends(example: str, name: str, paths: dict[str, int]) -> None:
    """Without NATS an index and a relay are alive and not ready; of a relay nobody asks whether it is."""
    one = container(example, name)
    context = one.pod["spec"].get("securityContext", {}) | one.spec["securityContext"]
    (volume,) = [mount["mountPath"] for mount in one.spec["volumeMounts"] if not mount.get("readOnly")]
    task = {
        "command": [str(PROGRAM), *one.arguments()],
        "environment": {"PATH": os.environ["PATH"], **one.environment()},
        "user": context["runAsUser"],
        "volumes": [volume],
        "files": one.files(),
        "port": one.spec["ports"][0]["containerPort"],
        "paths": list(paths),
        "readable": [sys.prefix, sys.base_prefix, str(REPOSITORY)],
    }
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(Path(__file__).with_name("confinement.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answers"] == paths, found["log"]
    assert found["exit"] == 0, found["log"]
    assert found["written"] == [volume]
