"""What a single looped step is asked to predict: the two targets of docs/methods/ilf.md, in noise form."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.pipelines import Conditions
from trainers.noise_form import NoisePredictor


@torch.no_grad()
def trajectory_target(
    predict: NoisePredictor,
    latents: Tensor,
    timestep: int,
    following: int,
    conditions: Conditions,
    substeps: int,
    guidance: float = 1.0,
) -> Tensor:
    """The noise that makes one DDIM step land where `substeps` of the backbone's own land (target B).

    Args:
        latents: [B, C, H, W] at `timestep`.
        following: the timestep of the next outer step; -1 after the last.
    """
    grid = [round(timestep + (following - timestep) * j / substeps) for j in range(substeps + 1)]
    grid = sorted(set(grid), reverse=True)
    walked = latents
    for here, there in zip(grid, grid[1:], strict=False):
        walked = predict.ddim(walked, predict(walked, here, conditions, guidance), here, there)
    return predict.invert(latents, walked, timestep, following)


@torch.no_grad()
def fad_target(predict: NoisePredictor, clean: Tensor, noise: Tensor, timestep: int, conditions: Conditions) -> Tensor:
    """The backbone's noise at half the timestep, same image and noise (target A, Fast Approximate Distillation)."""
    half = timestep // 2
    return predict(predict.add_noise(clean, noise, half), half, conditions)
