"""What training costs over its arithmetic: `python -m benchmarks.fit_overhead recipe=NAME [key=value ...] [--save]`.

The same task, batches and updates run in turns, in one process: as `trainers.fit` does (Lightning, metrics, checkpoints
as the recipe asks; no sample grids, which are arithmetic of their own), and in a bare loop.  Bar: 85% of its speed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks import results
from trainers import recipes, training
from trainers.base import FrozenBackboneTask
from trainers.config import RecipeBase
from trainers.run_folder import RunFolder
from trainers.settings import ConfigError

ROUNDS, WARMUP, BAR = 3, 5, 0.85
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Clock(Callback):
    """Seconds from the end of the warm-up updates to the end of the last."""

    def __init__(self) -> None:
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The warm-up is over at the first batch of update WARMUP."""
        if trainer.global_step == WARMUP and not self.started:
            _wait(pl_module.device)
            self.started = time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def framework(task: FrozenBackboneTask, recipe: RecipeBase) -> float:
    """Seconds per update as `trainers.fit` runs them."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.make_trainer(recipe, task, RunFolder(Path(folder)), Console(quiet=True))
        trainer.callbacks.insert(0, clock)
        trainer.fit(task)
        _wait(task.device)
        seconds = time.perf_counter() - clock.started
    return seconds / (recipe.trainer.max_steps - WARMUP)


def bare(task: FrozenBackboneTask, recipe: RecipeBase) -> float:
    """Seconds per update of the same arithmetic in a loop of its own."""
    task.trainer = None
    settings = recipe.trainer
    made: Any = task.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    batches = iter(task.train_dataloader())
    parameters = list(task.learned.parameters())
    precision = AUTOCAST.get(settings.precision)
    started, number = 0.0, 0
    for step in range(settings.max_steps):
        if step == WARMUP:
            _wait(task.device)
            started = time.perf_counter()
        optimizer.zero_grad()
        for _ in range(settings.accumulate_grad_batches):
            # The same seed per batch makes the same random choices, hence the same arithmetic.
            task.batch_number = number - 1
            task.on_train_batch_start(None, number)
            with torch.autocast(task.device.type, precision) if precision else nullcontext():
                loss: Any = task.training_step(_moved(next(batches), task.device), number)
            (loss / settings.accumulate_grad_batches).backward()
            number += 1
        if settings.gradient_clip:
            clip_grad_norm_(parameters, settings.gradient_clip)
        optimizer.step()
        schedule.step()
        if task.averaged is not None:
            average: Callable[..., None] = get_ema_multi_avg_fn(settings.ema)
            average([p.data for p in task.averaged.parameters()], [p.data for p in parameters], 0)
    _wait(task.device)
    return (time.perf_counter() - started) / (settings.max_steps - WARMUP)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, list | tuple) else batch


def compare(task: FrozenBackboneTask, recipe: RecipeBase) -> list[tuple[float, float]]:
    """(framework's, bare loop's) seconds per update for each round, in turns."""
    framework(task, _shorter(recipe))  # moves the task to its device; first calls are slow everywhere
    return [(framework(task, recipe), bare(task, recipe)) for _ in range(ROUNDS)]


def _shorter(recipe: RecipeBase) -> RecipeBase:
    return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"max_steps": WARMUP + 1})})


def main() -> int:
    """Compare on a recipe; returns 1 below the bar, 2 for a refused recipe."""
    line = recipes.read_command_line(sys.argv[1:], ["--save"])
    line.overrides |= {"trainer.sample_every": "0"}
    try:
        recipe = recipes.compose_recipe(line.take("recipe") or "ilf_pixart", line.overrides)
    except ConfigError as error:
        return recipes.refused(error)
    pairs = compare(training.build_task(recipe), recipe)
    ratios = sorted(own / ours for ours, own in pairs)
    ours, own = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{recipe.recipe}: {ours * 1000:.1f} ms per update, bare loop {own * 1000:.1f} ms: "
        f"{ratio:.1%} of its speed ({ratios[0]:.1%} to {ratios[-1]:.1%} over {ROUNDS} rounds), bar {BAR:.0%}"
    )
    row = {"recipe": recipe.recipe, "update_ms": f"{ours * 1000:.2f}", "bare_ms": f"{own * 1000:.2f}"}
    if "--save" in line.options:
        print(f"row added to {results.append('fit_overhead', [row | {'share': f'{ratio:.3f}'}])}")
    return int(ratio < BAR)


if __name__ == "__main__":
    sys.exit(main())
