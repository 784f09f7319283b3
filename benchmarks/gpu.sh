#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of less than eight minutes, about 20 in all. No network: frames are made here.
#
#     bash benchmarks/gpu.sh                     # all pieces, one after the other
#     bash benchmarks/gpu.sh train               # one: tests smoke train predict memory curves options1 options2
#     bash benchmarks/gpu.sh --dry [PIECE...]    # every piece at tiny sizes, on the CPU as well, in a few minutes
#
# tests    the tests marked gpu            smoke    a run under torchrun: NCCL beside gloo, DDP, kill, resume, predict
# train    against HF Trainer and the notebook's loop           predict  5x3 views
# memory   of a step, largest batches      curves   compiled or not, bf16 or float32, against the spread of seeds
# options  what each option of a step brings (options1 and options2 are its halves)
#
# JSON and Markdown go to $OUT, or to benchmarks/results/, as soon as something is measured. Python is $VAC_PYTHON,
# .venv's, or python3. One GPU is used: the first that is visible. The end lists what is required and the pieces; the
# status is 1 where a piece failed, 0 where at most a bar was missed (its table says so).
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
        tests | smoke | train | predict | memory | curves | options1 | options2) pieces+=("$word") ;;
        options) pieces+=(options1 options2) ;;
        *)
            echo "gpu.sh: no piece $word; there are tests smoke train predict memory curves options" >&2
            exit 2
            ;;
    esac
done
[ ${#pieces[@]} = 0 ] && pieces=(tests smoke train predict memory curves options1 options2)

missing=$("$python" - <<'PY'
import importlib.util as find
names = {"torch": "torch", "torchvision": "torchvision", "transformers": "transformers", "accelerate": "accelerate",
         "simplejpeg": "simplejpeg", "yaml": "pyyaml", "PIL": "pillow", "matplotlib": "matplotlib", "numpy": "numpy",
         "tqdm": "tqdm", "pytest": "pytest", "safetensors": "safetensors", "sklearn": "scikit-learn"}
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

# HF Trainer would spread over all GPUs that it sees.
if [ ${#dry[@]} = 0 ] || [ -n "${CUDA_VISIBLE_DEVICES-0}" ]; then
    visible=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${visible%%,*}
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
        tests)
            mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
            command=(-m pytest -q -m gpu -p no:cacheprovider "${files[@]}")
            ;;
        train) command=(-m benchmarks.train_step "${full[@]}" "${dry[@]}") ;;
        predict) command=(-m benchmarks.predict "${full[@]}" "${dry[@]}") ;;
        options?) command=(-m benchmarks.options --part "${name#options}/2" "${dry[@]}") ;;
        *) command=(-m "benchmarks.$name" "${dry[@]}") ;;
    esac
    # A piece that hangs must not take the others with it.
    timeout --kill-after=10 470 "$python" "${command[@]}"
    status=$?
    case $status in
        0) verdict=good ;;
        3) verdict="a bar was missed" ;;
        124 | 137) verdict="not done after 470 s" failed=1 ;;
        *) verdict="exit status $status" failed=1 ;;
    esac
    summary+=("$(printf '%-9s %4d s  %s' "$name" $((SECONDS - begun)) "$verdict")")
done
printf '\n######## required\n'
"$python" -m benchmarks.bars "${dry[@]}"
printf '\n######## summary\n'
printf '%s\n' "${summary[@]}"
exit $failed
