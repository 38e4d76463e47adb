"""The fleet of the manifests as processes: three NATS servers, a relay beside an engine, and an index of all.

Every command, port, name and file is that of the manifests. Only the addresses that the NATS servers listen on are
changed, and where they keep their files: they share one network here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..nats_servers import packaged_server
from .confined import PROGRAM, REPOSITORY, UNSHARE, why_not
from .manifests import DOWNWARD, build, containers, needs_kustomize, workloads

pytestmark = [needs_kustomize, pytest.mark.skipif(bool(why_not()), reason=why_not())]

_DATA = "/var/lib/kvcensus"
_RECORDING = REPOSITORY / "daemon" / "demo" / "vllm-0.32.0-evict.jsonl.gz"


def nats_servers(objects: tuple[dict[str, Any], ...]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Lines of /etc/hosts, files, and commands of the servers."""
    (nats,) = [one for one in workloads(objects) if one["metadata"]["name"] == "kvcensus-nats"]
    (settings,) = [one["data"]["nats.conf"] for one in objects if "nats.conf" in one.get("data", {})]
    name, peers = nats["metadata"]["name"], nats["spec"]["serviceName"]
    hosts, files, commands = [], {}, {}
    for number in range(nats["spec"]["replicas"]):
        address, folder = f"127.0.0.{number + 1}", f"{_DATA}/nats-{number}"
        hosts += [f"{address} {name}", f"{address} {name}-{number}.{peers}"]
        changed = settings.replace("0.0.0.0", address).replace("/data", folder)
        files[f"/etc/kvcensus/nats-{number}.conf"] = changed.replace("/run/nats/", f"{_DATA}/{number}-")
        command = [str(packaged_server()), f"--config=/etc/kvcensus/nats-{number}.conf"]
        commands[f"{name}-{number}"] = (command, {"POD_NAME": f"{name}-{number}"})
    return "\n".join(hosts), files, commands


def test_what_an_engine_publishes_is_in_the_index_of_the_fleet() -> None:
    objects = build("fleet")
    hosts, files, commands = nats_servers(objects)
    files |= {"/etc/hosts": f"127.0.0.1 localhost\n{hosts}\n", "/etc/nsswitch.conf": "hosts: files\n"}
    relay = next(one for one in containers(objects) if one.is_sidecar and one.command()[1]["engine_type"] == "vllm")
    index = next(one for one in containers(objects) if not one.is_sidecar)
    path = {"PATH": os.environ["PATH"]}
    engine = ["replay", str(_RECORDING), "--bind=tcp://127.0.0.1:5557", "--replay-bind=tcp://127.0.0.1:5657"]
    commands["engine"] = ([str(PROGRAM), *engine, "--speed=0"], path)
    commands["relay"] = ([str(PROGRAM), *relay.arguments()], path | relay.environment())
    commands["index"] = ([str(PROGRAM), *index.arguments()], path | index.environment())
    task = {
        "volumes": [_DATA],
        "files": files | index.files(),
        "readable": [sys.prefix, sys.base_prefix, str(REPOSITORY)],
        "commands": commands,
        "url": f"http://127.0.0.1:{index.spec['ports'][0]['containerPort']}/v1/workers",
        "workers": 1,
    }
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(Path(__file__).with_name("fleet.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["workers"]) == 1, found["logs"]
    (worker,) = found["workers"]
    assert worker["worker_id"].partition("/")[0] == DOWNWARD["metadata.name"]
    assert (worker["trust"], worker["blocks"] > 0) == ("fresh", True), found["logs"]
