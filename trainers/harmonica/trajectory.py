"""A trajectory under way, and beside it the full model's own from the same noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.pipelines import Conditions
from trainers.harmonica.student import SoftCache


@dataclass
class State:
    """Where a sampler is: latents [B, C, H, W] before `step`, and the scheduler that brought them there."""

    latents: Tensor
    scheduler: Any
    step: int = 0

    def advance(self, output: Tensor) -> None:
        """One step of the sampler with a prediction, of which no graph is kept."""
        timestep = self.scheduler.timesteps[self.step]
        self.latents = self.scheduler.step(output.detach(), timestep, self.latents, return_dict=False)[0]
        self.step += 1


@dataclass
class Trajectory:
    """The student's trajectory, before step `student.step`.

    Attributes:
        full: where the full model is by itself, for losses that measure how far the student has drifted from it.
    """

    number: int
    student: State
    conditions: Conditions
    soft: SoftCache
    full: State | None = None

    @property
    def teacher(self) -> State:
        """The state that the teacher is asked at: its own, or else the student's."""
        return self.student if self.full is None else self.full


class Drift:
    """The mean squared distance of the next latents to the full model's, as a loss of one step's prediction."""

    def __init__(self, weights: list[float], power: float) -> None:
        """`weights` [T] are those of `output_weights`; `power`: steps weigh |weight| ** power, 1 on average."""
        self.weights, self.shares = weights, [abs(weight) ** power for weight in weights]
        mean = sum(self.shares[1:]) / (len(weights) - 1)  # the first step computes everything
        self.shares = [share / mean for share in self.shares]

    def __call__(self, trajectory: Trajectory, output: Tensor, step: int) -> Tensor:
        """After student and full model have advanced by `step`; the gradient is that of `output` [B, C, H, W] alone.

        Told in units of the prediction: where the student had not drifted before, this is its squared error.
        """
        assert trajectory.full is not None
        off = (trajectory.student.latents - trajectory.full.latents) / self.weights[step]
        return self.shares[step] * (off + (output - output.detach())).square().mean()


@torch.no_grad()
def output_weights(fresh: Callable[[], Any]) -> list[float]:
    """What the latents after each step change by with that step's prediction; samplers are linear in it.

    But for clipping, which is left out.

    Args:
        fresh: makes a scheduler with its timesteps set.

    Raises:
        ValueError: a step does not depend on its prediction, so that no drift can be told in its units.
    """
    scheduler, found = fresh(), []
    for step, timestep in enumerate(scheduler.timesteps):
        zeros = torch.zeros(1, 1, 1, 1, device=timestep.device)
        other = copy.deepcopy(scheduler)
        after = scheduler.step(zeros, timestep, zeros, return_dict=False)[0]
        small = zeros + 1e-3  # which stays within what samplers clip to
        moved = float(other.step(small, timestep, zeros, return_dict=False)[0] - after) / 1e-3
        if not 0 < abs(moved) < float("inf"):
            raise ValueError(
                f"step {step} of {type(scheduler).__name__} moves the latents by {moved:g} times its prediction, and "
                "drift is told in units of the prediction: set objective.drift to false"
            )
        found.append(moved)
    return found
