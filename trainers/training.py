"""What the commands do once the recipe is valid: build the task, train it, export it.  Importing this costs torch."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import cast

from lightning import Trainer, seed_everything
from rich.console import Console

from checkpoints.load import load_adapter, read_tensors
from data.stepped import derive_seed
from trainers import processes
from trainers.base import FrozenBackboneTask
from trainers.callbacks import AtomicCheckpointIO, callbacks_for, newest_sound, print_parameter_table, read_checkpoint
from trainers.config import RecipeBase
from trainers.launch import cluster_plugins
from trainers.run_folder import RunFolder
from trainers.strategies import make_strategy


def build_task(recipe: RecipeBase) -> FrozenBackboneTask:
    """The method's task with its initial weights, which depend on the seed and nothing else."""
    seed_everything(derive_seed(recipe.seed, "initial weights") % 2**32, verbose=False)
    method = importlib.import_module(f".{recipe.method}", __package__)
    return cast(FrozenBackboneTask, method.build_task(recipe))


def make_trainer(recipe: RecipeBase, task: FrozenBackboneTask, folder: RunFolder, console: Console) -> Trainer:
    """Lightning's trainer without what costs time or writes elsewhere: one endless epoch, our own metrics and bar."""
    _quieten()
    settings = recipe.trainer
    # The strategy for DeepSpeed has a plug-in of its own and puts autocast around the step itself.
    precision = None if settings.strategy.startswith("deepspeed") else settings.precision
    return Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(recipe, processes.devices_of(recipe) * settings.num_nodes),
        precision=precision,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip or None,
        gradient_clip_algorithm=settings.clip_by,
        callbacks=callbacks_for(task, folder, console),
        plugins=[AtomicCheckpointIO(), *cluster_plugins()],
        default_root_dir=folder.path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def _quieten() -> None:
    """Lightning's advice and the notices about what we do on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    expected = (
        ".*in eval mode at the start of training",
        ".*does not have many workers",
        ".*no .?len.*",
        ".*`srun` command is available.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    )
    for message in expected:
        warnings.filterwarnings("ignore", message)
    # Lightning and DeepSpeed call collectives by names that torch deprecates, many times a step.
    warnings.filterwarnings("ignore", ".*torch.distributed.*deprecated.*")


def train(task: FrozenBackboneTask, folder: RunFolder, console: Console | None = None) -> Trainer:
    """Train from the folder's newest checkpoint that can be read, or from the start when there is none.

    Raises:
        NonFiniteLoss: a loss or weight was not finite; the last good checkpoint is in the folder.
        Interrupted: a signal asked to stop; a checkpoint of the last whole step is in the folder.
    """
    console = console or Console()
    trainer = make_trainer(task.recipe, task, folder, console)
    if trainer.is_global_zero:
        print_parameter_table(task, console)
    trainer.fit(task, ckpt_path=newest_sound(folder, trainer.is_global_zero), weights_only=True)
    return trainer


def restore(task: FrozenBackboneTask, checkpoint: Path) -> None:
    """Put a checkpoint's learned weights (and their average) into a task that is not being trained.

    Raises:
        ValueError: damaged, or of another module.
    """
    content = read_checkpoint(checkpoint)
    task.on_load_checkpoint(content)
    task.load_state_dict(content["state_dict"], strict=False)


def export(task: FrozenBackboneTask, trainer: Trainer, folder: Path) -> None:
    """Write the adapter from rank 0; every rank calls it, since what learns may have to be gathered first."""
    with task.consolidated():
        if trainer.is_global_zero:
            task.export_adapter(folder)


def dry_run(recipe: RecipeBase, console: Console) -> None:
    """Build everything, one update, write the adapter, load it into the backbone again; leave nothing behind.

    Where the strategy shards the backbone nothing can be attached to it: the adapter's files are read and checked then.
    """
    settings = recipe.trainer.model_copy(update={"max_steps": 1, "profile": None})
    recipe = recipe.model_copy(update={"trainer": settings, "logger": "none"})
    task = build_task(recipe)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        trainer = train(task, run, console)
        export(task, trainer, run.adapter)
        if not trainer.is_global_zero:
            return
        if task.backbone_is_whole:
            load_adapter(task.adapter_target(), run.adapter).detach()
        else:
            read_tensors(run.adapter)
