"""Sample grids and the table of what is trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from trainers.base import FrozenBackboneTask
from trainers.callbacks.metrics import Metrics
from trainers.plots import save_grid


class SampleGrids(Callback):
    """Every `every` updates a picture: the teacher's images above the student's, same noise."""

    def __init__(self, folder: Path, every: int, metrics: Metrics, count: int = 8) -> None:
        self.folder, self.every, self.metrics, self.count = folder, every, metrics, count
        self._drawn = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw on the first rank (on all where only all can).

        The next batch seeds its own random numbers, so training does not notice.
        """
        step = trainer.global_step
        assert isinstance(pl_module, FrozenBackboneTask)
        draws = trainer.is_global_zero or pl_module.acts_together
        if step == self._drawn or step == 0 or step % self.every or not draws:
            return
        self._drawn = step
        started = time.perf_counter()
        pl_module.eval()
        try:
            with torch.no_grad():
                images = pl_module.sample_images(self.count)
        finally:
            pl_module.train()
        if images is not None and trainer.is_global_zero:
            save_grid(self.folder / f"step_{step:07d}.png", images, ["backbone", pl_module.recipe.method])
        self.metrics.pause(time.perf_counter() - started)


def print_parameter_table(task: FrozenBackboneTask, console: Console) -> None:
    """What is trained, what of it started as a copy, what is frozen."""
    table = Table(box=None, header_style="bold")
    for heading in ("part", "state", "parameters", "dtype"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for row in task.parameter_table():
        state = f"trained, copied from {row['copied_from']}" if "copied_from" in row else row["state"]
        table.add_row(row["part"], state, f"{row['parameters']:,}", row["dtype"])
    console.print(table)
