"""Walking recorded runs through the backbone's own sampler, with chosen steps forecast instead of computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.trajectories import Trajectories
from modules.linear_forecast import combined
from modules.pipelines import DiffusionDriver

Weights = tuple[Any, Any]
"""Of one step: of the outputs [H], and of the inputs [1 + H]."""


@dataclass(frozen=True)
class State:
    """Where N runs are: latents [N, C, H, W], the sampler, and the last computed (prediction, latents), newest first.

    Predictions are guided.  The weights are the same for both halves of guidance and the latents too, so a forecast
    of the guided prediction is the guided forecast.
    """

    latents: Tensor
    scheduler: Any
    outputs: tuple[Tensor, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    steps: tuple[int, ...] = ()


class Walk:
    """The sampler of a driver on recorded runs.

    Attributes:
        timesteps: of the sampler; `runs` must have been recorded with it, all positions held.
    """

    def __init__(
        self, driver: DiffusionDriver, runs: Trajectories, guidance: float, history: int, batch_size: int = 64
    ) -> None:
        self.driver, self.runs, self.guidance = driver, runs, guidance
        self.history, self.batch_size = history, batch_size
        self.timesteps = runs.timesteps

    def begin(self, index: Tensor | None = None) -> State:
        """The runs' own noise; of some runs if `index` is given."""
        scheduler = self.driver.sampler(len(self.timesteps), self.driver.device)
        latents = self.runs.at(0)
        return State(latents if index is None else latents[index], scheduler)

    def network(self, state: State, step: int, index: Tensor | None = None) -> Tensor:
        """The guided prediction."""
        timestep = state.scheduler.timesteps[step]
        latents = state.scheduler.scale_model_input(state.latents, timestep)
        rows = torch.arange(len(self.runs), device=latents.device) if index is None else index
        parts = zip(latents.split(self.batch_size), rows.split(self.batch_size), strict=True)
        outputs = [
            self.driver.guided(part, timestep, self.runs.conditions.select(row), self.guidance) for part, row in parts
        ]
        return torch.cat(outputs).to(state.latents.dtype)

    def computed(self, state: State, step: int, index: Tensor | None = None) -> State:
        """One step with the network."""
        output = self.network(state, step, index)
        after = self._stepped(state, step, output)
        return State(
            after,
            state.scheduler,
            (output, *state.outputs)[: self.history],
            (self.shown(state, step), *state.inputs)[: self.history],
            (step, *state.steps)[: self.history],
        )

    def forecast(self, state: State, step: int, weights: Weights) -> State:
        """One step with the forecast in the network's place."""
        output = combined(*weights, state.outputs, (self.shown(state, step), *state.inputs))
        return State(self._stepped(state, step, output), state.scheduler, state.outputs, state.inputs, state.steps)

    def shown(self, state: State, step: int) -> Tensor:
        """What the network sees."""
        shown: Tensor = state.scheduler.scale_model_input(state.latents, state.scheduler.timesteps[step])
        return shown

    def _stepped(self, state: State, step: int, output: Tensor) -> Tensor:
        after: Tensor = state.scheduler.step(output, state.scheduler.timesteps[step], state.latents, return_dict=False)[
            0
        ]
        return after

    def probe(self, state: State, step: int, output: Tensor) -> Tensor:
        """Where a prediction would lead, without going there."""
        return self._stepped(self.fork(state), step, output)

    @staticmethod
    def fork(state: State) -> State:
        """The same state with a sampler of its own."""
        return State(state.latents, copy.deepcopy(state.scheduler), state.outputs, state.inputs, state.steps)

    def final(self, computed: list[bool], weights: Callable[[int], Weights], index: Tensor | None = None) -> Tensor:
        """Final latents [N, C, H, W]."""
        state = self.begin(index)
        for step, here in enumerate(computed):
            state = self.computed(state, step, index) if here else self.forecast(state, step, weights(step))
        return state.latents
