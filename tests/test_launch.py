"""Who started the processes, what SLURM is asked on which signal, and runs that torchrun starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_ilf import RECIPE, save_tiny
from trainers import launch, processes, recipes, signals, slurm
from trainers.settings import ConfigError

ROOT = Path(recipes.__file__).parents[1]
SRUN = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "1"}
SHELL = SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in TORCHRUN or name == slurm.LIMIT_KEY:
            monkeypatch.delenv(name)


def told(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        (SRUN, launch.Launch("srun", 3, 2, 4)),
        (SRUN | TORCHRUN, launch.Launch("torchrun", 1, 2, 3)),
        (SHELL, None),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, launch.Launch("srun", 3, 2, 4)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script without srun
    ],
)
def test_who_started_the_processes(environment, wanted, monkeypatch) -> None:
    told(monkeypatch, environment)
    assert launch.current_launch() == wanted
    assert processes.rank(recipes.compose_recipe("ilf_pixart")) == (wanted.rank if wanted else 0)


def test_a_recipe_takes_the_shape_that_it_leaves_open_and_refuses_another(monkeypatch) -> None:
    recipe = recipes.compose_recipe("ilf_pixart")
    assert launch.fitted(recipe, {}) is recipe
    told(monkeypatch, SRUN)
    taken = launch.fitted(recipe, {}).trainer
    assert (taken.devices, taken.num_nodes) == (4, 2)
    for overrides in ({"trainer.devices": "8"}, {"trainer.devices": "1"}, {"trainer.num_nodes": "3"}):
        with pytest.raises(ConfigError, match="srun started 4 processes on each of 2 nodes"):
            launch.fitted(recipes.compose_recipe("ilf_pixart", overrides), overrides)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "5,3")
    with pytest.raises(ConfigError, match="unevenly"):
        launch.current_launch()


def test_lightning_is_told_who_started_the_processes(monkeypatch) -> None:
    assert launch.cluster_plugins() == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [type(found).__name__ for found in launch.cluster_plugins()] == ["LightningEnvironment"]
    told(monkeypatch, SRUN | {"SLURM_NTASKS": "8"})
    (found,) = launch.cluster_plugins()
    assert type(found).__name__ == "SLURMEnvironment" and not found.auto_requeue
    assert os.environ.pop("SLURM_NTASKS_PER_NODE") == "4"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in that shows a job of these fields and writes down what else it is asked."""

    def answer(fields: str, code: int = 0) -> None:
        command = f'#!/bin/sh\n[ "$1" = show ] && echo "{fields}" && exit\necho "$@" >> {tmp_path}/asked\n'
        (tmp_path / "scontrol").write_text(f"{command}echo 'not\nallowed' >&2\nexit {code}\n")
        (tmp_path / "scontrol").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told(monkeypatch, SRUN)
    return answer


@pytest.mark.parametrize(
    ("signum", "fields", "wanted"),
    [
        (signal.SIGUSR1, "JobState=RUNNING PreemptTime=None", True),
        (signal.SIGUSR2, "JobState=RUNNING PreemptTime=None", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=None", None),
        (signal.SIGTERM, "JobState=CANCELLED PreemptTime=2026-01-01T00:00:00", None),
        (signal.SIGUSR1, "JobState=CANCELLED", None),
        (signal.SIGUSR1, "JobState=PENDING", None),
        (signal.SIGINT, "JobState=RUNNING", None),
    ],
)
def test_a_job_is_queued_again_only_when_its_nodes_are_wanted_back(signum, fields, wanted, scontrol, tmp_path) -> None:
    scontrol(fields)
    answer = slurm.requeue(signum)
    assert (answer.done if answer else None) is wanted
    assert (tmp_path / "asked").is_file() is bool(wanted)
    if wanted:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
        assert answer.text == "job 7 is queued again (restart 1 of at most 50)"


def test_a_job_that_is_not_queued_again_says_why(scontrol, monkeypatch, tmp_path) -> None:
    scontrol("JobState=RUNNING", code=1)
    assert slurm.requeue(signal.SIGUSR1) == slurm.Requeue(False, "job 7 cannot be queued again (not allowed)")
    told(monkeypatch, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"})
    told(monkeypatch, {slurm.LIMIT_KEY: "3"})
    answer = slurm.requeue(signal.SIGUSR1)
    assert not answer.done and answer.text.startswith("job 5_2 was restarted 3 times")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_no_job_is_asked_about_outside_of_one(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert slurm.requeue(signal.SIGUSR1) is None
    for shell in ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, SHELL):
        told(monkeypatch, shell)
        assert slurm.current_job() is None and slurm.requeue(signal.SIGUSR1) is None


def test_a_noted_signal_is_told_once_and_the_end_outweighs_a_warning() -> None:
    before = signals.handle()
    try:
        assert signals.take_noted() is None
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        assert signals.take_noted() == signal.SIGTERM and signals.take_noted() is None
    finally:
        signals.restore(before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_during_the_imports_does_not_end_the_process(name: str, tmp_path: Path) -> None:
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
sys.argv = ["fit", "--list"]
runpy.run_module("trainers.fit", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "ilf_pixart" in done.stdout, done


def torchrun(tmp_path: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 -m trainers.fit` of the tests' recipe, in a folder of its own."""
    backbone = save_tiny("dit", tmp_path)
    own = [f"recipe={RECIPE}", f"backbone.name={backbone}", "evaluate=false", "trainer.log_every=1", *words]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "-m", "trainers.fit"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    return subprocess.Popen([*command, *own], cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True)


def wait_for(tmp_path: Path, text: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while text not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank, by its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                if f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                    return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.slow
def test_torchrun_gives_shape_and_one_folder(tmp_path: Path) -> None:
    process = torchrun(tmp_path)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    (run,) = (tmp_path / "outputs/ilf_tiny").iterdir()
    assert run.name == "000" and (run / "adapter/adapter_model.safetensors").is_file()
    assert "devices: 2" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_a_signal_to_one_rank_of_a_short_run_stops_both(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "trainer.max_steps=6", "trainer.accumulate_grad_batches=12")
    wait_for(tmp_path, "step 2/6", process)
    os.kill(worker(process, 1), signal.SIGUSR1)
    assert process.wait(300) != 0
    told = (tmp_path / "log").read_text()
    assert told.count("stopped by SIGUSR1 after step") == 1 and "step 6/6" not in told and "exitcode  : 138" in told
    saved = sorted((tmp_path / "outputs/ilf_tiny/000/checkpoints").iterdir())
    assert f"{saved[-1].name} is kept" in told
