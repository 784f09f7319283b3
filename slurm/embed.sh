#!/usr/bin/env bash
# Features of a folder of videos from a frozen encoder, on one node or many. Stopped or preempted it resumes.
#
#     sbatch slurm/embed.sh --config hmdb51_videomae_base --data data_train --out features/train --steps
#     sbatch --nodes=2 slurm/embed.sh --run runs/hmdb51 --data data_train --dtype float16
#
# Words after the script go to vac_ddp.embed. What stands below is overridden by flags of sbatch, in front of the script.
# Environment variables: slurm/common.sh. Exit status 3: finished, and some videos could not be decoded.

# ---- what sites differ in
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --job-name=vac-embed
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

start_ranks vac_ddp.embed -- "$@"
may_go_on
say "done"
exit "$status"
