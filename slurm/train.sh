#!/usr/bin/env bash
# Train on one node or many: one torchrun a node, saved before the time is up, queued again until it is done.
#
#     sbatch slurm/train.sh                                             # the defaults, beside a data_train/
#     sbatch slurm/train.sh --config hmdb51_videomae_base data.train=/data/hmdb51 run.dir=runs/hmdb51
#     sbatch --nodes=2 --time=12:00:00 --partition=gpu slurm/train.sh key=value ...
#
# Words after the script go to vac_ddp.train. What stands below is overridden by flags of sbatch, in front of the script.
# Environment variables: slurm/common.sh. Pages: docs/slurm-first-run.md, docs/slurm-preemption.md.

# ---- what sites differ in
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --job-name=vac-train
#SBATCH --output=%x-%j.log

# ---- what makes preemption safe
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append

# ---- the environment, where it is more than VAC_HOME/.venv
# module load cuda
# export VAC_PYTHON=/path/to/venv/bin/python

# shellcheck source=slurm/common.sh
source "${VAC_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2

start_ranks "${VAC_MODULE:-vac_ddp.train}" "$@"
may_go_on
say "done"
