#!/usr/bin/env bash
# Format, lint and the fast tests, on a fresh machine with nothing but Python 3.11. Arguments go to pytest.
#
#     bash launch/test.sh
#     bash launch/test.sh tests/test_synth.py -x
#
# The longer tiers: bash launch/test.sh -m fault (kills and stops real runs), -m docs (what README and docs say), -m slurm, -m gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
set_up

say "ruff"
"$python" -m ruff format --check .
"$python" -m ruff check .
if command -v shellcheck >/dev/null; then
    say "shellcheck"
    git ls-files '*.sh' .ci/run | xargs shellcheck -x
fi
say "pytest"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -m "not fault and not docs and not slurm and not gpu" "$@"
