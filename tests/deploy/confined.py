"""Whether a process can be put into namespaces of its own here, and what is needed for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

UNSHARE = ["unshare", "--mount", "--net", "--propagation", "private"]
PROGRAM = Path(sys.executable).parent / "kvcensus"
REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def why_not() -> str:
    """Why nothing can be confined here, "" when it can."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return "confining a process needs root, unshare and setpriv"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return done.stderr.strip()
