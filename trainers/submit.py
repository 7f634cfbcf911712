"""python -m trainers.submit recipe=NAME [slurm.key=value ...] [key=value ...]: a recipe, or a sweep, as a SLURM job."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from trainers import recipes
from trainers.config import RecipeBase, Section, Text
from trainers.failures import LOST
from trainers.fit import composed
from trainers.run_folder import atomic_write
from trainers.settings import ConfigError, help_text, validate
from trainers.slurm import LIMIT_KEY, MAX_REQUEUES

USAGE = """usage: python -m trainers.submit recipe=NAME [slurm.key=value ...] [key=value ...]   submit one job
       python -m trainers.submit recipe=NAME key=a,b,c [key=d,e]                 a job array: every combination
       python -m trainers.submit resume=outputs/RECIPE/RUN [slurm.key=value ...] continue a run as a job

  key=value     any key of the recipe, as for trainers.fit; values with commas outside brackets and quotes are swept
  --print       the batch script, and submit nothing
  --help        this, and every slurm key; the recipe's keys are shown by: python -m trainers.fit --help recipe=NAME"""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GRAIN_SECONDS = 60


class Slurm(Section):
    """What SLURM is asked for."""

    nodes: PositiveInt | None = Field(default=None, description="machines; null takes the recipe's trainer.num_nodes")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs of each node, one process each; 0 runs trainer.devices processes on the CPU; "
        "null takes trainer.devices, or 0 where trainer.accelerator is cpu",
    )
    cpus_per_task: PositiveInt | None = Field(default=None, description="processors of each process; null: SLURM's")
    mem: Text | None = Field(default=None, description="memory of each node, as 64G; null: SLURM's")
    time: Text | None = Field(
        default=None, description="time limit, as 02:00:00, 1-12 (days-hours) or 90 (minutes); null: the partition's"
    )
    partition: Text | None = Field(default=None, description="partition, or several between quotes")
    account: Text | None = Field(default=None, description="account that pays")
    qos: Text | None = Field(default=None, description="quality of service")
    constraint: Text | None = Field(default=None, description="features that the nodes must have")
    job_name: Text | None = Field(default=None, description="name in the queue; null takes the recipe's")
    signal: Text = Field(
        default="USR1@120", description="warning before the time limit, USR1 or USR2, and its seconds of lead"
    )
    setup: list[str] = Field(
        default=[], description="shell lines that run first, as module loads or export MASTER_ADDR"
    )
    sbatch: list[str] = Field(default=[], description="more options of sbatch, as --exclusive or --mail-type=END")
    python: Text | None = Field(default=None, description="interpreter on the nodes; null takes the one that submits")
    max_requeues: int = Field(default=MAX_REQUEUES, ge=0, description="how often the run may queue itself again")
    max_parallel: PositiveInt | None = Field(default=None, description="jobs of a sweep that run at once; null: all")

    @field_validator("time")
    @classmethod
    def _time_is_slurms(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError("minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
        return value

    @field_validator("signal")
    @classmethod
    def _signal_is_one_that_runs_hear(cls, value: str) -> str:
        if not re.fullmatch(r"USR[12]@\d+", value):
            raise ValueError("USR1@SECONDS or USR2@SECONDS")
        return value

    @field_validator("job_name")
    @classmethod
    def _name_is_no_shells(cls, value: str | None) -> str | None:
        if value in ("bash", "interactive"):
            raise ValueError("another name: a job of this one counts as a shell that somebody types in")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options_are_options(cls, value: list[str]) -> list[str]:
        if wrong := [line for line in value if not line.startswith("-") or "\n" in line]:
            raise ValueError(f"options of one line that begin with '-', unlike '{wrong[0]}'")
        return value

    @model_validator(mode="after")
    def _the_warning_comes_within_the_limit(self) -> Slurm:
        lead = int(self.signal.partition("@")[2])
        if self.time is not None and _seconds(self.time) < lead + _GRAIN_SECONDS:
            raise ValueError(
                f"time is {self.time} and the warning comes {lead} s before, and up to {_GRAIN_SECONDS} s earlier: "
                "give more time, or a shorter lead in slurm.signal"
            )
        return self


class SubmitConfig(Section):
    """The keys of the command itself."""

    slurm: Slurm = Field(default_factory=Slurm, description="what SLURM is asked for")


def _seconds(time: str) -> int:
    """SLURM reads one number as minutes, two as MM:SS, but after days the first is hours."""
    match = _TIME.fullmatch(time)
    assert match is not None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = [0, *numbers, 0][:3] if len(numbers) < 3 else numbers
    return hours * 3600 + minutes * 60 + seconds


@dataclass(frozen=True)
class Submission:
    """A checked job: what SLURM is asked for, the command, and the values of each job of a sweep."""

    slurm: Slurm
    recipe: RecipeBase  # of the first job
    words: list[str]  # what trainers.fit is given, in every job
    swept: list[list[str]]  # what it is given in job 0, 1, ...; empty when nothing is swept

    @property
    def logs(self) -> Path:
        """Folder of the jobs' scripts and logs, absolute: SLURM does not make it."""
        return (Path(self.recipe.output_dir) / self.recipe.recipe / "slurm").absolute()

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        if self.slurm.gpus_per_node is not None:
            return self.slurm.gpus_per_node
        return 0 if self.recipe.trainer.accelerator == "cpu" else int(self.recipe.trainer.devices)

    @property
    def script(self) -> str:
        """The batch script."""
        asked, tasks = self.slurm, self.recipe.trainer
        options: dict[str, Any] = {
            "job-name": asked.job_name or self.recipe.recipe,
            "nodes": tasks.num_nodes,
            "ntasks-per-node": tasks.devices,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": asked.cpus_per_task,
            "mem": asked.mem,
            "time": asked.time,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "signal": asked.signal,
            "open-mode": "append",
            "output": f"{str(self.logs).replace('%', '%%')}/{'%A_%a' if self.swept else '%j'}.log",
        }
        if self.swept:
            options["array"] = f"0-{len(self.swept) - 1}" + (f"%{asked.max_parallel}" if asked.max_parallel else "")
        lines = ["#!/bin/bash", *(_option(key, value) for key, value in options.items() if value is not None)]
        lines += ["#SBATCH --requeue", *(f"#SBATCH {line}" for line in asked.sbatch), ""]
        lines += [f"export {LIMIT_KEY}={asked.max_requeues}", *asked.setup]
        # srun does not take the batch job's --cpus-per-task for its own.
        step = ["srun", "--kill-on-bad-exit=1", *([f"--cpus-per-task={n}"] if (n := asked.cpus_per_task) else [])]
        command = [*step, asked.python or sys.executable, "-m", f"{__package__}.fit", *self.words]
        last = shlex.join(command)
        if self.swept:
            cases = [f"{index}) swept=({shlex.join(words)}) ;;" for index, words in enumerate(self.swept)]
            lines += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
            last += ' "${swept[@]}"'
            if self.recipe.run is not None:
                last += f' run={shlex.quote(self.recipe.run)}_"$SLURM_ARRAY_TASK_ID"'
        return "\n".join([*lines, last, *_WAIT_FOR_SLURM, ""])

    @property
    def table(self) -> list[str]:
        """One line for each job of a sweep: its number, what differs, and the name of its run."""
        name = self.recipe.run or "JOB"
        return [f"  {index}: {' '.join(words)}  run={name}_{index}" for index, words in enumerate(self.swept)]


# A process may be lost with its node.  SLURM queues the job again when it misses the node, unless the job ended before.
_WAIT_FOR_SLURM = (
    "code=$?",
    f"if [ $code = {LOST} ]; then",
    '  sleep "$(scontrol show config | awk \'$1 == "SlurmdTimeout" { print $3 + 60 }\')"',
    "fi",
    "exit $code",
)


def _option(key: str, value: Any) -> str:
    """A line that sbatch reads: it splits at blanks outside quotes, and takes a backslash for an escape."""
    text = str(value)
    if re.search(r"[\s'\"\\#]", text):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH --{key}={text}"


def prepare(line: recipes.CommandLine) -> Submission:
    """The checked job of a command line.

    Raises:
        ConfigError: with every problem of the slurm keys and of every job's recipe at once.
    """
    problems, own = list(line.problems), {}
    for key in [key for key in line.overrides if key == "slurm" or key.startswith("slurm.")]:
        value = str(line.take(key))
        if _choices(key, value) is None:
            own[key] = value
        else:
            problems.append(f"{key}={value} cannot be swept: put quotes inside, as '{key}=\"{value}\"'")
    asked = Slurm()
    try:
        asked = validate(SubmitConfig, recipes.merge(None, own)).slurm
    except ConfigError as error:
        problems += error.problems
    names, jobs = [key for key in ("recipe", "resume") if key in line.overrides], [{}]
    try:
        jobs = _combinations(line.overrides)
    except ConfigError as error:
        problems += error.problems
        line.overrides = {key: value for key, value in line.overrides.items() if key in names}
    checked: list[RecipeBase] = []
    fixed: dict[str, str] = {}
    for job in jobs:
        typed = line.overrides | job
        problems += _contradictions(asked, typed)
        try:
            first = composed(recipes.CommandLine(overrides=dict(typed)))
            fixed = _processes(asked, first)
            checked.append(composed(recipes.CommandLine(overrides=typed | fixed)) if fixed else first)
        except ConfigError as error:
            problems += error.problems
    if len(jobs) > 1 and len({(one.trainer.devices, one.trainer.num_nodes) for one in checked}) > 1:
        problems.append("a sweep cannot change trainer.devices or trainer.num_nodes: its jobs are of one shape")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    swept = [[f"{key}={value}" for key, value in job.items()] for job in jobs if job]
    last = {"run"} if swept else set()
    same = {key: value for key, value in (line.overrides | fixed).items() if key not in {*jobs[0], *last}}
    return Submission(asked, checked[0], [f"{key}={value}" for key, value in same.items()], swept)


def _combinations(overrides: Mapping[str, str]) -> list[dict[str, str]]:
    """The swept keys of every job: the values of the key typed last change fastest; one empty job without a sweep."""
    choices = {key: found for key, value in overrides.items() if (found := _choices(key, value)) is not None}
    problems = []
    if wrong := [key for key in ("recipe", "resume", "run", "output_dir") if key in choices]:
        problems.append(f"{wrong[0]} cannot be swept: submit once for each")
    if choices and "resume" in overrides:
        problems.append(f"a resumed run is one run: {next(iter(choices))} cannot be swept")
    if problems:
        raise ConfigError(problems)
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _choices(key: str, value: str) -> list[str] | None:
    """The values that a comma outside brackets and quotes separates, as they would be typed; None: there is no such."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"++{key}={value}")
        return [str(text) for text in override.sweep_string_iterator()] if override.is_sweep_override() else None
    except HydraException:
        return None  # composing the recipe tells it


def _wanted(asked: Slurm) -> dict[str, tuple[str, str]]:
    """Recipe key -> (slurm key that decides it, value)."""
    wanted = {}
    if asked.nodes is not None:
        wanted["trainer.num_nodes"] = ("slurm.nodes", str(asked.nodes))
    if asked.gpus_per_node:
        wanted["trainer.devices"] = ("slurm.gpus_per_node", str(asked.gpus_per_node))
    if asked.gpus_per_node is not None:
        wanted["trainer.accelerator"] = ("slurm.gpus_per_node", "gpu" if asked.gpus_per_node else "cpu")
    return wanted


def _contradictions(asked: Slurm, typed: Mapping[str, str]) -> list[str]:
    """Where a command line says two things."""
    return [
        f"{ours}={getattr(asked, ours.partition('.')[2])} means {key}={value}, but {key}={typed[key]} is given too: "
        "leave one of them out"
        for key, (ours, value) in _wanted(asked).items()
        if typed.get(key, "auto") not in (value, "auto")
    ]


def _processes(asked: Slurm, recipe: RecipeBase) -> dict[str, str]:
    """What makes the recipe's processes those that SLURM starts.

    Raises:
        ConfigError: nobody says how many there are.
    """
    trainer, wanted = recipe.trainer, _wanted(asked)
    if trainer.devices == "auto" and "trainer.devices" not in wanted:
        raise ConfigError(["trainer.devices is 'auto', which SLURM cannot ask for: give slurm.gpus_per_node"])
    fixed = {key: value for key, (_, value) in wanted.items() if str(getattr(trainer, key.partition(".")[2])) != value}
    if asked.gpus_per_node is None and trainer.accelerator == "auto":
        fixed["trainer.accelerator"] = "gpu"  # a node without its GPUs shall be an error, not a slow run
    if recipe.resume is not None:
        fixed.pop("trainer.accelerator", None)  # a resumed run keeps its own
    return fixed


def submit(job: Submission) -> str:
    """Give the job to sbatch and keep the script beside its log; returns the job's id.

    Raises:
        ConfigError: there is no sbatch, or it refuses.
        OSError: the folder of the logs cannot be made.
    """
    job.logs.mkdir(parents=True, exist_ok=True)
    # What sbatch reads from its own environment must not contradict the script.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    command = ["sbatch", "--parsable"]
    try:
        done = subprocess.run(command, input=job.script, capture_output=True, text=True, env=environment)
        refusal = f"sbatch refused the job: {' '.join(done.stderr.split())}" if done.returncode else None
    except FileNotFoundError:
        refusal = "there is no sbatch here: submit from the cluster, or see the script by --print"
    if refusal:
        with suppress(OSError):  # others' logs are there
            job.logs.rmdir()
            job.logs.parent.rmdir()
        raise ConfigError([refusal])
    number = done.stdout.strip().partition(";")[0]
    atomic_write(job.logs / f"{number}.sh", job.script)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (2: refused)."""
    line = recipes.read_command_line(sys.argv[1:] if argv is None else argv, ("--help", "--print"))
    if "--help" in line.options:
        print(f"{USAGE}\n\n{help_text(SubmitConfig)}")
        return 0
    job = prepare(line)
    if "--print" in line.options:
        print(job.script, end="")
        if job.swept:
            print("\n".join([f"{len(job.swept)} jobs:", *job.table]), file=sys.stderr)
        return 0
    number = submit(job)
    what = f"{job.gpus} GPUs" if job.gpus else f"{job.recipe.trainer.devices} processes"
    print(f"job {number}: {job.recipe.trainer.num_nodes} nodes with {what} each, for {job.recipe.recipe}")
    if job.swept:
        print("\n".join(line.replace("run=JOB_", f"run={number}_") for line in job.table))
    runs = job.recipe.resume or f"{job.recipe.output_dir}/{job.recipe.recipe}/{job.recipe.run or number}"
    print(f"run folder {runs}{'_*' if job.swept else ''}, log {job.logs}/{number}{'_*' if job.swept else ''}.log")
    return 0


if __name__ == "__main__":
    sys.exit(recipes.exit_on_error(main))
