#!/usr/bin/env bash
# The whole job on this machine, from nothing but Python 3.11: install, make data, train, predict, score.
#
#     bash launch/quickstart.sh
#
# Everything it makes is in .venv/ and quickstart/. Started again it goes on where it was, and reuses what is finished.
# RANKS=N sets the number of processes (default: one a GPU, or 2 on the CPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
set_up

started=$SECONDS
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
torchrun=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$ranks")
mkdir -p quickstart

say "1 of 4: data"
"$python" -m vac_ddp.cli synth quickstart/data

say "2 of 4: training on $ranks ranks ($([ "$gpus" -gt 0 ] && echo "GPUs" || echo "CPU"))"
if [ -e quickstart/run/trained ]; then
    echo "quickstart/run is trained already (remove it to train again)"
else
    "${torchrun[@]}" -m vac_ddp.train --config configs/quickstart.yaml run.resume=auto
    touch quickstart/run/trained
fi

say "3 of 4: prediction of quickstart/data/data_test, three views of each video"
# `--` and run.dir=: torchrun of Python before 3.12.8 takes --run for a flag of its own
"${torchrun[@]}" -m vac_ddp.predict -- run.dir=quickstart/run --data quickstart/data/data_test

say "4 of 4: score, and the same clips with their frames shuffled in time"
scored=0
"$python" -m benchmarks.order --run quickstart/run --data quickstart/data --out quickstart/order --ranks "$ranks" ||
    scored=$?
[ "$scored" = 0 ] || [ "$scored" = 3 ] || exit "$scored"

say "done in $((SECONDS - started)) s after the installation"
cat <<END
data         quickstart/data/data_train, quickstart/data/data_test, labels in quickstart/data/test_labels.csv
run          quickstart/run: config.yaml, log.txt, metrics.jsonl, checkpoints/, best_videomae.pt
submission   quickstart/run/predictions/data_test/submission.csv
figures      quickstart/order/order.json

next, with your own frames in data_train/<class>/<video>/ and data_test/<id>/:
  source .venv/bin/activate
  vac audit data_train --test data_test                  # leaks, damage, balance
  vac train --config scratch_small data.train=data_train run.dir=runs/first
  vac predict --run runs/first --data data_test          # runs/first/predictions/data_test/submission.csv
  vac settings lr                                        # settings about a word; vac presets: recipes for more
END
exit "$scored"
