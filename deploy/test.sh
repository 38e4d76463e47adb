#!/bin/sh
# Sets everything up and runs the tests. Arguments go to pytest.
set -eu
. "$(dirname "$0")/environment.sh"
set_up "[dev]"
exec .venv/bin/pytest -n auto "$@"
