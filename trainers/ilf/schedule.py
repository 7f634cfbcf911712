"""Which timesteps the outer steps stand at, which of them loop, and the solver between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from data.trajectories import Trajectories
from modules.pipelines import DiffusionDriver
from modules.solvers import History, SolverTable, combine, denoised, dpm_solver_table, fit_row

HISTORY = 4


def quadratic_timesteps(steps: int, train_steps: int) -> list[int]:
    """ILF's feedback-aware spacing: t_i = max((i n / m)^2 / n, 10) for i = m .. 1 (arXiv:2501.13107 as reviewed).

    The largest is n - 1, the last timestep that exists.
    """
    grid = [i * train_steps / steps for i in range(steps, 0, -1)]
    wanted = [min(max(round(t * t / train_steps), 10), train_steps - 1) for t in grid]
    # Small steps meet at the floor of 10: keep the list falling.
    for i in range(len(wanted) - 2, -1, -1):
        wanted[i] = max(wanted[i], wanted[i + 1] + 1)
    return wanted


def own_timesteps(scheduler: Any, steps: int) -> list[int]:
    """The timesteps that a scheduler itself takes for a number of steps."""
    copied = type(scheduler).from_config(scheduler.config)
    copied.set_timesteps(steps)
    return [int(t) for t in copied.timesteps.tolist()]


def chosen_timesteps(scheduler: Any, wanted: list[int] | str, steps: int) -> list[int]:
    """The outer timesteps of a recipe that records no trajectories."""
    if isinstance(wanted, list):
        return wanted
    if wanted == "quadratic":
        return quadratic_timesteps(steps, scheduler.config.num_train_timesteps)
    return own_timesteps(scheduler, steps)


def looping_steps(wanted: list[int] | int | str, steps: int) -> list[bool]:
    """One flag per outer step; a number means that many, evenly spread."""
    if wanted == "all":
        return [True] * steps
    if wanted == "none":
        return [False] * steps
    if isinstance(wanted, int):
        chosen = {round((i + 0.5) * steps / wanted - 0.5) for i in range(wanted)}
    else:
        chosen = set(wanted)
    return [i in chosen for i in range(steps)]


def even_positions(steps: int, reference_steps: int) -> list[int]:
    """Positions on the reference grid, evenly spaced from the first."""
    return [round(i * reference_steps / steps) for i in range(steps)]


def nearest_positions(timesteps: Sequence[int], grid: Sequence[int]) -> list[int]:
    """For each timestep the nearest position on the reference grid; the first is always 0 and none repeats."""
    found = [0]
    for t in timesteps[1:]:
        nearest = min(range(len(grid)), key=lambda position: abs(grid[position] - t))
        found.append(max(nearest, found[-1] + 1))
    # Where the last ones crowd, those before them make room.
    return [min(position, len(grid) - len(found) + i) for i, position in enumerate(found)]


@torch.no_grad()
def fit_solver(
    driver: DiffusionDriver, runs: Trajectories, positions: list[int], guidance: float, batch_size: int = 64
) -> SolverTable:
    """A solver whose every row takes the student's own states nearest to the reference ones, by least squares.

    Args:
        runs: trajectories that hold `positions` and the final latents.
        positions: of the outer steps on the reference grid.
    """
    table = initial_table(driver, [runs.timesteps[p] for p in positions])
    state, data = list(table.state), [list(row) for row in table.data]
    latents, histories = runs.at(0), History(HISTORY)
    targets = [runs.at(p) for p in [*positions[1:], len(runs.timesteps)]]
    for i, timestep in enumerate(table.timesteps):
        output = _guided(driver, latents, timestep, runs, guidance, batch_size)
        kept = histories.push(denoised(output, latents, table.alphas[i], table.prediction_type))
        state[i], row = fit_row(latents, kept, targets[i])
        data[i] = row + [0.0] * (HISTORY - len(row))
        latents = combine(state[i], data[i], latents, kept)
    return SolverTable(**{**asdict(table), "state": state, "data": data})


def initial_table(driver: DiffusionDriver, timesteps: list[int], first_order: Sequence[bool] = ()) -> SolverTable:
    """DPM-Solver++(2M) on these timesteps with the backbone's noise schedule."""
    scheduler = driver.pipe.scheduler
    return dpm_solver_table(timesteps, scheduler.alphas_cumprod, scheduler.config.prediction_type, HISTORY, first_order)


@torch.no_grad()
def run_solver(
    driver: DiffusionDriver, table: SolverTable, runs: Trajectories, guidance: float, batch_size: int = 64
) -> Tensor:
    """Final latents [N, C, H, W] of a solver from the runs' own noise, without feedback."""
    latents, history = runs.at(0), History(HISTORY)
    for i, timestep in enumerate(table.timesteps):
        output = _guided(driver, latents, timestep, runs, guidance, batch_size)
        kept = history.push(denoised(output, latents, table.alphas[i], table.prediction_type))
        latents = combine(table.state[i], table.data[i], latents, kept)
    return latents


def search_positions(
    driver: DiffusionDriver, runs: Trajectories, steps: int, guidance: float, rounds: int = 2
) -> list[int]:
    """Positions of the outer steps whose fitted solver ends nearest to the reference, by coordinate descent.

    Half of the runs fit the rows, the other half judge; a position moves while that helps, for at most `rounds` sweeps.
    The judge is the mean logarithm of the images' squared errors, which is what a mean PSNR sees.
    """
    half = len(runs) // 2
    fitted, judged = runs.select(torch.arange(half)), runs.select(torch.arange(half, len(runs)))
    known: dict[tuple[int, ...], float] = {}

    def error(positions: list[int]) -> float:
        key = tuple(positions)
        if key not in known:
            table = fit_solver(driver, fitted, positions, guidance)
            final = run_solver(driver, table, judged, guidance)
            off = driver.decode(final) - driver.decode(judged.at(len(runs.timesteps)))
            known[key] = float(off.square().mean((1, 2, 3)).log().mean())
        return known[key]

    best = even_positions(steps, len(runs.timesteps))
    for _ in range(rounds):
        before = list(best)
        for i in range(1, steps):
            for move in (1, -1):
                while _free(best, i, move, len(runs.timesteps)) and error(_moved(best, i, move)) < error(best):
                    best = _moved(best, i, move)
        if best == before:
            break
    return best


def _moved(positions: list[int], i: int, move: int) -> list[int]:
    return [*positions[:i], positions[i] + move, *positions[i + 1 :]]


def _free(positions: list[int], i: int, move: int, end: int) -> bool:
    following = positions[i + 1] if i + 1 < len(positions) else end
    return positions[i - 1] < positions[i] + move < following


def _guided(
    driver: DiffusionDriver, latents: Tensor, timestep: int, runs: Trajectories, guidance: float, batch_size: int
) -> Tensor:
    t = torch.tensor(timestep, device=latents.device)
    rows = torch.arange(len(latents), device=latents.device).split(batch_size)
    parts: list[Any] = [driver.guided(latents[r], t, runs.conditions.select(r), guidance) for r in rows]
    return torch.cat(parts)
