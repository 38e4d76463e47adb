#!/bin/sh
# Sets everything up and shows the main job: a recorded engine, published by a second process, followed into an LMDB index.
set -eu
. "$(dirname "$0")/environment.sh"
set_up ""
exec .venv/bin/kvcensus demo "$@"
