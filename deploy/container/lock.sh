#!/bin/sh
# Writes the files that the image is built from, with the newest versions that pyproject.toml allows: needs `pip install uv`.
set -eu
cd "$(dirname "$0")/../.."
lock() { uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade "$@"; }
lock pyproject.toml --extra valkey --extra rocksdb -o deploy/container/requirements.lock
lock deploy/container/build.in -o deploy/container/build.lock
