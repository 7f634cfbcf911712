"""How the work is spread over processes: one name in the recipe, one class each.

All of them write the same checkpoint (one file: learned part, its average, optimizer, schedule, position in the data),
so a run may go on under another strategy or with another number of processes.
"""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import Strategy

from trainers.config import RecipeBase


def make_strategy(recipe: RecipeBase, processes: int) -> Strategy | str:
    """Lightning's strategy for a recipe.

    Args:
        processes: in the whole run; `auto` is a single device for one, and DDP for several.
    Raises:
        ValueError: the strategy's package is not installed.
    """
    settings = recipe.trainer
    name, timeout = settings.strategy, timedelta(seconds=settings.timeout_s)
    if name == "auto":
        if processes == 1:
            return "auto"
        name = "ddp"
    if name.startswith("deepspeed"):
        try:
            from trainers.strategies.zero import ZeRO
        except ImportError as error:
            raise ValueError(
                f"trainer.strategy={name} needs DeepSpeed ({error}): pip install 'afterburner[train]', or "
                "trainer.strategy=ddp or fsdp, which need nothing more"
            ) from None
        stage, offload = int(name.split("_")[1]), name.endswith("_offload")
        return ZeRO(stage, offload, precision=settings.precision, timeout=timeout)
    from trainers.strategies.ddp import BackboneDDP, ShardedBackboneDDP

    return (ShardedBackboneDDP if name == "fsdp" else BackboneDDP)(timeout=timeout)
