#!/bin/sh
# Makes a release of the last commit in dist/: sdist and wheel, built twice and equal byte for byte, checked, with an SBOM and man pages.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n 1)
grep -q "^## $version " CHANGELOG.md || { echo "CHANGELOG.md has no section for $version" >&2; exit 1; }

"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check build check-wheel-contents twine cyclonedx-bom
commit=$(git rev-parse HEAD)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$commit")
export SOURCE_DATE_EPOCH

build() { # folder
    mkdir "$work/$1"
    git archive "$commit" | tar -x -C "$work/$1"
    PYTHON="$work/venv/bin/python" sh "$work/$1/deploy/distributions.sh" "$work/$1" "$work/$1/dist" >"$work/$1.log" 2>&1 ||
        { cat "$work/$1.log" >&2; exit 1; }
}

build first
build second
for file in "$work"/first/dist/*; do
    cmp "$file" "$work/second/dist/${file##*/}"
done

"$work/venv/bin/check-wheel-contents" --toplevel kvcensus "$work"/first/dist/*.whl
"$work/venv/bin/twine" check --strict "$work"/first/dist/*
"$PYTHON" -m venv "$work/installed"
"$work/installed/bin/pip" install --quiet --disable-pip-version-check "$work"/first/dist/*.whl
"$work/venv/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
    --output-file "$work/kvcensus-$version.cdx.json" "$work/installed"
"$work/installed/bin/pip" install --quiet --disable-pip-version-check click-man
(cd "$work" && installed/bin/python first/deploy/man_pages.py "$work/man")
rm -rf dist
mkdir dist
cp -r "$work"/first/dist/* "$work/kvcensus-$version.cdx.json" "$work/man" dist/
(cd dist && sha256sum "kvcensus-$version"*)
echo "$(ls dist/man | wc -l) man pages in dist/man"
