"""Where a process trains, for those who run the backbone before Lightning has moved anything."""

from __future__ import annotations

import os

import torch

from trainers.config import RecipeBase


def training_device(recipe: RecipeBase) -> torch.device:
    """The device of this process."""
    if recipe.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
