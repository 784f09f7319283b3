#!/usr/bin/env bash
# Every combination of some settings as an array; the last one to finish prints the table of all.
#
#     GRID="optim.lr=1e-4,5e-4 seed=0,1" sbatch --array=1-4 slurm/sweep.sh --config scratch_small run.dir=runs/sweep
#
# GRID holds words `setting=value,value,...` with blanks between them; the array must have as many tasks as there are
# combinations. Words after the script go to vac_ddp.train, for all of them; run.dir=DIR is the folder of all runs.
# The table (again: vac table DIR/*) has a line for each combination, its seeds as mean and deviation.

# ---- what sites differ in
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --array=1-2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --job-name=vac-sweep
#SBATCH --output=%x-%A_%a.log

# ---- what makes preemption safe
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append

# ---- the environment, where it is more than VAC_HOME/.venv
# module load cuda
# export VAC_PYTHON=/path/to/venv/bin/python

# ---- what is swept
GRID=${GRID:-"optim.lr=1e-4,5e-4"}

# shellcheck source=slurm/common.sh
source "${VAC_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2

read -ra axes <<<"$GRID"
read_plan sweep --grid "${axes[@]}" -- "$@"
task=$SLURM_ARRAY_TASK_ID count=${#jobs[@]}
if [ "$task" -gt "$count" ] || [ "$SLURM_ARRAY_TASK_MAX" -lt "$count" ]; then
    say "GRID has $count combinations, the array $SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX: sbatch --array=1-$count slurm/sweep.sh ..."
    exit 2
fi
eval "${jobs[task - 1]}"
touch "${results[task - 1]}"

for ((other = 1; other <= count; other++)); do
    if [ ! -e "${results[other - 1]}" ]; then
        say "done; ${names[other - 1]} is not yet, the last one to finish prints the table"
        exit 0
    fi
done
"$python" -m vac_ddp.cli "${finish[@]}"
