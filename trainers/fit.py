"""python -m trainers.fit recipe=NAME [key=value ...]: train, export, evaluate."""

from __future__ import annotations

from trainers import signals

if __name__ == "__main__":  # before the imports, which take long enough to miss one
    signals.handle()

import os
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from trainers import processes, recipes
from trainers.config import EvaluateConfig, RecipeBase
from trainers.launch import PROCESS_KEYS, current_launch, fitted
from trainers.run_folder import ENVIRONMENT_KEY, RunFolder
from trainers.settings import ConfigError, help_text
from trainers.slurm import requeue

if TYPE_CHECKING:
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
    """Run the command; returns its exit code (2: refused, 3: non-finite loss, 128 + signal: interrupted)."""
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
    from rich.console import Console

    # The first import of torch on this path: everything above has been checked.
    from trainers import training
    from trainers.base import NonFiniteLoss
    from trainers.callbacks import Interrupted

    rank = processes.rank(recipe)
    console = Console(quiet=rank > 0)
    if dry_run:
        others = processes.start_others(recipe, _lost)
        training.dry_run(recipe, console)
        processes.wait_for(others)
        console.print(f"{recipe.recipe}: built, trained one update, exported and loaded again; nothing was kept")
        return 0
    # Tasks of one job leave together, at a step; others have nothing to finish first while none is running.
    tasks = current_launch() is not None
    before = signals.handle(signals.note if tasks else _leave_at_once)
    folder = RunFolder.for_recipe(recipe, rank)
    # The processes that are started beside this one must write to the same folder.
    os.environ[ENVIRONMENT_KEY] = str(folder.path)
    others: list[Any] = []
    try:
        if not tasks:
            _leave_if_asked()
        if rank == 0:
            folder.begin(recipe, ["python", "-m", "trainers.fit", *argv])
        others = processes.start_others(recipe, _lost)
        console.print(f"{recipe.method} for {recipe.backbone.name}, run folder {folder.path}", highlight=False)
        task = training.build_task(recipe)
        trainer = training.train(task, folder, console)
        training.export(task, trainer, folder.adapter)
        if trainer.is_global_zero:
            processes.wait_for(others)
            # The other processes are done, and so is the last checkpoint.
            signals.handle(_leave_at_once)
            _leave_if_asked()
            _finish(recipe, folder)
            console.print(f"adapter and report are in {folder.path}", highlight=False)
        return 0
    except NonFiniteLoss as error:
        return _stopped(folder, str(error), 3, rank)
    except Interrupted as error:
        return _interrupted(folder, error, rank)
    except KeyboardInterrupt:
        return _stopped(folder, "interrupted", 130, rank)
    except (ValueError, OSError) as error:
        return _stopped(folder, " ".join(str(error).split()), 1, rank)
    finally:
        signals.restore(before)
        processes.wait_for(others, seconds=processes.GRACE_SECONDS)
        if others:
            processes.forget_world()
        if rank == 0:
            os.environ.pop(ENVIRONMENT_KEY, None)
            folder.discard_if_empty()


def _leave_at_once(signum: int, frame: FrameType | None = None) -> None:
    """A handler for when no step is running."""
    from trainers.callbacks import Interrupted

    raise Interrupted(signum)


def _leave_if_asked() -> None:
    if (signum := signals.take_noted()) is not None:
        _leave_at_once(signum)


def _lost(reason: str) -> None:
    """End this process, which may wait for ever inside a collective that the lost one will never join."""
    print(f"error: {reason}; continue from the last checkpoint with resume=RUN_FOLDER", file=sys.stderr, flush=True)
    os._exit(1)


def _finish(recipe: RecipeBase, folder: RunFolder) -> None:
    """Measure the adapter, unless the recipe says otherwise."""
    if not recipe.evaluate:
        return
    from trainers import evaluate

    settings = EvaluateConfig(
        adapter=str(folder.adapter),
        backbone=recipe.backbone.name,
        dtype=recipe.backbone.dtype,
        device="cpu" if recipe.trainer.accelerator == "cpu" else "auto",
        output=str(folder.path),
        evaluation=recipe.evaluation,
    )
    evaluate.run(settings)


def _interrupted(folder: RunFolder, error: Interrupted, rank: int) -> int:
    """What a signal's end means, told by one rank: SLURM goes on with the run, or its user may."""
    signals.handle()  # a requeue sends SIGTERM
    code, asked = 128 + error.signum, error.requeue
    if error.step is None and rank == 0:
        asked = requeue(error.signum)
    if asked is None or not asked.done:
        return _stopped(folder, f"{error}, {asked.text}" if asked else str(error), code, rank)
    if rank == 0:
        print(f"{error}; {asked.text} and goes on from {folder.latest_checkpoint() or 'the start'}", flush=True)
    return code


def _stopped(folder: RunFolder, reason: str, code: int, rank: int) -> int:
    """One sentence, from one rank, about why a run ended early and how it goes on."""
    if rank:
        return code
    checkpoint = folder.latest_checkpoint()
    kept = f"{checkpoint} is kept, continue with resume={folder.path}" if checkpoint else "there is no checkpoint yet"
    print(f"error: {reason}; {kept}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
