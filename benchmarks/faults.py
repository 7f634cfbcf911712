"""Kill training at any moment and go on: `python -m benchmarks.faults [kills=50 seed=0 processes=1] [--save]`.

Real runs of `trainers.fit` are killed (SIGKILL) again and again, half the time at a moment drawn from the whole length
of a run, start-up included, half the time while a checkpoint is being written, and resumed until they end.  Each must
end with the tensors of a run that nobody killed, bit for bit, and leave nothing behind.  With two or more processes one
of them is killed, and the others must say so and end by themselves.  Bar: no run lost.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import results
from trainers import recipes
from trainers.callbacks import read_checkpoint
from trainers.run_folder import RunFolder

STEPS = 16
RUN = [
    "recipe=ilf_dit", "evaluate=false", f"trainer.max_steps={STEPS}", "trainer.save_every=1", "trainer.log_every=1",
    "trainer.sample_every=0", "trainer.accelerator=cpu", "data.trajectories=8", "data.holdout=0", "data.batch_size=1",
]  # fmt: skip
MOST_KILLS_OF_A_RUN = 8
SURVIVORS_END_SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Tally:
    """What happened to all runs."""

    kills: int = 0
    in_a_save: int = 0
    before_a_checkpoint: int = 0
    resumes: int = 0
    lost: list[str] = field(default_factory=list)
    slowest_end: float = 0.0


class Command:
    """One start of a run: its processes and what it said."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            command = [sys.executable, "-m", "trainers.fit", *words]
            # Two threads would wait for each other whenever something else runs, and prolong every run manyfold.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.started = time.monotonic()

    def pids(self) -> list[int]:
        """The first process, and those that it has started for training."""
        first = self.process.pid
        try:
            children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            return [first, *(pid for pid in map(int, children) if b"trainers.fit" in _command_line(pid))]
        except OSError:
            return [first]

    def kill_one(self, chance: random.Random) -> int:
        """Kill one process; returns how many others there are."""
        pids = self.pids()
        self.survivors = set(pids)
        victim = chance.choice(pids)
        os.kill(victim, signal.SIGKILL)
        self.survivors.discard(victim)
        return len(self.survivors)

    def seconds_until_all_have_ended(self) -> float:
        """How long the other processes took; they are ended by force when that is too long."""
        started = time.monotonic()
        while time.monotonic() - started < SURVIVORS_END_SECONDS:
            ended = self.process.poll() is not None
            if ended and not any(b"trainers.fit" in _command_line(pid) for pid in self.survivors):
                return time.monotonic() - started
            time.sleep(0.02)
        for pid in self.survivors:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return float("inf")


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def saving(folder: Path) -> set[str]:
    """Names of the checkpoints that are being written."""
    try:
        return {name for name in os.listdir(folder / "checkpoints") if name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def wait_for_the_moment(command: Command, folder: Path, length: float, in_a_save: bool, chance: random.Random) -> bool:
    """Sleep until it is time to kill; False when the run ended first."""
    if not in_a_save:
        until = command.started + chance.uniform(0, length)
        while time.monotonic() < until and command.process.poll() is None:
            time.sleep(0.01)
        return command.process.poll() is None
    seen, wanted = saving(folder), chance.randint(1, 5)
    while command.process.poll() is None:
        new = saving(folder) - seen
        seen |= new
        wanted -= len(new)
        if wanted <= 0:
            time.sleep(chance.uniform(0, 0.01))
            return True
        time.sleep(0.0005)
    return False


def one_run(home: Path, name: str, words: list[str], length: float, kills: int, tally: Tally, chance: Any) -> None:
    """Start a run, kill it `kills` times, let it end, and count what is wrong."""
    folder, log = home / "ilf_dit" / name, home / f"{name}.txt"
    stored = folder / "config.yaml"
    for _ in range(kills):
        command = Command([f"resume={folder}"] if stored.exists() else [*words, f"run={name}"], log)
        if not wait_for_the_moment(command, folder, length, chance.random() < 0.5, chance):
            break  # it ended before its turn came; whether well is seen below
        others = command.kill_one(chance)
        seconds = command.seconds_until_all_have_ended()
        tally.kills += 1
        tally.in_a_save += bool(saving(folder))
        tally.before_a_checkpoint += RunFolder(folder).latest_checkpoint() is None
        tally.slowest_end = max(tally.slowest_end, seconds)
        said = log.read_text(encoding="utf-8", errors="replace")
        if seconds == float("inf"):
            tally.lost.append(f"{name}: processes left over")
        if "Traceback" in said or (others and said.count("error: ") != 1):
            tally.lost.append(f"{name}: the {others} others said {said[-300:]!r}")
        tally.resumes += 1
    command = Command([f"resume={folder}"] if stored.exists() else [*words, f"run={name}"], log)
    if command.process.wait() != 0:
        tally.lost.append(f"{name}: {log.read_text(encoding='utf-8', errors='replace')[-300:]!r}")


def differences(run: Path, whole: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    found = []
    ours, theirs = (RunFolder(folder).latest_checkpoint() for folder in (run, whole))
    if ours is None or theirs is None or ours.name != theirs.name:
        return [f"{run.name}: its newest checkpoint is {ours}, not {theirs}"]
    pairs = [(read_checkpoint(ours)["state_dict"], read_checkpoint(theirs)["state_dict"])]
    pairs += [tuple(load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, whole))]
    for mine, wanted in pairs:
        different = [name for name in wanted if name not in mine or not torch.equal(mine[name], wanted[name])]
        found += [f"{run.name}: {different[0]} differs ({len(different)} do)"] if different else []
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (run, whole)]
    found += [f"{run.name}: {path} is there only once" for path in sorted(names[0] ^ names[1])]
    with (run / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    return found + ([] if steps == list(range(1, STEPS + 1)) else [f"{run.name}: metrics.csv has the steps {steps}"])


def main() -> int:
    """Kill, resume, compare; returns 1 when a run was lost, 2 for a refused command."""
    line = recipes.read_command_line(sys.argv[1:], ["--save"])
    try:
        kills, seed, processes = (int(line.take(key) or default) for key, default in
                                  (("kills", 50), ("seed", 0), ("processes", 1)))  # fmt: skip
    except ValueError as error:
        line.problems.append(f"kills, seed and processes are integers ({error})")
    if line.problems or line.overrides:
        print("\n".join([*line.problems, *(f"unknown key {key}" for key in line.overrides)]), file=sys.stderr)
        return 2
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        words = [*RUN, f"trainer.devices={processes}", f"output_dir={home}"]
        whole = Command([*words, "run=whole"], home / "whole.txt")
        if whole.process.wait() != 0:
            print(whole.log.read_text(encoding="utf-8"), file=sys.stderr)
            return 1
        length = time.monotonic() - whole.started
        print(f"a run of {STEPS} updates with a checkpoint after each takes {length:.1f} s", flush=True)
        print("run       kills  in a save  lost so far")
        runs = 0
        while tally.kills < kills:
            name, before = f"{runs:03d}", (tally.kills, tally.in_a_save)
            wanted = min(chance.randint(1, MOST_KILLS_OF_A_RUN), kills - tally.kills)
            one_run(home, name, words, length, wanted, tally, chance)
            tally.lost += differences(home / "ilf_dit" / name, home / "ilf_dit/whole")
            runs += 1
            print(
                f"{name:8}{tally.kills - before[0]:7}{tally.in_a_save - before[1]:11}{len(tally.lost):13}", flush=True
            )
    print("\n".join(tally.lost))
    print(
        f"{tally.kills} kills ({tally.in_a_save} inside a save, {tally.before_a_checkpoint} before any checkpoint), "
        f"{tally.resumes} resumes, {runs} runs, {len(tally.lost)} lost; bar 0"
        + (f"; the other processes ended within {tally.slowest_end:.1f} s" if processes > 1 else "")
    )
    if "--save" in line.options:
        row = {"processes": processes, "runs": runs, "kills": tally.kills, "in_a_save": tally.in_a_save,
               "before_a_checkpoint": tally.before_a_checkpoint, "resumes": tally.resumes, "lost": len(tally.lost),
               "slowest_end_s": f"{tally.slowest_end:.1f}", "seed": seed}  # fmt: skip
        print(f"row added to {results.append('faults', [row])}")
    return int(bool(tally.lost))


if __name__ == "__main__":
    sys.exit(main())
