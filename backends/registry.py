"""Which backends there are, and how each is opened.

A package outside this one adds a backend with an entry point in the group `kvcensus.backends`: its name is that of the
backend, its value a function like `Opener`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import BackendError
from .interface import IndexBackend

GROUP = "kvcensus.backends"
"""The entry points of packages outside this one."""

Opener = Callable[[Path, Mapping[str, Any]], IndexBackend]
"""Opens the index in a directory that need not exist, with the backend's own options. Raises BackendError."""

_BUILT_IN = {
    "memory": "kvcensus.backends.memory:open_memory",
    "lmdb": "kvcensus.backends.lmdb.backend:open_lmdb",
    "rocksdb": "kvcensus.backends.rocksdb.backend:open_rocksdb",
    "filesystem": "kvcensus.backends.filesystem.backend:open_filesystem",
    "valkey": "kvcensus.backends.valkey.backend:open_valkey",
}
_NEEDS = {
    "rocksdb": ("rocksdict", "kvcensus[rocksdb]"),
    "valkey": ("valkey", "kvcensus[valkey]"),
}
"""The package that a backend needs and does not come with everything else: module, and what to install."""
_RESERVED = {"holt": "kvcensus-holt"}
"""Names that a known package registers."""


class BackendMissing(BackendError):
    """There is no backend of this name here. The text says what to install, or what there is."""

    problem = "missing"


def backend_names() -> list[str]:
    """Every backend that can be named, whether or not what it needs is installed."""
    return sorted({*_BUILT_IN, *_RESERVED, *_outside()})


def usable_backends() -> list[str]:
    """Every backend that can be opened here."""
    return [name for name in backend_names() if not why_unusable(name)]


def why_unusable(name: str) -> str:
    """What is missing for a backend, in one sentence; "" for nothing."""
    if name in _outside():
        return ""
    if name in _RESERVED:
        return f"the backend {name} is in a package of its own: pip install {_RESERVED[name]}"
    if name not in _BUILT_IN:
        return f"there is no backend {name}; there are {', '.join(backend_names())}"
    if name in _NEEDS:
        module, package = _NEEDS[name]
        try:
            import_module(module)
        except ImportError:
            return f"the backend {name} needs {module}: pip install '{package}'"
    return ""


def open_backend(name: str, directory: Path, options: Mapping[str, Any] | None = None) -> IndexBackend:
    """Open a backend by its name. Raises BackendError: BackendMissing, or what the backend itself says."""
    if problem := why_unusable(name):
        raise BackendMissing(problem)
    outside = _outside().get(name)
    opener: Opener = outside.load() if outside else _load(_BUILT_IN[name])
    return opener(directory, options or {})


def _load(place: str) -> Opener:
    module, _, function = place.partition(":")
    opener: Opener = getattr(import_module(module), function)
    return opener


@cache
def _outside() -> dict[str, Any]:
    """The entry points of other packages. A name of our own is ours."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _BUILT_IN}
