"""The manifests: what kustomize makes of them is valid, and says of the program what the program says of itself."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest

from kvcensus.daemon.config import Config, ConfigError

from ..nats_servers import packaged_server
from .manifests import EXAMPLES, ROOT, Container, build, containers, needs_kustomize, quantity, render, workloads

pytestmark = needs_kustomize
each_example = pytest.mark.parametrize("example", EXAMPLES)

OLDEST = "1.30"
"""Native sidecars and the sleep before the end are there without a feature gate since."""
POD_MONITOR = json.loads((Path(__file__).parent / "podmonitor.schema.json").read_text())
DEFAULT_GRACE_S = 30


def each_container() -> Iterator[tuple[str, Container]]:
    """Every container of kvcensus in every example, with a name for messages."""
    for example in EXAMPLES:
        for one in containers(build(example)):
            yield f"{example}: {one.workload['metadata']['name']}/{one.spec['name']}", one


def valid(one: dict[str, Any]) -> None:
    """Raises when the object has a field that the published schemas do not know, or lacks one."""
    if one["kind"] == "PodMonitor":
        jsonschema.validate(one, POD_MONITOR)
        return
    for version in (OLDEST, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(copy.deepcopy(one), version, strict=True)


def agrees_with_the_program(one: Container, directory: Path) -> Config:
    """The container's command line and configuration are the program's, and ports and paths the configuration's."""
    assert not [text for text in one.arguments() if "$(" in text]
    config = one.config(directory)
    address = config.http.address()
    assert address is not None
    ports = {port["name"]: port["containerPort"] for port in one.spec["ports"]}
    assert ports == {"kvcensus": address[1]}
    assert address[0] == "0.0.0.0", "the kubelet asks from outside"
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe := one.spec.get(kind):
            assert probe["httpGet"]["port"] in ports
            assert probe["httpGet"]["path"] == ("/readyz" if kind == "readinessProbe" else "/livez")
    kept = Path(config.relay.spool_dir) if one.command()[0] == "relay" else Path(config.data_dir)
    (mount,) = [mount for mount in one.spec["volumeMounts"] if not mount.get("readOnly")]
    assert kept.is_relative_to(mount["mountPath"])
    return config


def is_confined(one: Container) -> None:
    """As the restricted Pod Security Standard wants it, with a read-only root. A sidecar says it for itself alone."""
    context = one.spec["securityContext"]
    merged = context if one.is_sidecar else one.pod["spec"]["securityContext"] | context
    assert merged["runAsNonRoot"] is True
    assert merged["runAsUser"] > 0
    assert merged["runAsGroup"] > 0
    assert merged["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


@each_example
def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes(example: str) -> None:
    for one in build(example):
        valid(one)


def test_every_component_is_in_an_example() -> None:
    used = "".join((ROOT / "examples" / name / "kustomization.yaml").read_text() for name in EXAMPLES)
    parts = {str(path.parent.relative_to(ROOT)) for path in ROOT.rglob("kustomization.yaml")}
    missing = {part for part in parts if not part.startswith("examples/") and f"../../{part}\n" not in used + "\n"}
    assert not missing


def test_what_the_containers_say_is_what_the_program_takes(tmp_path: Path) -> None:
    seen = {name: agrees_with_the_program(one, tmp_path) for name, one in each_container()}
    assert len(seen) >= len(EXAMPLES)


def test_engines_publish_where_their_sidecar_listens(tmp_path: Path) -> None:
    sidecars = [one for _, one in each_container() if one.is_sidecar]
    assert sidecars
    for one in sidecars:
        (engine,) = one.pod["spec"]["containers"]
        (events,) = [text.partition("=")[2] for text in engine["args"] if text.startswith("--kv-events-config=")]
        (source,) = one.config(tmp_path).sources
        published = json.loads(events)
        assert published["endpoint"].replace("*", "127.0.0.1") == source.endpoint
        assert published["replay_endpoint"].replace("*", "127.0.0.1") == source.replay_endpoint
        assert source.type == engine["name"]
        assert source.model
        assert source.model == one.pod["metadata"]["annotations"]["kvcensus.dev/model"]


def test_a_sidecar_never_waits_for_its_engine_and_never_takes_it_out_of_service() -> None:
    for name, one in each_container():
        assert ("readinessProbe" in one.spec) != one.is_sidecar, name
        if one.is_sidecar:
            assert one.spec["restartPolicy"] == "Always", name
            assert one.spec["startupProbe"]["httpGet"]["path"] == "/livez", name
            assert one.spec["resources"]["requests"] == one.spec["resources"]["limits"], name


def test_a_component_changes_only_what_is_labelled_for_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "kubernetes")
    engine = tmp_path / "kubernetes" / "engines" / "sglang.yaml"
    engine.write_text(engine.read_text().replace("kvcensus.dev/engine: sglang", "engine: sglang"))
    (before,) = [one for one in render(engine.parent) if one["metadata"]["name"] == "qwen"]
    examples = [name for name in EXAMPLES if any(one.is_sidecar for one in containers(build(name)))]
    assert examples
    for example in examples:
        built = render(tmp_path / "kubernetes" / "examples" / example)
        (after,) = [one for one in built if one["metadata"]["name"] == "qwen"]
        assert after["spec"] == before["spec"], example


def test_every_container_is_confined() -> None:
    for _, one in each_container():
        is_confined(one)
    for example in EXAMPLES:
        for workload in workloads(build(example)):
            pod = workload["spec"]["template"]["spec"]
            if "kvcensus.dev/part" in workload["spec"]["selector"]["matchLabels"]:
                assert pod["automountServiceAccountToken"] is False
                assert pod["enableServiceLinks"] is False


def test_a_pod_is_given_longer_to_end_than_the_daemon_may_take(tmp_path: Path) -> None:
    for name, one in each_container():
        grace_s = one.pod["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_S)
        before_s = one.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert before_s + one.config(tmp_path).writer.drain_deadline_ms / 1000 < grace_s, name


def test_no_volume_can_be_filled_beyond_its_limit(tmp_path: Path) -> None:
    """That would evict the pod: the index, every snapshot that may be read of it, and the quarantine have room."""
    for name, one in each_container():
        config = one.config(tmp_path)
        if one.command()[0] == "relay":
            most = 2 * config.relay.spool_max_bytes
        else:
            most = config.index.map_size_bytes * (1 + config.http.max_snapshots) + config.quarantine.max_bytes
        (mount,) = [mount for mount in one.spec["volumeMounts"] if not mount.get("readOnly")]
        volume = one.volume(mount)
        if "hostPath" in volume:
            continue
        claim = volume.get("spec", {}).get("resources", {}).get("requests", {}).get("storage")
        directory = volume.get("emptyDir", {})
        assert most < quantity(claim or directory["sizeLimit"]), name
        if directory.get("medium") == "Memory":
            memory = quantity(one.spec["resources"]["limits"]["memory"])
            assert quantity(directory["sizeLimit"]) + config.writer.queue_max_bytes < memory, name


def test_selectors_find_pods_and_ports_are_those_of_containers() -> None:
    for example in EXAMPLES:
        objects = build(example)
        for one in objects:
            if one["kind"] == "Service":
                found = _ports_of(objects, {"matchLabels": one["spec"]["selector"]})
                assert {port["targetPort"] for port in one["spec"]["ports"]} <= found, example
            elif one["kind"] == "NetworkPolicy":
                found = _ports_of(objects, one["spec"]["podSelector"])
                wanted = {port["port"] for rule in one["spec"]["ingress"] for port in rule["ports"]}
                assert wanted <= found, example
            elif one["kind"] == "PodDisruptionBudget":
                assert _ports_of(objects, one["spec"]["selector"]), example


def test_every_container_is_scraped_by_the_monitor_of_its_job() -> None:
    monitors = [one for one in build("fleet") if one["kind"] == "PodMonitor"]
    for name, one in each_container():
        (monitor,) = [
            monitor for monitor in monitors if _selects(monitor["spec"]["selector"], one.pod["metadata"]["labels"])
        ]
        assert monitor["metadata"]["name"] == ("kvcensus-relay" if one.command()[0] == "relay" else "kvcensus"), name
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["path"] == "/metrics"
        assert endpoint["port"] in [port["name"] for port in one.spec["ports"]]


def test_no_network_policy_selects_an_engine() -> None:
    """One that did would close the engine's own ports to everybody whom it does not name."""
    for example in EXAMPLES:
        objects = build(example)
        policies = [one["spec"]["podSelector"] for one in objects if one["kind"] == "NetworkPolicy"]
        for one in containers(objects):
            if one.is_sidecar:
                assert not any(_selects(policy, one.pod["metadata"]["labels"]) for policy in policies)


def test_who_talks_to_nats_may_and_finds_it(tmp_path: Path) -> None:
    objects = build("fleet")
    (service,) = [one for one in objects if one["metadata"]["name"] == "kvcensus-nats" and one["kind"] == "Service"]
    (policy,) = [
        one for one in objects if one["metadata"]["name"] == "kvcensus-nats" and one["kind"] == "NetworkPolicy"
    ]
    address = f"nats://kvcensus-nats:{service['spec']['ports'][0]['port']}"
    admitted = [
        peer["podSelector"]
        for rule in policy["spec"]["ingress"]
        if {"port": "client"} in rule["ports"]
        for peer in rule["from"]
    ]
    for one in containers(objects):
        config = one.config(tmp_path)
        connection = config.relay.connection if one.is_sidecar else config.nats[0].connection
        assert connection.servers == (address,)
        assert any(_selects(peer, one.pod["metadata"]["labels"]) for peer in admitted)
    streams = {one.config(tmp_path).relay.stream or one.config(tmp_path).nats[0].stream for one in containers(objects)}
    assert len(streams) == 1


def test_the_stream_fits_into_nats_and_nats_into_its_claim(tmp_path: Path) -> None:
    objects = build("fleet")
    (nats,) = [one for one in workloads(objects) if one["metadata"]["name"] == "kvcensus-nats"]
    (settings,) = [one["data"]["nats.conf"] for one in objects if "nats.conf" in one.get("data", {})]
    claim = nats["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    store = next(line.split()[1] for line in settings.splitlines() if "max_file_store" in line).removesuffix("B")
    relays = [one.config(tmp_path).relay for one in containers(objects) if one.is_sidecar]
    assert all(relay.stream_max_bytes < quantity(store) < quantity(claim) for relay in relays)
    assert {relay.stream_replicas for relay in relays} == {nats["spec"]["replicas"]}


def test_nats_takes_its_configuration(tmp_path: Path) -> None:
    objects = build("fleet")
    (nats,) = [one for one in workloads(objects) if one["metadata"]["name"] == "kvcensus-nats"]
    (settings,) = [one["data"]["nats.conf"] for one in objects if "nats.conf" in one.get("data", {})]
    path = tmp_path / "nats.conf"
    path.write_text(settings)
    environment = {**os.environ, "POD_NAME": "kvcensus-nats-0"}
    done = subprocess.run(
        [packaged_server(), "-t", "-c", path], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (container,) = nats["spec"]["template"]["spec"]["containers"]
    for port in container["ports"]:
        assert f"0.0.0.0:{port['containerPort']}" in settings
    for number in range(nats["spec"]["replicas"]):
        assert f"nats://kvcensus-nats-{number}.{nats['spec']['serviceName']}:6222" in settings


MUTANTS: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception]]] = {
    "a flag that the program does not have": (lambda spec: spec["args"].append("--spool-dir=/x"), click.UsageError),
    "an engine that the program does not know": (
        lambda spec: spec["args"].append("--engine-type=tensorrt"),
        click.UsageError,
    ),
    "a misspelt variable": (
        lambda spec: spec["env"].append({"name": "KVCENSUS__INDEX__MAP_SIZE", "value": "1"}),
        ConfigError,
    ),
    "a variable that nobody sets": (lambda spec: spec["args"].append("--topic=$(TOPIC)"), AssertionError),
    "another port": (lambda spec: spec["ports"][0].update(containerPort=9481), AssertionError),
    "another directory": (lambda spec: spec["volumeMounts"][0].update(mountPath="/data"), AssertionError),
    "a start-up probe that waits": (
        lambda spec: spec["startupProbe"]["httpGet"].update(path="/readyz"),
        AssertionError,
    ),
    "a writable root": (
        lambda spec: spec["securityContext"].update(readOnlyRootFilesystem=False),
        AssertionError,
    ),
    "a misspelt field": (
        lambda spec: spec.update(restartpolicy=spec.pop("restartPolicy")),
        kubernetes_validate.ValidationError,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checks_find(mutant: str, tmp_path: Path) -> None:
    """Each of them in a manifest that is sound otherwise."""
    change, expected = MUTANTS[mutant]
    objects = copy.deepcopy(build("sidecar"))
    one, *_ = containers(objects)
    change(one.spec)
    with pytest.raises(expected):
        _check(one, tmp_path)


def _check(one: Container, directory: Path) -> None:
    valid(one.workload)
    is_confined(one)
    agrees_with_the_program(one, directory)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector with matchLabels and `In` expressions selects a pod of these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in expressions
    )


def _ports_of(objects: tuple[dict[str, Any], ...], selector: dict[str, Any]) -> set[str]:
    """Names of the ports of every pod that is selected."""
    pods = [one["spec"]["template"] for one in workloads(objects)]
    return {
        port["name"]
        for pod in pods
        if _selects(selector, pod["metadata"]["labels"])
        for kind in ("initContainers", "containers")
        for container in pod["spec"].get(kind, [])
        for port in container.get("ports", [])
    }
