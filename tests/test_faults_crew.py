"""A run of two processes of which one fails: both end soon, one sentence says which and why, no process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from trainers.crew import REASON_SECONDS, Crew, Reason, Seats
from trainers.failures import FAILED, LOST, NOT_FINITE
from trainers.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("fault_run.py")
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"} and not name.startswith("SLURM_")
} | {"OMP_NUM_THREADS": "1"}


def start(task: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    """A run of the task in processes of its own, which share a group."""
    settings = ["evaluate=false", "trainer.accelerator=cpu", "trainer.max_steps=6", "trainer.save_every=2"]
    recipe = words if words and words[0].startswith("resume=") else ["recipe=ilf_pixart", *settings, "run=a", *words]
    return subprocess.Popen(
        [sys.executable, SCRIPT, task, *recipe],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Exit code, and the one sentence of a run that leaves no process behind."""
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    until = time.monotonic() + 10  # the pipes are closed a moment before a process has gone
    while living(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not living(process.pid)
    assert "Traceback" not in told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told
    return process.returncode, errors[0]


def living(group: int) -> list[str]:
    """Processes of a group, without those that have ended and whose parent has not asked for their exit code."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, member_of = path.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                found.append(path.parent.name)
    return found


CASES = {
    "NaNOnSecond": (NOT_FINITE, "error: the loss is not finite at step 3, batch 3 of rank 1 (samples "),
    "KillSecond": (LOST, "process 1 of 2 ended without a word (killed by SIGKILL, or out of memory)"),
    "KillFirst": (-signal.SIGKILL, "process 0 of 2 ended without a word (killed, or out of memory)"),
    "KillSecondWhileFirstIsBusy": (LOST, "process 1 of 2 ended without a word (killed by SIGKILL, or out of memory)"),
}


@pytest.mark.parametrize(
    "task", [name if name == "NaNOnSecond" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_when_one_of_two_fails_both_end_with_one_sentence(task: str, tmp_path: Path) -> None:
    code, sentence = CASES[task]
    process = start(task, tmp_path, "trainer.devices=2")
    assert process.stdout is not None
    assert (got := ended(process))[0] == code
    assert sentence in got[1] and "step_0000002.ckpt is kept, continue with resume=outputs/ilf_pixart/a" in got[1]
    folder = RunFolder(tmp_path / "outputs/ilf_pixart/a")
    assert folder.latest_checkpoint().name == "step_0000002.ckpt"
    assert not list(folder.path.rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["SecondCannotStart", "SecondIsKilledAtTheStart"])
def test_a_process_that_cannot_start_ends_the_one_that_waits_for_it(task: str, tmp_path: Path) -> None:
    code, sentence = ended(start(task, tmp_path, "trainer.devices=2"))
    if task == "SecondCannotStart":
        assert code == FAILED and "process 1" in sentence and "latents.json may not be opened by this user" in sentence
    else:
        assert code == LOST and "process 1 of 2 ended without a word (killed by SIGKILL" in sentence
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").rglob("a/*"))


@pytest.mark.slow
def test_two_processes_resume_to_the_numbers_of_a_run_that_none_left(tmp_path: Path) -> None:
    ended(start("KillSecond", tmp_path, "trainer.devices=2"))
    resumed = start("Tiny", tmp_path, "resume=outputs/ilf_pixart/a")
    assert resumed.communicate(timeout=240) and resumed.returncode == 0
    whole = start("Tiny", tmp_path, "trainer.devices=2", "output_dir=whole")
    assert whole.communicate(timeout=240) and whole.returncode == 0
    runs = [tmp_path / home / "ilf_pixart/a" for home in ("outputs", "whole")]
    one, other = ((run / "adapter/adapter_model.safetensors").read_bytes() for run in runs)
    assert one == other
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


@pytest.mark.slow
def test_a_living_run_is_not_resumed_beside_itself(tmp_path: Path) -> None:
    first = start("Waits", tmp_path)
    try:
        assert first.stdout is not None and any(line == "waiting\n" for line in first.stdout)
        code, sentence = ended(start("Tiny", tmp_path, "resume=outputs/ilf_pixart/a"))
        assert code == 2 and f"is being written by process {first.pid} on " in sentence
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


OTHER = """
import sys, time
from pathlib import Path
from trainers.crew import Seats
seats = Seats(Path(sys.argv[1]), 1)
assert seats.take() and not seats.is_empty(0) and seats.is_empty(2)
print("sits", flush=True)
time.sleep(600)
"""


def test_an_empty_seat_is_seen_however_its_process_ended(tmp_path: Path) -> None:
    mine = Seats(tmp_path, 0)
    assert not Seats(tmp_path, 1).take(), "the first process makes the file"
    assert mine.take() and mine.is_empty(1)
    root = Path(sys.modules[Seats.__module__].__file__).parents[1]
    other = subprocess.Popen([sys.executable, "-c", OTHER, tmp_path], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "sits\n"
        assert not mine.is_empty(1)
    finally:
        other.kill()
        other.communicate()
    assert mine.is_empty(1)
    mine.leave()
    assert not list(tmp_path.iterdir())


def test_the_first_to_know_tells_and_a_reason_of_an_earlier_start_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainers.failures import Failure

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    severed = Failure("Connection closed by peer", LOST, severed=True)
    first, second = (Crew(tmp_path, number, lambda: "go on") for number in (0, 1))
    assert second.tell(Failure("memory ran out", 9)) == 9
    began = time.monotonic()
    assert first.tell(severed) == 9 and time.monotonic() - began < REASON_SECONDS
    assert capsys.readouterr().err == "error: process 1 of 2: memory ran out; go on\n"
    monkeypatch.setenv("MASTER_PORT", "2")
    assert Reason(tmp_path).code() is None
    assert first.tell(Failure("the disk is full")) == FAILED
    assert capsys.readouterr().err == "error: process 0 of 2: the disk is full; go on\n"
