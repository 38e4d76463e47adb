"""kill -9 at random moments: what is found is the index after one batch, with the cursor of that batch.

`python -m tests.drills.backend_kills` does it 200 times.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.valkey_servers import why_untested, with_server

from .crashing import CrashTest

PERSISTENT: dict[str, dict[str, Any]] = {
    "lmdb": {},
    "filesystem": {"segment_bytes": 1 << 16, "snapshot_after_bytes": 1 << 18},
    "rocksdb": {"write_buffer_bytes": 1 << 18},
    "valkey": {},
    "holt": {"checkpoint_bytes": 1 << 20},
}
"""Options with which much happens in a short time, by the name of the backend."""


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_killed_process_leaves_whole_batches_with_their_cursor(name: str, tmp_path: Path) -> None:
    if problem := why_untested(name):
        pytest.skip(problem)
    test = CrashTest(name, tmp_path, with_server(name, PERSISTENT[name]))
    for number in range(5):
        test.kill(random.Random(number).uniform(0, 0.5))
        test.check()
    assert test.reached > 0
