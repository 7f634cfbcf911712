"""The SLURM job that a run is part of, and how it is queued again.  Torch-free."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass

from trainers.launch import in_a_shell

LIMIT_KEY = "AFTERBURNER_MAX_REQUEUES"
MAX_REQUEUES = 50
_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """The job around this process: `id` is what scontrol takes and the run's folder is called, as 17 or 16_3."""

    id: str
    restarts: int

    @property
    def limit(self) -> int:
        """How often a run may queue itself again."""
        given = os.environ.get(LIMIT_KEY, "")
        return int(given) if given.isdigit() else MAX_REQUEUES


@dataclass(frozen=True)
class Requeue:
    """Whether a job was queued again, and a clause that says so, or why not."""

    done: bool
    text: str


def current_job() -> Job | None:
    """The job this process runs in, or None; None also in a shell that salloc or srun opened, where one types many."""
    known = os.environ
    if "SLURM_JOB_ID" not in known or in_a_shell():
        return None
    job = known["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in known:
        job = f"{known['SLURM_ARRAY_JOB_ID']}_{known['SLURM_ARRAY_TASK_ID']}"
    return Job(job, int(known.get("SLURM_RESTART_COUNT", "0")))


def requeue(signum: int) -> Requeue | None:
    """Queue this job again if the signal means that its nodes are wanted back.  To be called by one process.

    SIGUSR1 and SIGUSR2 are warnings: of the time limit, or of whatever the user sends.  SIGTERM is the beginning of
    preemption if the job is still said to be running; else somebody cancelled or requeued it already, and queueing
    a cancelled job again would bring it back to life.

    Returns:
        None: there is no job, or it is not to be queued again by us.
    """
    job = current_job()
    if job is None or signum not in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        return None
    told = _scontrol("show", "job", "--oneliner", job.id)
    fields = dict(re.findall(r"(\S+?)=(\S*)", told.stdout.partition("\n")[0]))
    preempted = fields.get("PreemptTime", "None") != "None"
    if fields.get("JobState", "RUNNING") != "RUNNING" or (signum == signal.SIGTERM and not preempted):
        return None
    if job.restarts >= job.limit:
        return Requeue(False, f"job {job.id} was restarted {job.restarts} times and is not queued again ({LIMIT_KEY})")
    done = _scontrol("requeue", job.id)
    if done.returncode != 0:
        return Requeue(False, f"job {job.id} cannot be queued again ({' '.join(done.stderr.split()) or 'no answer'})")
    return Requeue(True, f"job {job.id} is queued again (restart {job.restarts + 1} of at most {job.limit})")


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    # A requeue begins with a SIGTERM to all processes of the job, this one included, before it has its answer.
    command = ["sh", "-c", "trap '' TERM USR1 USR2; exec scontrol \"$@\"", "scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {_SECONDS} s")
