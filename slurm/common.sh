# Sourced by the sbatch scripts beside it: ranks on all nodes of the job, signals, and whether the job is queued again.
# shellcheck shell=bash
#
#   start_ranks MODULE WORD...   one torchrun a node, until they end; sets `status` to the run's exit status, or to none
#   read_plan kfold|sweep ...    sets `jobs`, `names`, `results` and `finish`: vac_ddp/commands/job_plan.py
#   may_go_on                    decides by `status`: returns when it is 0 (or 3), else queues the job again, or ends it
#
# Settings (environment):
#   VAC_HOME           where this repository is                       [the folder that sbatch was called in]
#   VAC_PYTHON         interpreter with vac_ddp                       [VAC_HOME/.venv/bin/python if there, else python]
#   VAC_RANKS          ranks a node                                   [a rank a GPU; 1 without GPUs]
#   VAC_MAX_RESTARTS   restarts of the ranks within a job             [3]
#   VAC_MIN_NODES      go on with so many nodes when others fail      [all; fewer needs sbatch --no-kill]
#   VAC_MAX_ATTEMPTS   attempts of a job, the first included          [100]
#   VAC_SAVE_TIME      seconds from a signal to SIGKILL               [300; torch 2.11: always 30]
set -uo pipefail

: "${SLURM_JOB_ID:?start it with sbatch}"
attempt=${SLURM_RESTART_COUNT:-0}
case $attempt in
*[!0-9]*)
    echo "SLURM_RESTART_COUNT=$attempt in the environment is not a number of restarts: unset it" >&2
    exit 2
    ;;
esac
# One task of an array has the number of the whole array: name it in full wherever SLURM is asked.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
home=${VAC_HOME:-$SLURM_SUBMIT_DIR}
python=${VAC_PYTHON:-}
[ -n "$python" ] || { [ -x "$home/.venv/bin/python" ] && python=$home/.venv/bin/python || python=python; }
step_number=0
asked=""

say() { printf 'job %s, attempt %s: %s\n' "$job" "$((attempt + 1))" "$*"; }

# USR1 comes to this script alone (--signal=B:USR1@...): srun hands it to every torchrun. TERM comes to the tasks as well
# (scancel, requeue, preemption), and a second one would cut their saving short: here it only must not end the script.
# Nothing but builtins in a trap: the processes of this shell may be on their way out.
on_user_signal() { asked=USR1; [ -z "${srun_pid:-}" ] || kill -USR1 "$srun_pid" 2>/dev/null; }
on_term() { asked=TERM; }
trap on_user_signal USR1
trap on_term TERM

# What a node runs: its torchrun. The first node of the job holds the rendezvous.
# shellcheck disable=SC2016
node_command='exec "$0" -m torch.distributed.run --local-addr="$SLURMD_NODENAME" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" "$@"'

start_ranks() {
    local module=$1 nodes=$SLURM_JOB_NUM_NODES first port ranks told save_time
    shift
    step_number=$((step_number + 1))
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((20000 + (SLURM_JOB_ID * 16 + attempt + step_number) % 20000))
    ranks=${VAC_RANKS:-${SLURM_GPUS_ON_NODE:-1}}
    [ "$ranks" -gt 0 ] || ranks=1
    [ "${VAC_MIN_NODES:-$nodes}" -ge "$nodes" ] || nodes=$VAC_MIN_NODES:$nodes
    told=$SLURM_SUBMIT_DIR/.vac-status-$job-$attempt.json # on the file system that all nodes share
    rm -f "$told"
    # Only where torchrun has the option; where it does not, this says what that means.
    save_time=$("$python" -m vac_ddp.runtime.torchrun "${VAC_SAVE_TIME:-300}") || exit 1

    export VAC_STATUS_FILE=$told VAC_STATUS_ONLY=1
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for each restart: see distributed.py
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$ranks} / ranks > 0 ? ${SLURM_CPUS_PER_TASK:-$ranks} / ranks : 1))}
    say "$SLURM_JOB_NUM_NODES node(s) x $ranks rank(s) on $SLURM_JOB_NODELIST: $module $*"
    # The job may be asked to stop before anything runs.
    status=""
    [ -z "$asked" ] || return 0
    srun --input=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 \
        ${VAC_MIN_NODES:+--no-kill} bash -c "$node_command" "$python" \
        --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${VAC_MAX_RESTARTS:-3}" \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$job-$attempt-$step_number" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 ${save_time:+"$save_time"} \
        -m "$module" "$@" &
    srun_pid=$!
    local code=0
    while :; do # a trap ends `wait`, not srun
        wait "$srun_pid"
        code=$?
        kill -0 "$srun_pid" 2>/dev/null || break
    done
    srun_pid=""
    if [ -e "$told" ]; then
        status=$(sed -n 's/^ *"status": \([0-9]*\).*/\1/p' "$told")
        message=$(sed -n 's/^ *"message": "\(.*\)",\{0,1\}$/\1/p' "$told")
        rm -f "$told"
    else
        message="the ranks ended without a word (srun: $code)"
    fi
}

# A job is lines that call start_ranks and may_go_on.
# shellcheck disable=SC2034
read_plan() {
    local plan
    plan=$("$python" -m vac_ddp.commands.job_plan "$@") || exit 2
    jobs=() names=() results=() finish=()
    eval "$plan"
}

job_state() { scontrol show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1; }

queue_again() {
    if [ $((attempt + 1)) -ge "${VAC_MAX_ATTEMPTS:-100}" ]; then
        say "$1; that was the last attempt (VAC_MAX_ATTEMPTS): the same sbatch with run.resume=auto goes on"
        exit 75
    fi
    # Being cancelled, or requeued by SLURM already: then it is not for this script to decide.
    if [ "$(job_state)" = RUNNING ]; then
        say "$1; queued again"
        scontrol requeue "$job" || say "scontrol requeue failed: the same sbatch with run.resume=auto goes on"
    else
        say "$1"
    fi
    exit 75
}

may_go_on() {
    case $status in
    0) return 0 ;;
    3) say "finished, with findings: $message" ;;
    75 | 130 | 143) queue_again "$message" ;; # saved, or stopped while there was nothing to save
    2)
        say "not started again, something is to be changed: $message"
        exit 2
        ;;
    *)
        # Asked to stop before there was anything to save, or before the ranks could listen.
        [ -z "$asked" ] || queue_again "$asked came before anything was saved"
        say "failed: $message"
        exit 1
        ;;
    esac
}
