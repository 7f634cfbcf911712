"""Runs under real Slurm daemons: whatever takes their nodes away, they end with the adapter of a run left in peace."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time

import pytest

from tests.slurm.jobs import RECIPE, SHAPE, STEPS, Jobs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
WHOLE = list(range(1, STEPS + 1))


def checked_end(jobs: Jobs, job: str, undisturbed: bytes, restarts: int) -> None:
    """The job ended after so many restarts, in one folder, with the adapter of the run that nothing disturbed."""
    jobs.wait_for_state(job, "COMPLETED")
    assert jobs.adapter(job) == undisturbed, jobs.told(job)
    assert jobs.state(job)["Restarts"] == str(restarts)
    record = json.loads((jobs.outputs / job / "provenance.json").read_text())
    assert len(record["resumed"]) == restarts
    rows = list(csv.DictReader((jobs.outputs / job / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == WHOLE


def test_a_run_on_two_nodes_ends(jobs: Jobs, strategy: str, undisturbed: bytes) -> None:
    run = next(path for path in jobs.outputs.iterdir() if path.name.isdigit())
    assert jobs.steps_told(run.name) == WHOLE
    stored = (run / "config.yaml").read_text()
    assert "num_nodes: 2" in stored and f"strategy: {strategy}" in stored
    assert (run.parent / "slurm" / f"{run.name}.sh").read_text().startswith("#!/bin/bash\n#SBATCH")


def test_preempted_it_saves_queues_itself_and_goes_on_at_that_step(
    jobs: Jobs, strategy: str, undisturbed: bytes
) -> None:
    job = jobs.submit(*SHAPE, f"trainer.strategy={strategy}")
    jobs.wait_for_text(job, "step 2/")
    urgent = jobs.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1")
    jobs.wait_for_text(job, "stopped by SIGTERM after step")
    jobs.wait_for_state(urgent.stdout.strip(), "COMPLETED")
    checked_end(jobs, job, undisturbed, restarts=1)
    assert f"job {job} is queued again (restart 1 of at most 50)" in jobs.told(job)
    assert jobs.steps_told(job) == WHOLE  # no update was made twice


def test_zero_on_two_nodes_goes_on_after_a_warning_as_if_there_had_been_none(jobs: Jobs) -> None:
    pytest.importorskip("deepspeed")
    whole = jobs.submit(*SHAPE, "trainer.strategy=deepspeed_2")
    jobs.wait_for_state(whole, "COMPLETED")
    job = jobs.submit(*SHAPE, "trainer.strategy=deepspeed_2")
    jobs.wait_for_text(job, "step 2/")
    jobs.cluster.call("scancel", "--signal=USR1", job, check=True)
    jobs.wait_for_text(job, "stopped by SIGUSR1 after step")
    checked_end(jobs, job, jobs.adapter(whole), restarts=1)


def test_a_warning_to_one_rank_of_a_users_own_script_stops_all_at_one_step(jobs: Jobs, undisturbed: bytes) -> None:
    fit = " ".join(f"'{word}'" for word in jobs.words)
    head = "#!/bin/bash\n#SBATCH -N1 --ntasks-per-node=2 -t 10 --requeue --open-mode=append\n"
    job = jobs.submit_script(f"{head}export MASTER_ADDR=127.0.0.1\nsrun -K1 {sys.executable} -m trainers.fit {fit}\n")
    jobs.wait_for_text(job, "step 3/")
    jobs.signal_rank(job, 1, signal.SIGUSR1)
    jobs.wait_for_text(job, "stopped by SIGUSR1 after step")
    checked_end(jobs, job, undisturbed, restarts=1)
    assert jobs.steps_told(job) == WHOLE


def test_requeued_by_hand_and_losing_a_node_it_goes_on(jobs: Jobs, strategy: str, undisturbed: bytes) -> None:
    job = jobs.submit(*SHAPE, f"trainer.strategy={strategy}")
    jobs.wait_for_text(job, "step 1/")
    jobs.cluster.call("scontrol", "requeue", job, check=True)
    jobs.wait_for_text(job, "stopped by SIGTERM after step")
    stopped = jobs.steps_told(job)[-1]
    jobs.wait_for_text(job, f"step {max(4, stopped + 1)}/")
    assert jobs.steps_told(job) == list(range(1, jobs.steps_told(job)[-1] + 1))
    jobs.cluster.lose_node("n2")
    try:
        jobs.wait_for_text(job, "DUE TO NODE FAILURE")
        jobs.cluster.call("scontrol", "hold", job, check=True)
    finally:
        jobs.cluster.start_node("n2")
    jobs.cluster.wait_for_nodes()
    # Slurm still sends the returned node orders to end what the job had there; they know the job's number only.
    time.sleep(10)
    jobs.cluster.call("scontrol", "release", job, check=True)
    checked_end(jobs, job, undisturbed, restarts=2)
    # Nothing up to the last checkpoint is made again.
    steps = jobs.steps_told(job)
    again = [step for step in WHOLE if steps.count(step) > 1]
    assert sorted(set(steps)) == WHOLE and all(steps.count(step) == 2 and step > 3 for step in again)


def test_the_warning_of_the_time_limit_is_heard(jobs: Jobs) -> None:
    job = jobs.submit("slurm.gpus_per_node=0", "slurm.time=30", "slurm.signal=USR2@100", "trainer.max_steps=100000")
    jobs.wait_for_text(job, "step 2/")
    minutes, seconds = map(int, jobs.state(job)["RunTime"].split(":")[-2:])
    jobs.cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}", check=True)
    jobs.wait_for_text(job, "stopped by SIGUSR2 after step")
    jobs.wait_for_text(job, f"job {job} is queued again")
    jobs.wait_for_state(job, "PENDING")


def test_a_run_that_may_not_queue_itself_stops_with_its_checkpoint(jobs: Jobs) -> None:
    job = jobs.submit("slurm.gpus_per_node=0", "slurm.max_requeues=0")
    jobs.wait_for_text(job, "step 1/")
    jobs.cluster.call("scancel", "--signal=USR1", job, check=True)
    jobs.wait_for_state(job, "FAILED")
    assert f"job {job} was restarted 0 times and is not queued again" in jobs.told(job)
    assert list((jobs.outputs / job / "checkpoints").iterdir()) and jobs.state(job)["Restarts"] == "0"


def test_a_cancelled_run_saves_and_stays_cancelled(jobs: Jobs) -> None:
    job = jobs.submit("slurm.gpus_per_node=0")
    jobs.wait_for_text(job, "step 1/")
    jobs.cluster.call("scancel", job, check=True)
    jobs.wait_for_text(job, "stopped by SIGTERM after step")
    jobs.wait_for_state(job, "CANCELLED")
    assert list((jobs.outputs / job / "checkpoints").iterdir()) and jobs.state(job)["Restarts"] == "0"


def test_a_sweep_is_one_array_with_a_run_for_each_value(jobs: Jobs) -> None:
    job = jobs.submit("slurm.gpus_per_node=0", "seed=0,1", "trainer.max_steps=2")
    for index in (0, 1):
        jobs.wait_for_text(f"{job}_{index}", "\nfolder  ")
        stored = (jobs.outputs / f"{job}_{index}" / "config.yaml").read_text()
        assert f"\nseed: {index}\n" in stored
    assert jobs.adapter(f"{job}_0") != jobs.adapter(f"{job}_1")


def test_a_wrong_recipe_fails_with_its_sentence(jobs: Jobs) -> None:
    fit = f"srun -K1 {sys.executable} -m trainers.fit recipe={RECIPE} trainer.max_stepz=3"
    job = jobs.submit_script(f"#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=1 -t 10\n{fit}\n")
    jobs.wait_for_state(job, "FAILED")
    assert "error: unknown key trainer.max_stepz: the nearest key is trainer.max_steps" in jobs.told(job)
