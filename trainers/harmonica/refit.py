"""Whole steps: the forecast fitted anew, in closed form, to the steps that the router chose."""

from __future__ import annotations

import torch
from torch import Tensor

from data.trajectories import Trajectories
from modules.harmonica import HarmoniCaConfig
from modules.pipelines import DiffusionDriver
from trainers.forecast.fitting import Fitter, image_error, late_steps, mask_of, search_steps
from trainers.forecast.walk import Walk


class Refit:
    """Masks of whole steps -> the same, or other steps that end nearer, and the forecast's weights for them.

    What was fitted before is remembered, since sampling and export ask for the same masks.
    """

    def __init__(
        self,
        running: DiffusionDriver,
        runs: Trajectories,
        config: HarmoniCaConfig,
        ridge: float,
        searched: int,
        polish: int,
    ) -> None:
        self.config, self.ridge, self.searched, self.polish = config, ridge, searched, polish
        self.walk = Walk(running, runs, config.guidance, config.history)
        few = runs.select(torch.arange(searched))
        self.short = Walk(running, few, config.guidance, config.history)
        self._known: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [P, T, 1] and weights [P, T, 1, W]."""
        parts = [self._fitted(tuple(mask.flatten().tolist())) for mask in masks]
        return torch.stack([mask for mask, _ in parts]), torch.stack([weights for _, weights in parts])

    def _fitted(self, router: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        if router not in self._known:
            mask = list(router)
            if self.polish:
                fitter = Fitter(self.short, self.searched // 2, self.ridge)
                own = [step for step, computed in enumerate(mask) if computed]
                # Small moves find the nearest minimum, and a router of few trajectories may be far from a good one:
                # late steps are a second start.  One sweep tells which of the two is worth the others.
                starts, judge = [own, late_steps(len(own), len(mask))], image_error(fitter)
                ends = [search_steps(fitter, judge, start, 1) for start in starts]
                nearer = min(ends, key=lambda end: end[1])[0]
                mask = mask_of(search_steps(fitter, judge, nearer, self.polish - 1)[0], len(mask))
            outputs, inputs, _ = Fitter(self.walk, strength=self.ridge).fit(mask)
            self._known[router] = (torch.tensor(mask)[:, None], torch.cat([outputs, inputs], dim=1)[:, None])
        return self._known[router]
