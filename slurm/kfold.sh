#!/usr/bin/env bash
# K grouped folds as an array: every task trains one and predicts with it, and the last one to finish scores them together.
#
#     sbatch --array=1-5 slurm/kfold.sh --config hmdb51_videomae_base data.train=data_train run.dir=runs/folds
#     TEST=data_test SEED=1 sbatch --array=1-5 slurm/kfold.sh run.dir=runs/folds
#     FOLDS=5 sbatch --array=2 slurm/kfold.sh run.dir=runs/folds        # fold 2 of 5 once more, after it had failed
#
# Words after the script go to vac_ddp.train; run.dir=DIR is the folder of all folds. TEST: the folder to predict
# [data_test]. SEED [0]. The result is DIR/ensemble: submission.csv, members.csv, scores of every held-out video.

# ---- what sites differ in
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --array=1-5
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --job-name=vac-kfold
#SBATCH --output=%x-%A_%a.log

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

folds=${FOLDS:-$SLURM_ARRAY_TASK_MAX} fold=$SLURM_ARRAY_TASK_ID
read_plan kfold --folds "$folds" --seeds "${SEED:-0}" --data "${TEST:-data_test}" -- "$@"
[ "$fold" -le ${#jobs[@]} ] || { say "task $fold, and ${#jobs[@]} folds: sbatch --array=1-${#jobs[@]}"; exit 2; }
eval "${jobs[fold - 1]}"

for ((other = 1; other <= ${#jobs[@]}; other++)); do
    if [ ! -e "${results[other - 1]}" ]; then
        say "fold $fold is done; fold $other is not yet, the last one to finish scores them together"
        exit 0
    fi
done
# Two folds that end at the same moment both come here: they take turns, and the second writes the same files again.
exec 9>>"${results[0]}" && flock 9
say "all $folds folds are done: scoring them together"
"$python" -m vac_ddp.cli "${finish[@]}"
