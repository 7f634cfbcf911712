"""From a speedup that is asked for to the number of steps that may be computed on this machine."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from data.inputs import training_inputs
from modules.forecast import ForecastConfig, ForecastModule, attach_module
from modules.learned_cache import Sampling
from modules.pipelines import DiffusionDriver
from trainers.config import RecipeBase
from trainers.timing import synchronize

_ROUNDS = 5


def steps_for_speedup(running: DiffusionDriver, recipe: RecipeBase, sampling: Sampling, speedup: float) -> int:
    """The most computed steps with which the pipeline's call still is `speedup` times as fast as the full one.

    A call takes a fixed part (text encoder, decoder), a part for each computed step and one for each forecast step.
    They are told apart by timing the full call, one with a quarter of the steps, and one that forecasts all but the
    first.

    Raises:
        ValueError: not even one computed step is that fast.
    """
    steps, count = len(sampling.timesteps), recipe.evaluation.timing_batch
    inputs = training_inputs(recipe.backbone.name, recipe.evaluation.prompts, recipe.seed, count)

    def seconds(**call: Any) -> float:
        times = []
        for _ in range(_ROUNDS + 1):
            synchronize(running.device)
            start = time.perf_counter()
            running.generate(inputs, list(range(count)), guidance_scale=sampling.guidance, **call)
            synchronize(running.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first one warms up

    quarter = max(1, steps // 4)
    full, short = seconds(num_inference_steps=steps), seconds(num_inference_steps=quarter)
    config = ForecastConfig(computed=[[0]], timesteps=sampling.timesteps, guidance=sampling.guidance)
    module = ForecastModule(config)
    with torch.no_grad():
        module.outputs[:, :, 0] = 1.0
    with attach_module(running.pipe, module):
        forecast = seconds(num_inference_steps=steps)
    return computed_steps(steps, quarter, full, short, forecast, speedup)


def computed_steps(steps: int, quarter: int, full: float, short: float, forecast: float, speedup: float) -> int:
    """Solves full / speedup = fixed + k computed + (steps - k) skipped for k, rounded down.

    Args:
        full, short, forecast: seconds of `steps` computed steps, of `quarter` computed steps, and of one computed and
            `steps` - 1 forecast ones.
    """
    computed = (full - short) / (steps - quarter)
    fixed = full - steps * computed
    skipped = max(0.0, (forecast - fixed - computed) / max(1, steps - 1))
    found = int((full / speedup - fixed - steps * skipped) / (computed - skipped))
    if found < 1:
        fastest = full / (fixed + computed + (steps - 1) * skipped)
        raise ValueError(f"speedup {speedup:g} is out of reach here: one computed step of {steps} gives {fastest:.2f}x")
    return min(found, steps - 1)
