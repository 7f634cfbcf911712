"""Trajectories of a backbone's own sampler: what a module learns from when there is no image set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.pipelines import Conditions, DiffusionDriver


@dataclass(frozen=True)
class Trajectories:
    """N recorded sampler runs.

    timesteps: the S timesteps of the reference grid, falling.
    kept: positions on the grid that are held, rising; 0 is the initial noise, S the final latents.
    states: [len(kept), N, C, H, W].
    """

    timesteps: list[int]
    kept: list[int]
    conditions: Conditions
    states: Tensor

    def __len__(self) -> int:
        return self.states.shape[1]

    def at(self, position: int) -> Tensor:
        """The states [N, C, H, W] at one position of the grid."""
        return self.states[self.kept.index(position)]

    def select(self, index: Tensor) -> Trajectories:
        """Some of the runs; `index` is an integer tensor."""
        return Trajectories(self.timesteps, self.kept, self.conditions.select(index), self.states[:, index])

    def thinned(self, positions: Sequence[int]) -> Trajectories:
        """The same runs with fewer positions held."""
        rows = [self.kept.index(position) for position in positions]
        return Trajectories(self.timesteps, list(positions), self.conditions, self.states[rows])

    def joined(self, other: Trajectories) -> Trajectories:
        """These runs followed by others on the same grid with the same positions held."""
        conditions = _concatenate([self.conditions, other.conditions])
        return Trajectories(self.timesteps, self.kept, conditions, torch.cat([self.states, other.states], dim=1))


@torch.no_grad()
def record_trajectories(
    driver: DiffusionDriver,
    inputs: Sequence[Any],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 64,
    keep: Sequence[int] | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Trajectories:
    """Runs the backbone with its own scheduler and keeps the latents along the way.

    Args:
        inputs, seeds: N prompts or labels, and the seeds of their noise.
        steps: S, steps of the reference sampler.
        keep: positions to hold, of 0..S; all of them by default.
        notify: told how much memory the states take before any is computed.
    """
    kept = list(range(steps + 1)) if keep is None else sorted(set(keep))
    size = len(kept) * len(inputs) * torch.Size(driver.latent_shape).numel() * 4
    notify(f"recording {len(inputs)} trajectories of {steps} steps, {size / 2**20:.1f} MiB")
    states = torch.empty(len(kept), len(inputs), *driver.latent_shape, device=driver.device)
    parts, timesteps = [], []
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, min(start + batch_size, len(inputs)))
        conditions = driver.encode(inputs[rows])
        scheduler = driver.sampler(steps, driver.device)
        latents, timesteps = driver.initial_noise(seeds[rows]), scheduler.timesteps
        latents = latents * scheduler.init_noise_sigma
        for position in range(steps + 1):
            if position in kept:
                states[kept.index(position), rows] = latents.float()
            if position < steps:
                output = driver.guided(latents, timesteps[position], conditions, guidance)
                latents = scheduler.step(output, timesteps[position], latents, return_dict=False)[0]
        parts.append(conditions)
    return Trajectories([int(t) for t in timesteps.tolist()], kept, _concatenate(parts), states)


def _concatenate(parts: list[Conditions]) -> Conditions:
    def join(pick: Callable[[Conditions], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([pick(part)[name] for part in parts]) for name in pick(parts[0])}

    return Conditions(join(lambda part: part.asked), join(lambda part: part.nothing))
