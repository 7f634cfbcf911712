"""python -m trainers.fit recipe=NAME [key=value ...]: train, export, evaluate."""

from __future__ import annotations

from trainers import signals

if __name__ == "__main__":  # before the imports, which take long enough to miss one
    signals.handle()

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainers import processes, recipes
from trainers.config import EvaluateConfig, RecipeBase
from trainers.crew import Crew
from trainers.failures import LOST, Failure, explain
from trainers.launch import PROCESS_KEYS, current_launch, fitted
from trainers.loggers import check_loggers
from trainers.run_folder import ENVIRONMENT_KEY, RunFolder, atomic_write
from trainers.settings import ConfigError, help_text
from trainers.slurm import requeue
from trainers.summary import Stopwatch, build_summary, print_summary

if TYPE_CHECKING:
    from lightning import Trainer
    from rich.console import Console

    from trainers.base import FrozenBackboneTask
    from trainers.callbacks import Interrupted

USAGE = """usage: python -m trainers.fit recipe=NAME [key=value ...]   train, export, evaluate
       python -m trainers.fit resume=outputs/RECIPE/RUN [trainer.max_steps=N]   continue a run

  recipe=NAME   a shipped recipe, or the path of a .yaml file (which may extend shipped ones)
  --help        this, and every key; with recipe=NAME the method's keys too, with the recipe's values
  --list        the shipped recipes
  --print       the resolved recipe as YAML, then exit
  --dry-run     build everything, one update, export, load again, then exit; leaves nothing behind"""
OPTIONS = ("--help", "--list", "--print", "--dry-run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    1: failed, 2: refused, 3: a loss was not finite, 4: another process of the run was lost, 128 + signal: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        line = recipes.read_command_line(argv, OPTIONS)
        if "--list" in line.options:
            print(_listing())
            return 0
        if "--help" in line.options and not line.overrides:
            print(f"{USAGE}\n\nkeys of every recipe, with their defaults:\n{help_text(RecipeBase)}")
            return 0
        recipe = composed(line)
        recipe = fitted(recipe, line.overrides if recipe.resume is None else PROCESS_KEYS)
        if "--help" in line.options:
            print(f"{USAGE}\n\nkeys of recipe {recipe.recipe}, with its values:\n{help_text(type(recipe), recipe)}")
            return 0
        if "--print" in line.options:
            print(recipes.to_yaml(recipe), end="")
            return 0
        return _fit(recipe, argv, dry_run="--dry-run" in line.options)
    except ConfigError as error:
        return recipes.refused(error)
    except BrokenPipeError:  # whoever read --help or --list has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped before training began; nothing was kept", file=sys.stderr)
        return 130


def _listing() -> str:
    blocks = [
        f"{name}\n" + "\n".join(f"    {row}" for row in text.split("\n")) for name, text in recipes.available().items()
    ]
    return "\n".join([*blocks, "run one with: python -m trainers.fit recipe=NAME"])


def composed(line: recipes.CommandLine) -> RecipeBase:
    """The checked recipe of a command line: a new run's, or the one that a run's folder holds.

    Raises:
        ConfigError: with every problem at once.
    """
    name, resume = line.take("recipe"), line.take("resume")
    problems = list(line.problems)
    if name is None and resume is None:
        problems.append("recipe=NAME is missing: --list shows the shipped recipes, or give the path of a .yaml file")
    try:
        if resume is not None:
            recipe = recipes.compose_resumed(resume, name, line.overrides)
        elif name is not None:
            recipe = recipes.compose_recipe(name, line.overrides)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return recipe


def _fit(recipe: RecipeBase, argv: Sequence[str], dry_run: bool) -> int:
    if ENVIRONMENT_KEY not in os.environ:  # else the process that started this one has asked
        check_loggers(recipe)
    watch = Stopwatch()
    from rich.console import Console

    # The first import of torch on this path: everything above has been checked.
    from trainers import training
    from trainers.callbacks import Interrupted

    rank = processes.rank(recipe)
    console = Console(quiet=rank > 0)
    if dry_run:
        return _dry_run(recipe, console)
    # Tasks of one job leave together, at a step; others have nothing to finish first while none is running.
    tasks = current_launch() is not None
    before = signals.handle(signals.note if tasks else _leave_at_once)
    folder = RunFolder.for_recipe(recipe, rank)
    # The processes that are started beside this one must write to the same folder.
    os.environ[ENVIRONMENT_KEY] = str(folder.path)
    others: list[Any] = []
    # What a run that is resumed has, it keeps, however little that is.
    discard = (lambda: None) if recipe.resume else folder.discard_if_empty
    try:
        with Crew(folder.path, rank, lambda: _how_it_goes_on(folder), discard) as crew:
            try:
                if not tasks:
                    _leave_if_asked()
                if rank == 0:
                    folder.begin(recipe, ["python", "-m", "trainers.fit", *argv])
                others = crew.others = processes.start_others(recipe, crew.lost)
                console.print(f"{recipe.method} for {recipe.backbone.name}, run folder {folder.path}", highlight=False)
                task = training.build_task(recipe)
                trainer = training.train(task, folder, console)
                crew.done()
                _finish(task, trainer, folder, watch, console, others)
                return 0
            except Interrupted as error:
                return _interrupted(crew, folder, error)
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                return crew.tell(explain(error), traceback.format_exc())
            finally:
                # After a failure they may wait for this process in an exchange, for as long as it lives.
                processes.wait_for(others, seconds=1.0 if crew.failed else processes.GRACE_SECONDS)
    finally:
        signals.restore(before)
        if others:
            processes.forget_world()
        if rank == 0:
            os.environ.pop(ENVIRONMENT_KEY, None)


def _dry_run(recipe: RecipeBase, console: Console) -> int:
    from trainers import training

    def lost(reason: str) -> None:
        """End this process, which may wait for ever inside a collective that the lost one will never join."""
        print(f"error: {reason}; nothing was kept", file=sys.stderr, flush=True)
        os._exit(LOST)

    before = signals.handle(_leave_at_once)
    others = processes.start_others(recipe, lost)
    try:
        _leave_if_asked()
        training.dry_run(recipe, console)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        failure = explain(error)
        if failure.unexpected:
            raise
        print(f"error: {failure.sentence}; nothing was kept", file=sys.stderr)
        return failure.code
    finally:
        signals.restore(before)
    processes.wait_for(others)
    console.print(f"{recipe.recipe}: built, trained one update, exported and loaded again; nothing was kept")
    return 0


def _leave_at_once(signum: int, frame: FrameType | None = None) -> None:
    """A handler for when no step is running."""
    from trainers.callbacks import Interrupted

    raise Interrupted(signum)


def _leave_if_asked() -> None:
    if (signum := signals.take_noted()) is not None:
        _leave_at_once(signum)


def _finish(
    task: FrozenBackboneTask,
    trainer: Trainer,
    folder: RunFolder,
    watch: Stopwatch,
    console: Console,
    others: list[Any],
) -> None:
    """All ranks export the adapter; the first measures it, unless the recipe says otherwise, and sums the run up."""
    from trainers import training
    from trainers.callbacks import Metrics, WandbRun, callback_of

    metrics, run = callback_of(trainer, Metrics), callback_of(trainer, WandbRun)
    assert metrics is not None
    watch.lap("start_up")
    watch.move("start_up", training=metrics.totals.training_s, samples=metrics.totals.paused_s)
    with run.closing() if run else nullcontext():
        training.export(task, trainer, folder.adapter)
        if not trainer.is_global_zero:
            return
        processes.wait_for(others)
        # The other processes are done, and so is the last checkpoint.
        signals.handle(_leave_at_once)
        _leave_if_asked()
        watch.lap("export")
        report = _evaluate(task.recipe, folder) if task.recipe.evaluate else None
        if report:
            watch.lap("evaluation")
        summary = build_summary(task, metrics.totals, watch.parts, trainer.world_size, folder)
        atomic_write(folder.summary, json.dumps(summary, indent=2) + "\n")
        print_summary(summary, folder, console)
        if run:
            run.log_results(report, summary)


def _evaluate(recipe: RecipeBase, folder: RunFolder) -> dict[str, Any]:
    """Measure the exported adapter; returns the report."""
    from trainers import evaluate

    settings = EvaluateConfig(
        adapter=str(folder.adapter),
        backbone=recipe.backbone.name,
        dtype=recipe.backbone.dtype,
        device="cpu" if recipe.trainer.accelerator == "cpu" else "auto",
        output=str(folder.path),
        evaluation=recipe.evaluation,
    )
    return evaluate.run(settings)


def _interrupted(crew: Crew, folder: RunFolder, error: Interrupted) -> int:
    """What a signal's end means, told by one rank: SLURM goes on with the run, or its user may."""
    signals.handle()  # a requeue sends SIGTERM
    code, asked = 128 + error.signum, error.requeue
    if error.step is None and crew.number == 0:
        asked = requeue(error.signum)
    if asked is None or not asked.done:
        return crew.tell(Failure(f"{error}, {asked.text}" if asked else str(error), code, common=True))
    crew.failed = True
    if crew.number == 0:
        print(f"{error}; {asked.text} and goes on from {folder.latest_checkpoint() or 'the start'}", flush=True)
    return code


def _how_it_goes_on(folder: RunFolder) -> str:
    """What a run that ended early leaves, and how to continue it."""
    checkpoint = folder.latest_checkpoint()
    return f"{checkpoint} is kept, continue with resume={folder.path}" if checkpoint else "there is no checkpoint yet"


if __name__ == "__main__":
    sys.exit(main())
