"""What kustomize makes of the manifests, and the containers in it as the kubelet would start them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from kvcensus.daemon.cli import main
from kvcensus.daemon.config import Config, config_from_flags, load_config

ROOT = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir())
KUBECTL = shutil.which("kubectl")
needs_kustomize = pytest.mark.skipif(
    KUBECTL is None, reason="kubectl 1.21 or later is not installed: python .ci/kubectl.py DIRECTORY gets one"
)
_REFERENCE = re.compile(r"\$\(([A-Z_]+)\)")
_ANNOTATION = re.compile(r"metadata\.annotations\['([^']+)'\]")
_UNITS = {"": 1, "m": 0.001, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
DOWNWARD = {"metadata.name": "llama-7c9d-x2x4z", "spec.nodeName": "gpu-7", "status.hostIP": "127.0.0.1"}


class Container(NamedTuple):
    """A container of kvcensus, with the workload that it is in."""

    workload: dict[str, Any]
    spec: dict[str, Any]
    is_sidecar: bool
    objects: tuple[dict[str, Any], ...]

    @property
    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = self.workload["spec"]["template"]
        return found

    def environment(self) -> dict[str, str]:
        """With what the downward API says of a pod."""
        return {one["name"]: one.get("value") or self._downward(one) for one in self.spec.get("env", [])}

    def _downward(self, variable: dict[str, Any]) -> str:
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        if annotation := _ANNOTATION.fullmatch(path):
            return str(self.pod["metadata"].get("annotations", {}).get(annotation[1], ""))
        return DOWNWARD[path]

    def arguments(self) -> list[str]:
        """Those of the program, expanded as the kubelet does it: what it does not know stays as it is."""
        known = self.environment()
        return [_REFERENCE.sub(lambda found: known.get(found[1], found[0]), text) for text in self.spec["args"]]

    def volume(self, mount: dict[str, Any]) -> dict[str, Any]:
        """The volume, or the claim template, behind a mount."""
        for volume in self.pod["spec"].get("volumes", []):
            if volume["name"] == mount["name"]:
                return dict(volume)
        for claim in self.workload["spec"].get("volumeClaimTemplates", []):
            if claim["metadata"]["name"] == mount["name"]:
                return dict(claim)
        raise AssertionError(f"no volume is called {mount['name']}")

    def files(self) -> dict[str, str]:
        """Path in the container to content, of every mounted ConfigMap."""
        maps = {one["metadata"]["name"]: one["data"] for one in self.objects if one["kind"] == "ConfigMap"}
        return {
            f"{mount['mountPath']}/{name}": text
            for mount in self.spec["volumeMounts"]
            if "configMap" in (volume := self.volume(mount))
            for name, text in maps[volume["configMap"]["name"]].items()
        }

    def command(self) -> tuple[str, dict[str, Any]]:
        """Name and parameters as the program's own command line takes them. Raises click.UsageError."""
        name, *rest = self.arguments()
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"kvcensus has no command {name}"
        return name, command.make_context(name, rest).params

    def config(self, directory: Path) -> Config:
        """The configuration as the program comes to it. `directory` takes a mounted file. Raises ConfigError."""
        name, given = self.command()
        flags = {"http.listen": given["listen"]}
        relay = {key: given[key] for key in ("stream", "create_stream", "spool_dir")} if name == "relay" else {}
        if name == "run":
            flags |= {"data_dir": given["data_dir"], "backend": given["backend"]}
        if given["path"] is not None:
            (directory / "mounted.toml").write_text(self.files()[str(given["path"])])
            stated = {key: value for key, value in flags.items() if value is not None}
            return load_config(directory / "mounted.toml", self.environment(), stated)
        return config_from_flags(
            given["engines"],
            given["replay_endpoints"],
            workers=given["workers"],
            engine_type=given["engine_type"],
            model=given["model"],
            ranks=given["ranks"],
            http=given["listen"],
            data_dir=given.get("data_dir"),
            environ=self.environment(),
            relay=relay | ({"connection": {"servers": given["servers"]}} if given["servers"] else {}),
        )


@cache
def build(example: str) -> tuple[dict[str, Any], ...]:
    """The objects that `kubectl apply -k` would send."""
    return render(ROOT / "examples" / example)


def render(directory: Path) -> tuple[dict[str, Any], ...]:
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.safe_load_all(done.stdout) if one)


def workloads(objects: tuple[dict[str, Any], ...]) -> Iterator[dict[str, Any]]:
    yield from (one for one in objects if "template" in one.get("spec", {}))


def containers(objects: tuple[dict[str, Any], ...]) -> list[Container]:
    """Every container of kvcensus."""
    return [
        Container(workload, container, is_sidecar, objects)
        for workload in workloads(objects)
        for kind, is_sidecar in (("initContainers", True), ("containers", False))
        for container in workload["spec"]["template"]["spec"].get(kind, [])
        if container["name"].startswith("kvcensus")
    ]


def quantity(text: str) -> float:
    """Bytes, or cores."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]
