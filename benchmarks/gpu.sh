#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of less than nine minutes, less than 25 in all. No network: frames are made here.
#
#     bash benchmarks/gpu.sh                     # all pieces, one after the other
#     bash benchmarks/gpu.sh train               # one: tests train predict memory curves options1 options2 (options: both)
#     bash benchmarks/gpu.sh --dry [PIECE...]    # every piece at tiny sizes, on the CPU as well, in a few minutes
#
# JSON and Markdown go to $OUT, or to benchmarks/results/. Python is $VAC_PYTHON, .venv's, or python3.
# The end lists the pieces; the status is 1 where one failed, 0 where at most a bar was missed (its table says so).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${VAC_PYTHON:-}
[ -z "$python" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
python=${python:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

dry=()
pieces=()
for word in "$@"; do
    case $word in
        --dry) dry=(--dry) ;;
        tests | train | predict | memory | curves | options1 | options2) pieces+=("$word") ;;
        options) pieces+=(options1 options2) ;;
        *)
            echo "gpu.sh: no piece $word; there are tests train predict memory curves options" >&2
            exit 2
            ;;
    esac
done
[ ${#pieces[@]} = 0 ] && pieces=(tests train predict memory curves options1 options2)

missing=$("$python" - <<'PY'
import importlib.util as find
names = {"torch": "torch", "torchvision": "torchvision", "transformers": "transformers", "accelerate": "accelerate",
         "simplejpeg": "simplejpeg", "yaml": "pyyaml", "PIL": "pillow", "matplotlib": "matplotlib",
         "timm": "timm", "pytest": "pytest", "safetensors": "safetensors"}
print(*[package for name, package in names.items() if find.find_spec(name) is None])
PY
) || exit 2
if [ -n "$missing" ]; then
    echo "gpu.sh: $python lacks $missing (pip install $missing)" >&2
    exit 2
fi
if [ ${#dry[@]} = 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device; --dry tries every piece on the CPU" >&2
    exit 2
fi

# The loader's processes have one thread each; the main process needs few.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
full=(--gpu)
[ ${#dry[@]} = 1 ] && full=()

failed=0
summary=()
for name in "${pieces[@]}"; do
    printf '\n######## %s\n' "$name"
    begun=$SECONDS
    case $name in
        tests) command=(-m pytest -q -m gpu -p no:cacheprovider tests) ;;
        train) command=(-m benchmarks.train_step "${full[@]}" "${dry[@]}") ;;
        predict) command=(-m benchmarks.predict "${full[@]}" "${dry[@]}") ;;
        options?) command=(-m benchmarks.options --part "${name#options}/2" "${dry[@]}") ;;
        *) command=(-m "benchmarks.$name" "${dry[@]}") ;;
    esac
    # A piece that hangs must not take the others with it.
    timeout --kill-after=10 540 "$python" "${command[@]}"
    status=$?
    case $status in
        0) verdict=good ;;
        3) verdict="a bar was missed" ;;
        124 | 137) verdict="not done after 540 s" failed=1 ;;
        *) verdict="exit status $status" failed=1 ;;
    esac
    summary+=("$(printf '%-9s %4d s  %s' "$name" $((SECONDS - begun)) "$verdict")")
done
printf '\n######## summary\n'
printf '%s\n' "${summary[@]}"
exit $failed
