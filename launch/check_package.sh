#!/usr/bin/env bash
# The package as a stranger gets it: sdist and wheel built in a clean clone, the wheel installed in an empty environment
# with nothing but what it requires, and used in another folder: every module is imported, then help, data, a debug
# training and a prediction. It takes minutes and some gigabytes in $TMPDIR, which are given back.
#
#     bash launch/check_package.sh                     with the newest torch
#     bash launch/check_package.sh 'torch==2.11.*'     with the oldest that is supported; then the tests of what is
#                                                      closest to torch's API as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
base=${VAC_PYTHON:-$(find_python)} || fail "Python 3.11 or later is needed: install it, or set PYTHON=/path/to/it"
pip=(-m pip --quiet --disable-pip-version-check --no-input install --progress-bar off)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME=$work/cache PYTHONPATH='' CUDA_VISIBLE_DEVICES=''
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_CACHE_DIR=${PIP_CACHE_DIR:-$HOME/.cache/pip}

say "sdist, and the wheel from it, in a clean clone"
git clone --quiet . "$work/clone"
"$base" -m venv "$work/build"
"$work/build/bin/python" "${pip[@]}" build
(cd "$work/clone" && "$work/build/bin/python" -m build --outdir "$work/dist" >"$work/build.log") || {
    cat "$work/build.log"
    exit 1
}
ls "$work/dist"

say "an empty environment with the wheel${1:+ and $1}"
"$base" -m venv "$work/empty"
python=$work/empty/bin/python
"$python" "${pip[@]}" "$work"/dist/*.whl ${1:+"$1"}
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$python" - <<'PY'
import importlib
import pkgutil
import sys

import torch

import vac_ddp

assert vac_ddp.__file__.startswith(sys.prefix), vac_ddp.__file__
names = [module.name for module in pkgutil.walk_packages(vac_ddp.__path__, "vac_ddp.")]
for name in names:
    importlib.import_module(name)
print(f"{len(names)} modules imported; Python {sys.version.split()[0]}, torch {torch.__version__}")
PY

say "help, data, a debug training, a prediction"
PATH=$work/empty/bin:$PATH
vac --help
vac synth data --videos-per-class 4 --test-per-class 1
vac train --debug data.train=data/data_train run.dir=run
vac predict --run run --data data/data_test
head -n 3 run/predictions/data_test/submission.csv

if [ $# -gt 0 ]; then
    say "tests of what is closest to torch's API, with $1"
    "$python" "${pip[@]}" pytest hypothesis
    cd "$work/clone"
    "$python" -m pytest -q -m "not fault and not docs and not slurm and not gpu" tests/test_distributed.py \
        tests/test_engine.py tests/test_optim.py tests/test_schedule.py tests/test_sampler.py tests/test_dataset.py \
        tests/test_augment.py tests/test_mixing.py tests/test_videomae.py tests/test_metrics.py tests/test_train.py \
        tests/test_launchers.py tests/test_torch_compat.py
fi
