"""What happens around the steps: progress and metrics, sample grids, checkpoints."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback
from rich.console import Console

from trainers.base import FrozenBackboneTask
from trainers.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints, Interrupted, newest_sound, read_checkpoint
from trainers.callbacks.metrics import Metrics, memory_bytes
from trainers.callbacks.samples import SampleGrids, print_parameter_table
from trainers.run_folder import RunFolder

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoints",
    "Interrupted",
    "Metrics",
    "SampleGrids",
    "callbacks_for",
    "memory_bytes",
    "newest_sound",
    "print_parameter_table",
    "read_checkpoint",
]


def callbacks_for(task: FrozenBackboneTask, folder: RunFolder, console: Console | None = None) -> list[Callback]:
    """The callbacks of one run, as its recipe asks for them."""
    settings = task.recipe.trainer
    metrics = Metrics(folder.metrics if task.recipe.logger == "csv" else None, settings.log_every, console)
    found: list[Callback] = [metrics, Checkpoints(folder.checkpoints, settings.save_every)]
    if settings.sample_every:
        found.append(SampleGrids(folder.samples, settings.sample_every, metrics))
    return found
