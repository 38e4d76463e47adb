"""The recording that `kvcensus demo` plays: a real vLLM engine with a small cache that evicts all the time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path

RECORDING = "vllm-0.32.0-evict.jsonl.gz"


def recording() -> AbstractContextManager[Path]:
    """The recording as a file."""
    return as_file(files(__package__).joinpath(RECORDING))
