"""The image error proxy: how much an error of each step weighs (note docs/methods/harmonica.md, "The weights")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.harmonica.student import Row, Table
from trainers.noise_form import NoisePredictor, image_weights

Final = Callable[[Table], Tensor]
"""Samples with a table of rows, always from the same noise: final latents [B, C, H, W]."""


def paper_lambdas(final: Final, table: Table, routed: list[int]) -> Tensor:
    """lambda_t = mean (x0 - x0^(t))^2, x0^(t) sampled with step t computing everything (the poster's definition).

    Returns:
        [R], one per routed step, without gradient.
    """
    own = final(table)
    return torch.stack([(own - final(_with(table, step, None))).square().mean() for step in routed])


def relative_lambdas(final: Final, errors: Tensor, table: Table, routed: list[int]) -> Tensor:
    """The poster's lambda_t over the step's own error, so that lambda_t times that error is the change of the image.

    The poster's counts an error twice, in the weight and in the loss: a step that is nearly right weighs nothing, and
    what it leaves in the caches of the steps behind it weighs nothing either.

    Args:
        errors: [T], the mean squared error of every step's prediction under `table`.
    """
    own = errors[routed]
    return paper_lambdas(final, table, routed) / (own + 1e-3 * own.max()).clamp(min=torch.finfo(own.dtype).tiny)


def telescoping_lambdas(final: Final, table: Table, routed: list[int]) -> Tensor:
    """What the released code computes: rows are switched on one after the other, and lambda is each one's change."""
    on: set[int] = set()
    before, found = final(lambda step: None), []
    for step in routed:
        on.add(step)
        after = final(lambda at: table(at) if at in on else None)
        found.append((after - before).square().mean())
        before = after
    return torch.stack(found)


def _with(table: Table, step: int, row: Row | None) -> Table:
    return lambda at: row if at == step else table(at)


def analytic_lambdas(predict: NoisePredictor, timesteps: list[int], routed: list[int]) -> Tensor:
    """The squared effect of a step's error on the clean latents under DDIM, with mean 1; needs no sampling.

    The error of a noise prediction counts as it is, that of a velocity as alpha, of a sample as alpha / sigma noise.
    """
    weights = image_weights(predict, timesteps)
    found = []
    for step in routed:
        alpha, sigma = predict.levels(timesteps[step])
        as_noise = {"epsilon": 1.0, "v_prediction": alpha, "sample": alpha / sigma}[predict.prediction_type]
        found.append(weights[step] * as_noise**2)
    return torch.tensor(found) / (sum(found) / len(found))
