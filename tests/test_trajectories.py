"""What is recorded is what the pipeline itself would have drawn; the schedules are those of the note."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.trajectories import Trajectories, record_trajectories
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, latents_of_call, tiny_driver
from trainers.ilf import schedule
from trainers.ilf.schedule import (
    chosen_timesteps,
    even_positions,
    fit_solver,
    looping_steps,
    nearest_positions,
    own_timesteps,
    quadratic_timesteps,
    run_solver,
    search_positions,
)

STEPS = 5


def record(kind: str, **changes: Any) -> Trajectories:
    settings = {"steps": STEPS, "guidance": GUIDANCE, **changes}
    return record_trajectories(tiny_driver(kind), INPUTS[kind], SEEDS, **settings)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_the_recorded_end_is_the_pipelines_own(kind: str, guidance: float) -> None:
    running = tiny_driver(kind)
    want = latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS, guidance_scale=guidance)
    runs = record(kind, guidance=guidance)
    torch.testing.assert_close(runs.at(STEPS), want, rtol=0, atol=1e-6)
    assert torch.equal(runs.at(0), running.initial_noise(SEEDS))
    assert runs.timesteps == own_timesteps(running.pipe.scheduler, STEPS)


def test_batches_do_not_matter_and_the_scheduler_is_left_alone(kind: str) -> None:
    whole = record(kind)
    torch.testing.assert_close(record(kind, batch_size=3).states, whole.states, rtol=1e-4, atol=1e-4)
    running = tiny_driver(kind)
    running.pipe.scheduler.set_timesteps(7)
    record_trajectories(running, INPUTS[kind], SEEDS, steps=2, guidance=1.0)
    assert len(running.pipe.scheduler.timesteps) == 7


def test_states_stay_with_their_conditions(kind: str) -> None:
    told: list[str] = []
    whole, some = record(kind), record(kind, keep=[STEPS, 0, 2, 2], notify=told.append)
    assert told == ["recording 4 trajectories of 5 steps, 0.0 MiB"]
    assert some.kept == [0, 2, STEPS] and len(some) == 4
    for runs in (some, whole.thinned([0, 2, STEPS])):
        assert all(torch.equal(runs.at(p), whole.at(p)) for p in (0, 2, STEPS))
        assert runs.states.shape == (3, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="is not in list"):
        some.at(1)
    # A run taken out and put behind the others keeps its noise, its end and what it was asked for.
    index = torch.tensor([3, 1])
    joined = whole.select(index).joined(whole)
    order = [3, 1, 0, 1, 2, 3]
    assert torch.equal(joined.states, whole.states[:, order]) and len(joined) == len(joined.conditions) == 6
    for part, before in ((joined.conditions.asked, whole.conditions.asked), (joined.conditions.nothing, None)):
        for name, value in part.items():
            assert torch.equal(value, (before or whole.conditions.nothing)[name][order])


# Schedules.


def test_the_quadratic_spacing_is_the_notes_example() -> None:
    # The note's 1000 is the last timestep that exists, 999.
    assert quadratic_timesteps(10, 1000) == [999, 810, 640, 490, 360, 250, 160, 90, 40, 10]
    assert quadratic_timesteps(2, 1000) == [999, 250] and quadratic_timesteps(1, 1000) == [999]
    assert quadratic_timesteps(5, 500) == [499, 320, 180, 80, 20]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 50])
def test_quadratic_timesteps_fall_within_the_schedule(steps: int) -> None:
    timesteps = quadratic_timesteps(steps, 1000)
    assert len(timesteps) == steps and timesteps[0] == 999 and min(timesteps) >= 10
    assert all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))


@pytest.mark.parametrize("reference", [8, 20, 50])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_positions_rise_from_the_first_and_end_before_the_last_state(steps: int, reference: int) -> None:
    grid = own_timesteps(tiny_driver("dit").pipe.scheduler, reference)
    for positions in (even_positions(steps, reference), nearest_positions(quadratic_timesteps(steps, 1000), grid)):
        assert len(positions) == steps and positions[0] == 0 and positions[-1] < reference
        assert all(a < b for a, b in zip(positions, positions[1:], strict=False))
    assert nearest_positions(grid[:steps], grid) == list(range(steps))


def test_crowded_timesteps_still_get_positions_of_their_own() -> None:
    grid = list(range(950, -1, -50))
    assert nearest_positions([999, 12, 11, 10], grid) == [0, 17, 18, 19]
    assert nearest_positions(quadratic_timesteps(20, 1000), grid) == list(range(20))


def test_chosen_timesteps(kind: str) -> None:
    scheduler = tiny_driver(kind).pipe.scheduler
    assert chosen_timesteps(scheduler, [5, 3], 2) == [5, 3]
    assert chosen_timesteps(scheduler, "quadratic", 10) == quadratic_timesteps(10, 1000)
    assert chosen_timesteps(scheduler, "uniform", 4) == own_timesteps(scheduler, 4)


@pytest.mark.parametrize("steps", range(1, 31))
def test_a_number_of_looping_steps_is_that_many_evenly_spread(steps: int) -> None:
    for count in range(1, steps + 1):
        chosen = [i for i, loops in enumerate(looping_steps(count, steps)) if loops]
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert len(chosen) == count and max(gaps, default=1) - min(gaps, default=1) <= 1
        assert abs(chosen[0] - (steps - 1 - chosen[-1])) <= 1


def test_looping_steps_by_name_and_by_list() -> None:
    assert looping_steps("all", 3) == [True] * 3 and looping_steps("none", 3) == looping_steps(0, 3) == [False] * 3
    assert looping_steps([2, 0], 4) == [True, False, True, False]
    assert looping_steps(4, 10) == [i in (1, 3, 6, 8) for i in range(10)]


@pytest.mark.parametrize("steps", [2, 3])
def test_the_search_never_ends_worse_than_the_even_grid(kind: str, steps: int) -> None:
    running, reference = tiny_driver(kind), 7
    runs = record_trajectories(running, INPUTS[kind], SEEDS, steps=reference, guidance=GUIDANCE)
    fitted, judged = runs.select(torch.arange(2)), runs.select(torch.arange(2, 4))

    def error(positions: list[int]) -> float:
        final = run_solver(running, fit_solver(running, fitted, positions, GUIDANCE), judged, GUIDANCE)
        off = running.decode(final) - running.decode(judged.at(reference))
        return float(off.square().mean((1, 2, 3)).log().mean())

    found = search_positions(running, runs, steps, GUIDANCE)
    even = even_positions(steps, reference)
    assert found[0] == 0 and found == sorted(set(found)) and found[-1] < reference
    assert error(found) <= error(even)
    # Where it stopped, no single move helps, unless the sweeps ran out.
    moved = [[*found[:i], found[i] + by, *found[i + 1 :]] for i in range(1, steps) for by in (1, -1)]
    near = [m for m in moved if m == sorted(set(m)) and m[-1] < reference]
    if search_positions(running, runs, steps, GUIDANCE, rounds=9) == found:
        assert all(error(found) <= error(positions) for positions in near)


def test_the_search_moves_only_while_that_helps(monkeypatch: Any) -> None:
    """With an error that is known: the distance to a hidden grid."""
    hidden = [0, 1, 3, 9]
    runs = record("dit")
    monkeypatch.setattr(schedule, "fit_solver", lambda driver, runs, positions, guidance: positions)
    # States stand in for positions: the judge's images are off by how far the positions are.
    end = runs.at(STEPS)[2:]
    monkeypatch.setattr(
        schedule,
        "run_solver",
        lambda driver, table, judged, guidance: end + sum(abs(a - b) for a, b in zip(table, hidden, strict=True)),
    )
    running = tiny_driver("dit")
    running.decode = lambda latents: latents
    long = Trajectories(list(range(12, 0, -1)), runs.kept, runs.conditions, runs.states)
    monkeypatch.setattr(Trajectories, "at", lambda self, position: self.states[-1])
    assert search_positions(running, long, 4, GUIDANCE, rounds=5) == hidden
