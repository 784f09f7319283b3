# Sourced by the other scripts: a virtual environment in .venv with the package in it, made once and reused.
# Sets `python` to its interpreter. VAC_PYTHON=/path/to/python uses that one as it is and installs nothing.
# shellcheck shell=bash

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'vac: %s\n' "$*" >&2; exit 2; }

# The first Python of at least 3.11 among $PYTHON and the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Debian leaves parts of Python out; as root they are installed, else the command to type is said.
debian_packages() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" != 0 ]; then
        fail "missing: $*; install them (sudo apt-get install -y $*) and start again"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

make_venv() {
    local base version
    base=$(find_python) || fail "Python 3.11 or later is needed: install it, or set PYTHON=/path/to/it"
    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "virtual environment .venv (Python $version)"
    if ! "$base" -c 'import ensurepip' 2>/dev/null; then
        debian_packages "python$version-venv" || fail "this Python has no ensurepip: install its venv package"
    fi
    rm -rf .venv
    "$base" -m venv .venv
}

# What is installed has to be installed again when these files change.
wanted() { cat setup.py pyproject.toml | sha256sum | cut -d ' ' -f 1; }

set_up() {
    if [ -n "${VAC_PYTHON:-}" ]; then
        python=$VAC_PYTHON
        return
    fi
    .venv/bin/python -c '' 2>/dev/null || make_venv
    python=$PWD/.venv/bin/python
    if [ "$(cat .venv/installed 2>/dev/null)" = "$(wanted)" ]; then
        return
    fi
    say "installing vac_ddp and what it needs (torch comes with CUDA: some gigabytes, once)"
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off -e '.[test]' ||
        fail "the installation failed: its message is above"
    wanted >.venv/installed
}
