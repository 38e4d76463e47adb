#!/bin/sh
# Runs the unit tests of the last commit against its wheel, on each interpreter, with the lowest and the newest dependencies of its bounds.
#     sh tests/matrix.sh [INTERPRETER…]      default: every python3.11 to python3.14 of the PATH and of pyenv
# WORK names the folder for the environments, RESOLUTIONS which of `lowest-direct` and `highest` to try, PYTEST_ARGUMENTS goes to pytest.
# What cannot be installed, or fails, ends it with 1 after all were tried. Interpreters that are not here are checked as far as that goes: every dependency has to have a wheel for them.
set -eu
cd "$(dirname "$0")/.."
WORK=${WORK:-$(mktemp -d)}
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
VERSIONS="3.11 3.12 3.13 3.14"

find_interpreters() {
    for version in $VERSIONS; do
        for candidate in "$(command -v "python$version" || true)" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
            if [ -x "$candidate" ] && "$candidate" -c "" 2>/dev/null; then  # a shim of pyenv may have nothing behind it
                echo "$candidate"
                break
            fi
        done
    done
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

[ $# -gt 0 ] || set -- $(find_interpreters)
[ $# -gt 0 ] || { echo "no interpreter of $VERSIONS is here" >&2; exit 1; }

"$1" -m venv "$WORK/tools"
"$WORK/tools/bin/pip" install --quiet --disable-pip-version-check uv build
mkdir "$WORK/tree"
git archive HEAD | tar -x -C "$WORK/tree"
cd "$WORK/tree"
"$WORK/tools/bin/python" -m build --outdir "$WORK/dist" . >/dev/null
uv="$WORK/tools/bin/uv"
wheel=$(ls "$WORK"/dist/*.whl)
wheels="--only-binary :all: --no-binary nkeys"  # nkeys is pure Python, and published as source only
failed=0

said() { printf '%s\n' "$*" | tee -a "$WORK/results"; }

try() { # interpreter, resolution
    version=$(version_of "$1")
    venv="$WORK/$version-$2"
    "$uv" venv --quiet --clear --python "$1" "$venv"
    if ! "$uv" pip install --quiet --python "$venv" --resolution "$2" $wheels "kvcensus[dev] @ file://$wheel"; then
        said "$version $2: cannot be installed"
        return 1
    fi
    "$uv" pip freeze --python "$venv" 2>/dev/null >"$WORK/$version-$2.txt"
    if ! PATH="$venv/bin:$PATH" "$venv/bin/python" -P -m pytest -q -n 2 -p no:cacheprovider tests/test_packaging.py \
        tests/backends tests/translators tests/daemon ${PYTEST_ARGUMENTS:-} >"$WORK/$version-$2.log" 2>&1; then
        said "$version $2: $(tail -n 1 "$WORK/$version-$2.log"), see $WORK/$version-$2.log"
        return 1
    fi
    said "$version $2: $(tail -n 1 "$WORK/$version-$2.log")"
}

tried=""
for interpreter; do
    tried="$tried $(version_of "$interpreter")"
    for resolution in ${RESOLUTIONS:-lowest-direct highest}; do
        try "$interpreter" "$resolution" || failed=1
    done
done

for version in $VERSIONS; do
    case "$tried " in *" $version "*) continue ;; esac
    if echo "kvcensus[valkey,rocksdb,plots] @ file://$wheel" |
        "$uv" pip compile --quiet --python-version "$version" $wheels - >"$WORK/$version-wheels.txt"; then
        said "$version: not here; every dependency has a wheel for it"
    else
        said "$version: not here; some dependency has no wheel for it"
        failed=1
    fi
done
exit $failed
