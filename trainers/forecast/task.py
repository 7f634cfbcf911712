"""The task that trains the forecast: recorded runs, the closed form, and what one update does."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.trajectories import Trajectories
from modules.forecast import ForecastConfig, ForecastModule, attach_module, module_entry
from modules.learned_cache import CacheHandle
from modules.pipelines import DiffusionDriver
from trainers.cache_task import CacheTask, load_driver, own_runs, sampling_of
from trainers.forecast.budget import steps_for_speedup
from trainers.forecast.fitting import Fitter, even_steps, image_error, late_steps, mask_of, search_steps
from trainers.forecast.walk import Walk
from trainers.schemas.forecast import Recipe


class ForecastTask(CacheTask):
    """Frozen pipeline, learned weights of every operating point.

    Training follows whole runs of the student and takes the gradient through their computed steps; the operating
    points take turns.
    """

    learned: ForecastModule

    def __init__(self, recipe: Recipe, running: DiffusionDriver, learned: ForecastModule, runs: Trajectories) -> None:
        super().__init__(recipe, running, learned, learned.config.sampling, recipe.data.prompts)
        self.settings, self.runs = recipe, runs
        self.walk = Walk(running, runs, learned.config.guidance, learned.config.history)

    # One update may use one operating point's rows only, but they are parts of the same two tensors.

    def train_dataloader(self) -> DataLoader[Any]:
        """Numbers of recorded runs."""
        return self.stepped_loader(lambda index: index, len(self.runs), self.settings.data.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean logarithm of the runs' squared distance to the full run's final latents, as a mean PSNR sees it."""
        point, index = self.batch_number % len(self.learned.config.computed), batch.to(self.running.device)
        final = self.final(self.learned, point, index)
        error = (final - self.runs.at(len(self.runs.timesteps))[index]).square().mean((1, 2, 3))
        self.note(**{f"final_mse_{point}": error.mean()})
        return (error + 1e-8).log().mean()

    def final(self, module: ForecastModule, point: int, index: Tensor | None = None) -> Tensor:
        """Final latents [N, C, H, W] of recorded runs at an operating point."""
        table = module.config.table(point).tolist()
        return self.walk.final(table, lambda step: module(point, step), index)

    def attach_exported(self) -> CacheHandle:
        """See `CacheTask`."""
        return attach_module(self.running.pipe, cast(ForecastModule, self.exported))

    def module_entry_now(self) -> dict[str, Any]:
        """See `CacheTask`."""
        return module_entry(self.learned.config)


def build_task(recipe: Recipe) -> ForecastTask:
    """Loads the backbone, records its runs, chooses the computed steps, and fits the weights.

    Raises:
        ValueError: the recipe does not fit the backbone, or no operating point reaches the speedup.
    """
    running, settings = load_driver(recipe), recipe.module
    sampling = sampling_of(running, settings.steps, settings.guidance)
    counts = [max(1, round(share * settings.steps)) for share in settings.compute]
    if settings.speedup is not None:
        counts = [steps_for_speedup(running, recipe, sampling, settings.speedup)]
    runs = own_runs(recipe, running, recipe.data.prompts, recipe.data.trajectories, sampling)
    computed = _computed(recipe, running, runs, counts)
    config = ForecastConfig(
        computed=computed,
        timesteps=sampling.timesteps,
        guidance=sampling.guidance,
        history=settings.history,
        sampler=sampling.sampler,
        call=sampling.call,
    )
    module = ForecastModule(config)
    fitter = Fitter(Walk(running, runs, settings.guidance, settings.history), strength=recipe.objective.ridge)
    with torch.no_grad():
        for point, steps in enumerate(computed):
            outputs, inputs, _ = fitter.fit(mask_of(steps, settings.steps))
            module.outputs[point].copy_(outputs)
            module.inputs[point].copy_(inputs)
    return ForecastTask(recipe, running, module, runs)


def _computed(recipe: Recipe, running: DiffusionDriver, runs: Trajectories, counts: list[int]) -> list[list[int]]:
    settings, few = recipe.module, recipe.data.searched
    if isinstance(settings.computed, list):
        return settings.computed
    if settings.computed == "even":
        return [even_steps(count, settings.steps) for count in counts]
    found = []
    for count in counts:
        start = late_steps(count, settings.steps)
        searched = runs.select(torch.arange(few))
        fitter = Fitter(Walk(running, searched, settings.guidance, settings.history), few // 2, recipe.objective.ridge)
        found.append(search_steps(fitter, image_error(fitter), start, recipe.objective.rounds)[0])
        print(f"computed steps at {count} of {settings.steps}: {found[-1]}")
    return found
