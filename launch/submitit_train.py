#!/usr/bin/env python
"""Train, predict, cross-validate or sweep as submitit jobs, on a SLURM cluster or on this machine.

    python launch/submitit_train.py train   --nodes 2 --gpus 4 --time 720 --partition gpu -- run.dir=runs/a key=value
    python launch/submitit_train.py predict --gpus 4 -- --run runs/a --data data_test
    python launch/submitit_train.py kfold   --folds 5 --seeds 0,1 --data data_test -- run.dir=runs/folds
    python launch/submitit_train.py sweep   --grid optim.lr=1e-4,5e-4 seed=0,1 -- run.dir=runs/sweep

Words behind `--` are those of vac_ddp.train (vac_ddp.predict). --cluster local runs the same jobs on this machine one
after the other, --cluster debug inside this process. Several jobs are one SLURM array. This program waits, and ends
with a table and the status of a job that failed; Ctrl-C leaves the jobs running (the table is then for you to call).
Every job is saved and queued again when it is preempted or its time is up, as with slurm/train.sh.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run from a clone that is not installed

from vac_ddp import errors, files  # noqa: E402
from vac_ddp.commands import job_plan  # noqa: E402
from vac_ddp.commands.job_plan import Plan  # noqa: E402
from vac_ddp.errors import UserError  # noqa: E402
from vac_ddp.runtime import torchrun  # noqa: E402
from vac_ddp.runtime.ranks import restarts  # noqa: E402

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NEVER = 10**6  # time-outs that submitit allows: --attempts is the limit, and counts preemptions as well
LOCAL_ATTEMPTS = 6  # submitit's local controller starts a job no more often, and says nothing then


@dataclass(kw_only=True)
class Ranks:
    """What one job runs: some commands after another, each by one torchrun a node. Called once a node, by submitit.

    A command is a module and its words. `attempt` and `done` are carried over interruptions: a job that comes back goes
    on with the command that was interrupted.
    """

    commands: list[tuple[str, list[str]]]
    ranks: int
    folder: str
    min_nodes: int | None = None
    max_restarts: int = 3
    max_attempts: int = 100
    attempt: int = 0
    done: int = 0

    def __call__(self) -> dict[str, Any]:
        """Run the commands; what the last one said in its status file. Raises where a command failed."""
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = 0
        # submitit would pass over SIGTERM, which requeue, scancel and preemption send, and act on its own signal before
        # the ranks have saved: its handler is called when they have.
        self.before = {number: signal.signal(number, self._hand_down) for number in FORWARDED}
        # SLURM starts a job again after a node has failed, or after `scontrol requeue`, without asking submitit.
        self.attempt = max(self.attempt, restarts("SLURM_RESTART_COUNT"))
        told: dict[str, Any] = {}
        for place, (module, words) in enumerate(self.commands):
            if place < self.done:
                continue
            told = self._run(place, module, words)
            if told["status"] == errors.INTERRUPTED:
                self._come_back(told["message"])
            if told["status"] not in (errors.DONE, errors.FINDINGS):
                raise Failed(told["status"], told["message"])
            self.done = place + 1
        return told

    def _run(self, place: int, module: str, words: list[str]) -> dict[str, Any]:
        """Start this node's torchrun and wait for it; what rank 0 said, wherever it was."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        told = Path(self.folder) / f"{job.job_id}_{self.attempt}_{place}_status.json"
        environment = {
            **os.environ,
            "VAC_STATUS_FILE": str(told),
            "VAC_STATUS_ONLY": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see distributed.py
            "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.ranks)))
        if self.attempt:
            environment["SLURM_RESTART_COUNT"] = str(self.attempt)  # resumes, on this machine too
        print(f"attempt {self.attempt + 1}: {module} {shlex.join(words)}", flush=True)
        if self.asked:
            return {"status": errors.INTERRUPTED, "message": "stopped before the ranks were started"}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *self._meeting(job, place), "-m", module, *words],
            env=environment,
            start_new_session=True,  # signals come to the ranks by way of this process, once
        )
        if self.asked:  # it came while the process was being made
            self.child.send_signal(self.asked)
        code = self.child.wait()
        for _ in range(50):  # the status file of rank 0 on another node, by way of the file server
            if told.exists():
                return self._answered(files.read_json(told))
            time.sleep(0.1)
        if self.asked:
            return {"status": errors.INTERRUPTED, "message": f"{signal.Signals(self.asked).name} before it could save"}
        return {"status": errors.FAILED, "message": f"the ranks ended without a word (torchrun: {code})"}

    def _answered(self, told: dict[str, Any]) -> dict[str, Any]:
        """What rank 0 said; stopped by a signal to this job before there was anything to save, it is to come back."""
        if self.asked and told["status"] in (errors.CTRL_C, errors.TERMINATED):
            return {**told, "status": errors.INTERRUPTED}
        return told

    def _meeting(self, job: Any, place: int) -> list[str]:
        """How the torchruns of the nodes find one another."""
        words = [f"--nproc-per-node={self.ranks}", f"--max-restarts={self.max_restarts}"]
        words += [
            f"--signals-to-handle={torchrun.SIGNALS}",
            *torchrun.save_time_words(torchrun.SAVE_TIME_S),
        ]
        words += ["--rdzv-backend=c10d", f"--rdzv-id={job.job_id}-{self.attempt}-{place}"]
        if job.num_nodes == 1:
            return [*words, "--nnodes=1", "--rdzv-endpoint=localhost:0"]
        port = 20000 + (int(job.raw_job_id) * 16 + self.attempt + place) % 20000
        least = self.min_nodes or job.num_nodes
        nodes = f"{least}:{job.num_nodes}" if least < job.num_nodes else str(job.num_nodes)
        words += [f"--nnodes={nodes}", f"--rdzv-endpoint={job.hostnames[0]}:{port}"]
        own = os.environ.get("SLURMD_NODENAME", job.hostname)
        return [*words, f"--rdzv-conf=is_host={int(job.node == 0)}", f"--local-addr={own}"]

    def _hand_down(self, number: int, frame: Any) -> None:
        self.asked = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def _come_back(self, message: str) -> None:
        """Saved: have the job queued again by submitit, from its first task; the others wait to be ended by SLURM."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        print(f"attempt {self.attempt + 1}: {message}", flush=True)
        if self.asked == signal.SIGTERM and job.cluster == "slurm":
            # From SLURM itself: the job is being requeued already, or was cancelled, and then it must stay so.
            sys.exit(errors.INTERRUPTED)
        if job.cluster == "debug" or self.asked in (signal.SIGTERM, signal.SIGINT):
            raise Failed(errors.INTERRUPTED, message)
        most = min(self.max_attempts, LOCAL_ATTEMPTS) if job.cluster == "local" else self.max_attempts
        if self.attempt + 1 >= most:
            raise Failed(errors.INTERRUPTED, f"{message}; that was the last attempt (--attempts; 6 on this machine)")
        if job.global_rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while True:
                signal.pause()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends this task as well
        number = job._usr_sig()
        self.before[number](number, None)  # calls checkpoint(), queues the job again and leaves

    def checkpoint(self) -> Any:
        """The submission that comes after this attempt, for submitit. The ranks have saved by now."""
        from submitit.helpers import DelayedSubmission

        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return DelayedSubmission(Ranks(**{**fields, "attempt": self.attempt + 1}))


class Failed(Exception):
    """A command ended with a status that starting it again would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def __str__(self) -> str:
        return f"status {self.status}: {self.message}"


# ---------------------------------------------------------------- what is to be run


def make_plan(options: argparse.Namespace) -> Plan:
    """What was asked for as jobs. UserError for settings that training would refuse."""
    words = options.words
    if options.what == "sweep":
        return job_plan.sweep(words, options.grid or [])
    if options.what == "kfold":
        if not options.folds:
            raise UserError("kfold needs --folds K, and a test folder in --data")
        return job_plan.kfold(words, folds=options.folds, seeds=options.seeds, data=options.data)
    if options.what == "predict":
        return Plan(jobs=[[("vac_ddp.predict", ["--", *words])]])
    job_plan.run_dir(words)
    return Plan(jobs=[[(job_plan.train_module(), words)]])


# ---------------------------------------------------------------- the launcher


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `words` is what stands behind `--`."""
    argv = list(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="submitit_train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("train", "predict", "kfold", "sweep"))
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm")
    add("--nodes", type=int, default=1)
    add("--gpus", type=int, default=0, help="GPUs a node")
    add("--ranks", type=int, help="ranks a node (default: one a GPU; 1 without GPUs)")
    add("--cpus", type=int, default=8, help="CPUs a node")
    add("--time", type=int, metavar="MIN", help="time limit in minutes (default: 480; local: none)")
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint")
    add("--exclude")
    add("--parallel", type=int, default=256, metavar="N", help="jobs of an array at the same time")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line before the job, as 'module load cuda'")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    add("--name", default="vac", help="name of the job")
    add("--logs", default="submitit", metavar="DIR", help="folder of logs and state, seen by all nodes")
    add("--min-nodes", type=int, metavar="N", help="go on with so many nodes when others fail")
    add("--max-restarts", type=int, default=3, metavar="N", help="restarts of the ranks within a job")
    add("--attempts", type=int, default=100, metavar="N", help="attempts of a job, the first included")
    add("--warn", type=int, default=60, metavar="S", help="seconds before the end at which SLURM sends its signal")
    add("--folds", type=int, metavar="K", help="kfold: number of folds")
    add("--seeds", default="0", metavar="S,S", help="kfold: seeds, each with all folds")
    add("--data", default="data_test", metavar="DIR", help="kfold: the folder to predict")
    add("--grid", nargs="+", metavar="SETTING=V,V", help="sweep: settings and their values")
    add("--no-wait", action="store_true", help="submit, say how to follow, and leave")
    options = parser.parse_args(argv[:place])
    options.words = argv[place + 1 :]
    if options.cluster != "slurm" and options.nodes > 1:
        raise UserError(f"--nodes {options.nodes} needs --cluster slurm: this machine is one node")
    return options


def make_executor(options: argparse.Namespace) -> Any:
    """The executor of submitit, with everything that was asked for."""
    import submitit

    folder = Path(options.logs).resolve()
    given: dict[str, Any] = {"name": options.name, "nodes": options.nodes, "tasks_per_node": 1}
    if options.cluster == "debug":
        return submitit.AutoExecutor(folder=folder, cluster="debug")
    if options.cluster == "local":
        executor = submitit.AutoExecutor(folder=folder, cluster="local", local_max_num_timeout=NEVER)
        forever = 60 * 24 * 365
        executor.update_parameters(**given, gpus_per_node=options.gpus, timeout_min=options.time or forever)
        return executor
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=NEVER)
    more: dict[str, Any] = {"requeue": True, **dict(word.split("=", 1) for word in options.slurm)}
    srun = ["--kill-on-bad-exit=0", f"--cpus-per-task={options.cpus}"]
    if options.min_nodes:
        more["no-kill"] = True
        srun.append("--no-kill")
    if options.gpus:
        given["gpus_per_node"] = options.gpus
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        if getattr(options, name):
            given[f"slurm_{name}"] = getattr(options, name)
    executor.update_parameters(
        **given,
        timeout_min=options.time or 480,
        cpus_per_task=options.cpus,
        slurm_setup=options.setup or None,
        slurm_signal_delay_s=options.warn,
        slurm_array_parallelism=options.parallel,
        slurm_additional_parameters=more,
        slurm_srun_args=srun,
    )
    return executor


def say_how(options: argparse.Namespace, jobs: Sequence[Any], plan: Plan) -> None:
    """Job ids, log paths, and how to follow, cancel and resume."""
    for job in jobs:
        print(f"job      {job.job_id:<10} {job.paths.stdout}")
    print(f"follow   tail -F {jobs[0].paths.stdout}")
    if options.cluster == "slurm":
        print(f"state    squeue --job={jobs[0].job_id.split('_')[0]}")
        print(f"cancel   scancel {jobs[0].job_id.split('_')[0]}")
    else:
        print(f"cancel   kill {' '.join(job.job_id for job in jobs)}")
    print(
        "resume   the same command with run.resume=auto, where a job was cancelled or failed; preempted ones come back"
    )
    if plan.finish:
        print(f"summary  {shlex.join([sys.executable, '-m', 'vac_ddp.cli', *plan.finish])}", flush=True)


def outcome(options: argparse.Namespace, job: Any) -> tuple[int, str] | None:
    """(status, message) of a job that has ended; None for one that has not."""
    if options.cluster == "debug":
        return job.result()["status"], ""
    if not job.paths.result_pickle.exists():
        if options.cluster == "local":
            gone = job.done()
        else:
            asked = subprocess.run(["squeue", "-h", "-j", job.job_id], capture_output=True, text=True)
            gone = not asked.stdout.strip() and (asked.returncode == 0 or "Invalid job" in asked.stderr)
        if not gone:
            return None
        time.sleep(2)  # written as the job went, by another machine
        if not job.paths.result_pickle.exists():
            return errors.FAILED, "ended without a word: cancelled, or killed"
    from submitit.core import utils

    kind, said = utils.pickle_load(job.paths.result_pickle)
    if kind == "success":
        return said["status"], said["message"]
    told = re.search(r"Failed: status (\d+): (.*)", said)
    return (int(told[1]), told[2]) if told else (errors.FAILED, said.strip().splitlines()[-1])


def wait(options: argparse.Namespace, jobs: Sequence[Any]) -> int:
    """Wait for all jobs, a line for each that ends; the worst status."""
    found: dict[str, int] = {}
    while len(found) < len(jobs):
        for job in jobs:
            ended = None if job.job_id in found else outcome(options, job)
            if ended is not None:
                found[job.job_id] = ended[0]
                print(f"job {job.job_id} ended with status {ended[0]}: {ended[1]}", flush=True)
        time.sleep(0 if options.cluster == "debug" else 1)
    bad = [status for status in found.values() if status not in (errors.DONE, errors.FINDINGS)]
    return bad[0] if bad else max(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, say how to follow, wait, put together; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    plan = make_plan(options)
    os.environ["PYTHONPATH"] = f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    executor = make_executor(options)
    made = [
        Ranks(
            commands=commands,
            ranks=options.ranks or options.gpus or 1,
            folder=str(Path(options.logs).resolve()),
            min_nodes=options.min_nodes,
            max_restarts=options.max_restarts,
            max_attempts=options.attempts,
        )
        for commands in plan.jobs
    ]
    if options.cluster == "slurm":
        with executor.batch():
            jobs = [executor.submit(ranks) for ranks in made]
        say_how(options, jobs, plan)
        status = errors.DONE if options.no_wait else wait(options, jobs)
    else:  # one after the other: they have one machine
        status = errors.DONE
        for ranks in made:
            jobs = [executor.submit(ranks)]
            say_how(options, jobs, plan)
            status = max(status, errors.DONE if options.no_wait else wait(options, jobs))
    if options.no_wait:
        return errors.DONE
    if status in (errors.DONE, errors.FINDINGS) and plan.finish:
        status = max(status, subprocess.run([sys.executable, "-m", "vac_ddp.cli", *plan.finish]).returncode)
    return status


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
