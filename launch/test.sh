#!/usr/bin/env bash
# Format, lint, layers, types and the fast tests, on a fresh machine with nothing but Python 3.11. Arguments go to pytest.
#
#     bash launch/test.sh
#     bash launch/test.sh tests/test_synth.py -x
#
# Without arguments two files of tests run side by side (TEST_PROCESSES=N: another number, 0: in this process).
# The longer tiers: bash launch/test.sh -m fault (kills and stops real runs), -m docs (what README and docs say), -m slurm, -m gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
set_up

say "ruff"
"$python" -m ruff format --check .
"$python" -m ruff check .
if "$python" -c 'import importlinter, mypy' 2>/dev/null; then
    say "layers (import-linter)"
    "$python" -c 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))'
    say "types (mypy)"
    "$python" -m mypy
else
    say "layers and types are not checked: $python has no import-linter or mypy"
fi
if command -v shellcheck >/dev/null; then
    say "shellcheck"
    git ls-files '*.sh' .ci/run | xargs shellcheck -x
fi
say "pytest"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# = 0 ]; then
    if "$python" -c 'import xdist' 2>/dev/null; then
        set -- -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder
    else
        say "one file after the other: $python has no pytest-xdist"
    fi
fi
exec "$python" -m pytest -m "not fault and not docs and not slurm and not gpu" "$@"
