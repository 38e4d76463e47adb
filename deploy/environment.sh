# Sourced by the scripts beside it: a virtual environment in .venv with kvcensus in it, from the source in this folder.
# PYTHON names the interpreter to use; the first argument of `set_up` the extras to install.
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf '%s\n' "$*" >&2; }

make_venv() {
    if "$PYTHON" -m venv .venv >/dev/null 2>&1; then
        return
    fi
    rm -rf .venv
    # Debian ships `venv` in a package of its own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing python3-venv …"
        apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
        "$PYTHON" -m venv .venv
    else
        say "Python's venv module is missing. Install it and run this again: sudo apt-get install python3-venv"
        exit 1
    fi
}

set_up() {
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "kvcensus needs Python 3.11 or later; '$PYTHON' is $("$PYTHON" --version 2>&1 || true)"
        exit 1
    fi
    [ -x .venv/bin/python ] || make_venv
    say "installing kvcensus into .venv …"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --editable ".$1" --config-settings editable_mode=strict
}
