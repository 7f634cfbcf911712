"""What happens around the steps: progress and metrics, sample grids, checkpoints, profiles, W&B."""

from __future__ import annotations

from typing import TypeVar

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from trainers.base import FrozenBackboneTask
from trainers.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints, Interrupted, newest_sound, read_checkpoint
from trainers.callbacks.metrics import Metrics, memory_bytes
from trainers.callbacks.profile import Profile
from trainers.callbacks.samples import SampleGrids, print_parameter_table
from trainers.callbacks.wandb import WandbRun
from trainers.run_folder import RunFolder

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoints",
    "Interrupted",
    "Metrics",
    "Profile",
    "SampleGrids",
    "WandbRun",
    "callback_of",
    "callbacks_for",
    "memory_bytes",
    "newest_sound",
    "print_parameter_table",
    "read_checkpoint",
]

Kind = TypeVar("Kind", bound=Callback)


def callbacks_for(task: FrozenBackboneTask, folder: RunFolder, console: Console | None = None) -> list[Callback]:
    """The callbacks of one run, as its recipe asks for them."""
    recipe, settings = task.recipe, task.recipe.trainer
    run = WandbRun(recipe, folder, console) if recipe.logs_to("wandb") else None
    csv = folder.metrics if recipe.logs_to("csv") else None
    metrics = Metrics(csv, settings.log_every, console, run and run.log_row)
    found: list[Callback] = [metrics, Checkpoints(folder.checkpoints, settings.save_every, metrics.say_written)]
    if settings.sample_every:
        found.append(SampleGrids(folder.samples, settings.sample_every, metrics, run and run.log_picture))
    if settings.profile is not None:
        found.append(Profile(folder.profile, settings.profile, metrics))
    # Last, for what the others do when a signal ends the run must not wait for W&B's server.
    return [*found, run] if run else found


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's callback of a class, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]
