"""Learning along the sampler's own trajectory: the loop and the solver's numbers against the reference states."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from data.trajectories import Trajectories
from modules.ilf import ILFHandle, ILFModule
from modules.pipelines import DiffusionDriver
from modules.solvers import History, SolverTable, combine, denoised


class SolverRows(nn.Module):
    """A solver table's weights as parameters: state [m], data [m, history]."""

    def __init__(self, table: SolverTable) -> None:
        super().__init__()
        self.fixed = table
        self.state = nn.Parameter(torch.tensor(table.state))
        self.data = nn.Parameter(torch.tensor(table.data))

    def forward(self, step: int) -> tuple[Tensor, Tensor]:
        """The weights of one step: of the state [], and of the data [history]."""
        return self.state[step], self.data[step]

    def table(self) -> SolverTable:
        """The present weights as a table."""
        return SolverTable(**{**asdict(self.fixed), "state": self.state.tolist(), "data": self.data.tolist()})


class Learned(nn.Module):
    """All that ILF trains: the loop, and the solver's rows where the recipe asks for them."""

    def __init__(self, loop: ILFModule, rows: SolverRows | None) -> None:
        super().__init__()
        self.loop = loop
        if rows is not None:
            self.rows = rows


class Rollout:
    """Runs the student from the runs' noise and compares each state with the reference's.

    The loss of a step is its mean squared error over that of the same solver without feedback, so that every step
    counts alike whatever its scale; per image it is taken in logarithms when `logarithmic`, as PSNR does.
    """

    def __init__(
        self,
        driver: DiffusionDriver,
        runs: Trajectories,
        positions: list[int],
        table: SolverTable,
        guidance: float,
    ) -> None:
        self.driver, self.runs, self.table, self.guidance = driver, runs, table, guidance
        self.steps = len(positions)
        self.positions = [*positions, len(runs.timesteps)]

    def loss(
        self, learned: Learned, handle: ILFHandle, index: Tensor, start: int, unroll: int, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of `unroll` steps with gradient, after `start` steps without.

        Args:
            index: which runs, int64 [B].
            weights: [m], of each step's loss.
        Returns:
            the weighted mean, and the steps' own mean squared errors [m] (zero where not computed).
        """
        conditions = self.runs.conditions.select(index)
        latents, history = self.runs.at(self.positions[0])[index], History(len(self.table.data[0]))
        total, errors = latents.new_zeros(()), latents.new_zeros(self.steps)
        rows = getattr(learned, "rows", None)
        for i in range(start + unroll):
            with torch.no_grad() if i < start else nullcontext():
                handle.clock.pin(i)
                t = torch.tensor(self.table.timesteps[i], device=latents.device)
                output = self.driver.guided(latents, t, conditions, self.guidance)
                kept = history.push(denoised(output, latents, self.table.alphas[i], self.table.prediction_type))
                state, data = (self.table.state[i], self.table.data[i]) if rows is None else rows(i)
                latents = combine(state, data, latents, kept)
            if i >= start:
                error = (latents - self.runs.at(self.positions[i + 1])[index]).square().mean((1, 2, 3))
                errors[i] = error.detach().mean()
                total = total + weights[i] * (error + 1e-8).log().mean()
        return total / weights[start : start + unroll].sum(), errors

    @torch.no_grad()
    def final(self, learned: Learned, handle: ILFHandle, runs: Trajectories, batch_size: int = 64) -> Tensor:
        """Final latents [N, C, H, W] of the student from other runs' noise."""
        other = Rollout(self.driver, runs, self.positions[:-1], self.table, self.guidance)
        return torch.cat([other._final(learned, handle, index) for index in torch.arange(len(runs)).split(batch_size)])

    def _final(self, learned: Learned, handle: ILFHandle, index: Tensor) -> Tensor:
        conditions = self.runs.conditions.select(index)
        table = learned.rows.table() if hasattr(learned, "rows") else self.table
        latents, history = self.runs.at(self.positions[0])[index], History(len(table.data[0]))
        for i, timestep in enumerate(table.timesteps):
            handle.clock.pin(i)
            t = torch.tensor(timestep, device=latents.device)
            output = self.driver.guided(latents, t, conditions, self.guidance)
            kept = history.push(denoised(output, latents, table.alphas[i], table.prediction_type))
            latents = combine(table.state[i], table.data[i], latents, kept)
        return latents
