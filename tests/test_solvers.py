"""Solver tables are the published solvers, their fit is least squares, and as schedulers they keep every digit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from data.trajectories import record_trajectories
from modules.solvers import (
    History,
    LearnedMultistepScheduler,
    SolverTable,
    combine,
    denoised,
    dpm_solver_table,
    fit_row,
    noise_of,
)
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, tiny_driver
from trainers.ilf.schedule import even_positions, fit_solver, initial_table, run_solver

SHAPE = (2, 4, 5, 5)


def model(latents: Tensor, timestep: int) -> Tensor:
    """A smooth stand-in for a network, float64."""
    return torch.tanh(latents * (0.3 + timestep / 2000)) + 0.1 * torch.sin(latents.roll(1, -1) + timestep / 300)


def trajectory(scheduler: Any, steps: int, **call: Any) -> list[Tensor]:
    """All latents of a scheduler's run, from the same noise."""
    scheduler.set_timesteps(steps, **call)
    latents, states = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for timestep in scheduler.timesteps:
        latents = scheduler.step(model(latents, int(timestep)), timestep, latents).prev_sample
        states.append(latents)
    return states


def assert_same(table: SolverTable, scheduler: Any) -> None:
    steps = len(table.timesteps)
    want = trajectory(scheduler, steps)
    assert [int(t) for t in scheduler.timesteps] == table.timesteps
    for one, other in zip(trajectory(LearnedMultistepScheduler(**asdict(table)), steps), want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def timesteps_of(scheduler: Any, steps: int) -> list[int]:
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_the_table_is_dpm_solver_plus_plus(prediction: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction, solver_order=2, solver_type="midpoint")
    assert_same(dpm_solver_table(timesteps_of(scheduler, steps), scheduler.alphas_cumprod, prediction), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_first_order_rows_are_ddim(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, set_alpha_to_one=True)
    timesteps = timesteps_of(scheduler, 8)
    assert_same(dpm_solver_table(timesteps, scheduler.alphas_cumprod, prediction, first_order=[True] * 8), scheduler)


def test_single_first_order_rows_use_their_own_prediction_alone() -> None:
    chosen = [False, False, True, False, True, False]
    table = dpm_solver_table([900, 700, 500, 300, 100, 50], DDIMScheduler().alphas_cumprod, "epsilon", 3, chosen)
    alone = [not any(row[1:]) for row in table.data]
    assert alone == [True, False, True, False, True, True]
    assert all(len(row) == 3 for row in table.data)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_data_and_noise_of_an_output_make_the_latents(prediction: str) -> None:
    output, latents = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    for alpha in (0.99, 0.5, 0.05):
        clean, noise = (part(output, latents, alpha, prediction) for part in (denoised, noise_of))
        torch.testing.assert_close(alpha * clean + (1 - alpha**2) ** 0.5 * noise, latents)
    with pytest.raises(ValueError, match="prediction_type is 'flow', not one of epsilon, v_prediction, sample"):
        denoised(output, latents, 0.5, "flow")


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_finds_the_weights_that_made_the_target(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents, *kept = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64).unbind()
    weights = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
    target = combine(weights[0], weights[1:], latents, kept)
    state, data = fit_row(latents, kept, target, ridge=1e-9)
    torch.testing.assert_close(torch.tensor([state, *data]), torch.tensor(weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_row_is_nearer_than_the_fitted_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents, one, two, target = torch.randn(4, *SHAPE, generator=generator).unbind()
    state, data = fit_row(latents, [one, two], target)

    def error(state: float, data: list[float]) -> float:
        return float((combine(state, data, latents, [one, two]) - target).square().mean())

    fitted = error(state, data)
    for nudge in torch.randn(20, 3, generator=generator).mul(0.1).tolist():
        other = error(state + nudge[0], [data[0] + nudge[1], data[1] + nudge[2]])
        assert fitted <= other * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["pixart", "dit"])
@torch.no_grad()
def test_every_fitted_row_is_at_least_as_good_as_the_initial_one_on_the_same_states(kind: str) -> None:
    driver, steps, reference = tiny_driver(kind), 4, 8
    runs = record_trajectories(driver, INPUTS[kind], SEEDS, steps=reference, guidance=GUIDANCE)
    positions = even_positions(steps, reference)
    first = initial_table(driver, [runs.timesteps[p] for p in positions])
    fitted = fit_solver(driver, runs, positions, GUIDANCE)
    assert fitted.timesteps == first.timesteps and fitted.alphas == first.alphas
    latents, history = runs.at(0), History(4)
    for i, timestep in enumerate(fitted.timesteps):
        output = driver.guided(latents, torch.tensor(timestep), runs.conditions, GUIDANCE)
        kept = history.push(denoised(output, latents, fitted.alphas[i], fitted.prediction_type))
        target = runs.at([*positions, reference][i + 1])
        before, after = (
            (combine(table.state[i], table.data[i], latents, kept) - target).square().mean()
            for table in (first, fitted)
        )
        assert after <= before * (1 + 1e-4)
        latents = combine(fitted.state[i], fitted.data[i], latents, kept)
    torch.testing.assert_close(run_solver(driver, fitted, runs, GUIDANCE, batch_size=3), latents, rtol=1e-4, atol=1e-4)


# As a scheduler.


@pytest.fixture
def table() -> SolverTable:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(3, 6, generator=generator, dtype=torch.float64).tolist()
    return SolverTable(
        timesteps=[801, 403, 7], alphas=[row[0] for row in numbers], state=[row[1] for row in numbers],
        data=[row[2:] for row in numbers], prediction_type="v_prediction",
    )  # fmt: skip


def test_every_number_survives_json(table: SolverTable, tmp_path: Path) -> None:
    scheduler = LearnedMultistepScheduler(**asdict(table))
    scheduler.save_config(tmp_path)
    assert LearnedMultistepScheduler.from_pretrained(tmp_path).table == table
    again = LearnedMultistepScheduler.from_config(json.loads(json.dumps(dict(scheduler.config))))
    assert again.table == table and len(again) == 1000
    for one, other in zip(trajectory(again, 3), trajectory(scheduler, 3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "call",
    [
        lambda scheduler: scheduler.set_timesteps(4),
        lambda scheduler: scheduler.set_timesteps(timesteps=[801, 403, 8]),
        lambda scheduler: scheduler.set_timesteps(3, timesteps=[801, 403]),
    ],
)
def test_other_steps_are_refused(table: SolverTable, call: Callable[[Any], None]) -> None:
    scheduler = LearnedMultistepScheduler(**asdict(table))
    with pytest.raises(ValueError, match=r"fitted for 3 steps at \[801, 403, 7\], and was asked for"):
        call(scheduler)
    scheduler.set_timesteps(timesteps=[801, 403, 7])
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [801, 403, 7]


def test_a_step_beyond_the_last_says_so_and_a_new_trajectory_forgets_the_last(table: SolverTable) -> None:
    scheduler = LearnedMultistepScheduler(**asdict(table))
    first = trajectory(scheduler, 3)
    with pytest.raises(ValueError, match="this solver has 3 steps, and all are done: call set_timesteps to begin anew"):
        scheduler.step(first[-1], 7, first[-1])
    scheduler.set_timesteps(3)
    scheduler.step(first[0], 801, first[0])  # a trajectory that somebody gives up
    assert all(map(torch.equal, trajectory(scheduler, 3), first))


def test_half_precision_goes_in_and_out_and_is_summed_wide(table: SolverTable) -> None:
    scheduler = LearnedMultistepScheduler(**asdict(table))
    scheduler.set_timesteps(3)
    latents, output = torch.randn(2, *SHAPE).bfloat16().unbind()
    (got,) = scheduler.step(output, 801, latents, return_dict=False)
    wide = denoised(output.float(), latents.float(), table.alphas[0], table.prediction_type)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, combine(table.state[0], table.data[0], latents.float(), [wide]).bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": [1.0]}, r"one row per step, and has parts of lengths \[1, 3\]"),
        ({"timesteps": [1, 2, 3]}, r"timesteps must fall, and are \[1, 2, 3\]"),
        ({"timesteps": [3, 2, 2]}, r"timesteps must fall, and are \[3, 2, 2\]"),
    ],
)
def test_tables_that_are_none_are_refused(table: SolverTable, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SolverTable(**{**asdict(table), **change})
