"""The container file, and the lock that it is built from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .manifests import EXAMPLES, build, containers, needs_kustomize

_REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDER = _REPOSITORY / "deploy" / "container"
IMAGE = (_FOLDER / "Containerfile").read_text()


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Name to version and hashes of a lock file."""
    text = (_FOLDER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    found = {}
    for line in lines:
        requirement = Requirement(line.partition("--hash")[0])
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found[canonicalize_name(requirement.name)] = (pin.version, re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
    return found


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_everything_that_is_fetched_is_named_by_hash(name: str) -> None:
    assert locked(name)
    assert all(hashes for _, hashes in locked(name).values())


def test_the_lock_is_within_what_the_package_asks_for() -> None:
    """With `sh deploy/container/lock.sh` it is again, after a change there."""
    settings = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())
    project = settings["project"]
    wanted = [*project["dependencies"]]
    wanted += [one for extra in ("valkey", "rocksdb") for one in project["optional-dependencies"][extra]]
    versions = {name: version for name, (version, _) in (locked("requirements.lock") | locked("build.lock")).items()}
    for requirement in map(Requirement, [*wanted, *settings["build-system"]["requires"]]):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_no_image_can_be_built_upon_a_tag_by_default() -> None:
    assert set(re.findall(r"^FROM (\S+)", IMAGE, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE$", IMAGE, re.MULTILINE)


def test_pip_fetches_nothing_that_is_not_locked() -> None:
    for command in re.findall(r"pip (?:install|wheel)[^&]*", IMAGE.replace("\\\n", " ")):
        assert "--require-hashes" in command or "--no-index" in command


@needs_kustomize
def test_manifests_run_it_as_its_own_user() -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", IMAGE, re.MULTILINE)
    for example in EXAMPLES:
        for one in containers(build(example)):
            context = one.pod["spec"].get("securityContext", {}) | one.spec["securityContext"]
            assert context["runAsUser"] == context["runAsGroup"] == int(user)
            mounted = [mount["mountPath"] for mount in one.spec["volumeMounts"] if not mount.get("readOnly")]
            assert [f"WORKDIR {path}\n" in IMAGE for path in mounted] == [True]
