"""Submitting to the tests' own Slurm and watching what becomes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests/ilf_tiny.yaml"
STEPS = 8
# Two nodes, one process each.
SHAPE = ("slurm.nodes=2", "slurm.gpus_per_node=0")
RUN = (
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=12",
    "trainer.save_every=3",
    "trainer.log_every=1",
)
SECONDS = 240.0


class Jobs:
    """Jobs of one cluster, submitted from one folder."""

    def __init__(self, cluster: Any, folder: Path, backbone: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.words = [f"recipe={RECIPE}", f'backbone.name="{backbone}"', "evaluate=false", *RUN]
        self.environment = cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    @property
    def outputs(self) -> Path:
        """Where the runs of the tests' recipe are."""
        return self.folder / "outputs" / RECIPE.stem

    def submit(self, *words: str) -> str:
        """`python -m trainers.submit` of the tests' recipe; returns the job's id."""
        # The nodes' names are known to Slurm alone.
        setup = "slurm.setup=['export MASTER_ADDR=127.0.0.1']"
        done = self.run(sys.executable, "-m", "trainers.submit", *self.words, setup, *words)
        assert done.returncode == 0, done.stderr
        found = re.match(r"job (\d+): ", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    def submit_script(self, script: str) -> str:
        """`sbatch` of a user's own script; its log is where `log` finds it."""
        self.log("x").parent.mkdir(parents=True, exist_ok=True)
        path = self.folder / "own.sh"
        path.write_text(script)
        done = self.run("sbatch", "--parsable", "--output=outputs/ilf_tiny/slurm/%j.log", str(path))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command typed in the folder."""
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120
        )

    def log(self, job: str) -> Path:
        """What the job's processes printed."""
        return self.outputs / "slurm" / f"{job}.log"

    def told(self, job: str) -> str:
        """The log so far."""
        return self.log(job).read_text(errors="replace") if self.log(job).is_file() else ""

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.call("scontrol", "show", "job", "--oneliner", job)))

    def wait_for_state(self, job: str, wanted: str) -> None:
        """Return when the job has this state."""

        def reached() -> bool:
            state = self.state(job).get("JobState")
            assert state == wanted or state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), (
                f"{state} instead of {wanted}\n{self.told(job)}\n{self.cluster.logs()}"
            )
            return state == wanted

        self._wait(reached, job, f"{wanted}, {self.state(job)}")

    def wait_for_text(self, job: str, text: str, times: int = 1) -> None:
        """Return when the log has this text so many times."""
        self._wait(lambda: self.told(job).count(text) >= times, job, text)

    def _wait(self, reached: Callable[[], bool], job: str, wanted: str) -> None:
        end = time.monotonic() + SECONDS
        while not reached():
            if time.monotonic() > end:
                raise AssertionError(f"not within {SECONDS} s: {wanted}\n{self.told(job)}\n{self.cluster.logs()}")
            time.sleep(0.1)

    def adapter(self, run: str) -> bytes:
        """The adapter's tensors of a run that has ended."""
        return (self.outputs / run / "adapter/adapter_model.safetensors").read_bytes()

    def steps_told(self, job: str) -> list[int]:
        """Updates that the log reports, in order, over all restarts."""
        return [int(step) for step in re.findall(rf"^step (\d+)/{STEPS} ", self.told(job), flags=re.M)]

    def signal_rank(self, job: str, rank: int, signum: signal.Signals) -> None:
        """A signal to one process of a job and to no other."""
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if b"trainers.fit" in (process / "cmdline").read_bytes().split(b"\0"):
                    if wanted <= set((process / "environ").read_bytes().decode(errors="replace").split("\0")):
                        found.append(int(process.name))
            except OSError:
                continue
        assert len(found) == 1, found
        os.kill(found[0], signum)

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free."""
        self.cluster.call("scancel", "--user=root")
        end = time.monotonic() + 30
        while self.cluster.call("squeue", "-h", "-o", "%A") and time.monotonic() < end:
            time.sleep(0.1)
