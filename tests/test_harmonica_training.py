"""Training HarmoniCa's router: what an update moves, what it leaves, the weights, the budget, and resuming."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.load import load_adapter
from data.inputs import held_out_inputs
from modules.diffusion_host import WorkCounter
from modules.harmonica import attach_masks
from modules.pipelines import driver, load_pipeline
from tests.tiny import tiny_pipeline
from tests.tiny_forecast import save_tiny
from tests.tiny_harmonica import resumed_and_whole, task_of, trained
from tests.tiny_ilf import driver_of, hooked
from trainers.base import state_hash
from trainers.forecast.fitting import Fitter, image_error, late_steps, mask_of
from trainers.harmonica.lambdas import analytic_lambdas, paper_lambdas, relative_lambdas, telescoping_lambdas
from trainers.image_quality import mse
from trainers.noise_form import NoisePredictor
from trainers.recipes import compose_recipe
from trainers.run_folder import RunFolder
from trainers.training import build_task, train


# Property 5.
@pytest.mark.parametrize("op", ["hold", "linear"])
def test_an_update_moves_its_own_row_and_nothing_else(name: str, op: str, tmp_path: Path) -> None:
    task = task_of(name, module__reuse_op=op, trainer__max_steps="2")
    router, frozen = task.learned.router, state_hash(task.backbone)
    seen: list[list[Tensor]] = []

    def rows() -> list[Tensor]:
        return [
            torch.cat([r.detach().flatten() for r in pair])
            for pair in zip(router.logits, router.corrections or router.logits, strict=True)
        ]

    step = task.optimizer_step
    task.optimizer_step = lambda *a, **k: (seen.append(rows()), step(*a, **k), seen.append(rows()))  # type: ignore
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    for update in range(2):
        before, after = seen[2 * update], seen[2 * update + 1]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [row == update for row in range(3)]
    assert state_hash(task.backbone) == frozen and all(p.grad is None for p in task.backbone.parameters())
    assert len(router.logits) == len(task.config.timesteps) - 1  # the first row has no parameter


def test_logits_stay_within_bounds(name: str, tmp_path: Path) -> None:
    task = trained(name, tmp_path / "run", optimizer__lr="9.0")
    logits = torch.stack(list(task.learned.router.logits))
    assert logits.abs().max() == 5.0


# Property 6.
def test_nothing_accumulates(saved: Path) -> None:
    def with_graph() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) and x.grad_fn is not None for x in gc.get_objects())

    def alive(steps: int) -> int:
        """The most tensors with a graph between two updates, after two trajectories."""
        task = task_of(save_tiny("dit", saved), module__steps=str(steps), objective__lambda_mode="none")
        optimizer = task.configure_optimizers()["optimizer"]
        most = 0
        for number in range(2 * (steps - 1)):
            task.batch_number = number
            task.training_step(torch.tensor([0, 1]), number).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % (steps - 1) in (0, steps - 2):  # the first and the last update of a trajectory
                most = max(most, with_graph())
            if task._running is not None:
                kept = [x for slot in task._running.soft.predictor._kept.values() for x in slot]
                assert len(kept) == len(task.config.units) and not any(x.requires_grad for x in kept)
        return most

    before = with_graph()
    assert alive(3) == alive(7) == before


# Property 7.
def test_lambdas_are_those_of_the_note() -> None:
    """A sampler that adds up what its rows say: leave-one-out and telescoping by hand."""
    values = {1: 0.5, 2: -1.0}
    table = lambda step: values.get(step)  # noqa: E731

    def final(rows: Any) -> Tensor:
        own = {step: rows(step) for step in (0, 1, 2)}
        first, second = (0.0 if own[step] is None else own[step] for step in (1, 2))
        return torch.tensor([[first + 2 * second + first * second]])

    got = paper_lambdas(final, table, [1, 2])  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx([(-2.0 - -2.0) ** 2, (-2.0 - 0.5) ** 2])
    got = telescoping_lambdas(final, table, [1, 2])  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx([0.25, (0.5 - -2.0) ** 2])


def test_relative_weights_times_errors_are_the_change_of_the_image(name: str) -> None:
    task = task_of(name)
    latents, conditions = task._drawn(2, "weights", 0)
    final = lambda table: task.sampler.final(latents, conditions, table)  # noqa: E731
    errors, routed = task.sampler.errors(latents, conditions, task.learned.row), task.config.routed
    assert errors[0] == 0 and (errors[1:] > 0).all()
    change, relative = (
        paper_lambdas(final, task.learned.row, routed),
        relative_lambdas(final, errors, task.learned.row, routed),
    )
    torch.testing.assert_close(relative * (errors[routed] + 1e-3 * errors.max()), change)
    # Where one step alone reuses, the prediction's error is that step's, and so is the change of the image.
    alone = lambda step: task.learned.row(step) if step == routed[-1] else None  # noqa: E731
    errors = task.sampler.errors(latents, conditions, alone)
    assert (errors[: routed[-1]] == 0).all() and errors[routed[-1]] > 0
    assert relative_lambdas(final, errors, alone, routed)[:-1].tolist() == [0.0] * (len(routed) - 1)


@pytest.mark.parametrize("mode", ["paper", "relative", "telescoping"])
def test_nothing_reused_weighs_nothing_and_weights_have_no_gradient(name: str, mode: str) -> None:
    task = task_of(name, objective__lambda_mode=mode)
    task._refresh(0)
    assert (task.learned.lambdas > 0).all() and not task.learned.lambdas.requires_grad
    ones = lambda step: (torch.ones(len(task.config.units)), None) if step else None  # noqa: E731
    task.learned.row = ones  # type: ignore[method-assign]
    task._refresh(0)
    assert task.learned.lambdas.tolist() == [0, 0, 0]


def test_analytic_weights_have_mean_one_and_follow_the_prediction() -> None:
    running = driver_of(tiny_pipeline("dit"), "dit")
    predict = NoisePredictor(running)
    by_noise = analytic_lambdas(predict, [900, 600, 300], [1, 2])
    assert by_noise.mean() == pytest.approx(1)
    predict.prediction_type = "v_prediction"
    by_velocity = analytic_lambdas(predict, [900, 600, 300], [1, 2])
    alphas = [predict.levels(t)[0] for t in (600, 300)]
    assert float(by_velocity[1] / by_velocity[0]) == pytest.approx(
        float(by_noise[1] / by_noise[0]) * (alphas[1] / alphas[0]) ** 2, rel=1e-5
    )


def test_weights_are_refreshed_every_so_many_updates(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[int] = []
    task = task_of(save_tiny("dit", saved), objective__refresh="3")
    monkeypatch.setattr(
        "trainers.harmonica.task.paper_lambdas", lambda *_: asked.append(task.batch_number) or torch.ones(3)
    )
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    assert asked == [0, 3, 6]


# Property 10.
@pytest.mark.slow
def test_training_finds_where_half_of_the_work_goes(tmp_path: Path) -> None:
    """The embedded DiT with 10 steps and 120 trajectories: images are nearer than without learning.

    Without drift and credit it ended, on two sets of inputs, at 0.28 and 0.26 of the error of computing every second
    step, with seed 1 at 0.60 and 0.43.
    """
    settings = {"module.steps": "10", "module.compute": "[]", "trainer.max_steps": str(9 * 120)}
    task = build_task(compose_recipe("harmonica_dit", settings))
    train(task, RunFolder(tmp_path))
    router, running = task.learned.router, task.running
    inputs, seeds, call = held_out_inputs("embedded:dit", None, 0, 64), list(range(64)), {"num_inference_steps": 10}
    with task.without_hooks():
        full = running.generate(inputs, seeds, guidance_scale=1.5, **call)

        def error(mask: Tensor) -> float:
            with attach_masks(running.pipe, task.config, mask[None], None) as handle:
                return mse(running.generate(inputs, seeds, **handle.call_kwargs), full)

        half = task.masks()[0]
        every_second = (torch.arange(10) % 2 == 0)[:, None].expand_as(half)
        shuffled = half.clone()
        order = torch.randperm(half[1:].numel(), generator=torch.Generator().manual_seed(0))
        shuffled[1:] = half[1:].flatten()[order].view_as(half[1:])
        learned, held, random = error(half), error(every_second), error(shuffled)
    assert float(router.mask().float().mean()) == pytest.approx(0.5, abs=0.03)
    assert int(half.sum()) == int(every_second.sum())
    assert learned < 0.5 * held and learned < random / 8


# Property 12: the adapter meets its budget exactly (test_harmonica.py); what steers training towards it is this.
def test_beta_follows_the_budget(saved: Path, tmp_path: Path) -> None:
    """Up while too much is computed, down while too little, held back by the share's own movement."""
    name = save_tiny("dit", saved)
    task = task_of(name, objective__target_compute="0.5")

    def share(value: float) -> None:
        on = round((value - 0.25) / 0.75 * 3 * 8)  # the first of four steps computes all of its 8 units
        logits = torch.full((24,), -5.0)
        logits[:on] = 5.0
        for row, values in zip(task.learned.router.logits, logits.view(3, 8), strict=True):
            row.data.copy_(values)

    def change(before: float, now: float) -> float:
        task.learned.beta.fill_(1.0)
        task.learned.computed.fill_(before)
        share(now)
        task._follow_budget(1)
        assert float(task.learned.computed) == pytest.approx(now)
        return float(task.learned.beta.log())

    assert change(0.75, 0.75) == pytest.approx(0.5 * 0.25, rel=1e-4) and change(0.25, 0.25) == pytest.approx(-0.125)
    assert change(0.8125, 0.75) < 0 < change(0.25, 0.3125)
    fixed = trained(name, tmp_path / "fixed", objective__target_compute="null")
    assert float(fixed.learned.beta) == pytest.approx(1e-3)
    assert torch.equal(fixed.masks()[0], fixed.learned.router.mask())


def test_the_most_that_may_be_computed_falls_to_the_target(saved: Path) -> None:
    task = task_of(save_tiny("dit", saved), objective__target_compute="0.5", objective__anneal="0.75")

    def asked(compute: float) -> list[float]:
        found = []
        for task.steps_done in (0, 3, 6, 8):  # of 8 updates
            found.append(task._asked(0.5, compute))
        return found

    assert asked(0.9) == pytest.approx([0.9, 0.75, 0.5, 0.5])
    assert asked(0.6) == pytest.approx([0.6, 0.6, 0.5, 0.5]) and asked(0.4) == [0.5] * 4
    task.steps_done = 3
    task.learned.beta.fill_(1.0)
    task.learned.computed.fill_(0.9)
    for logits, value in zip(task.learned.router.logits, (5.0, 5.0, -5.0), strict=True):
        logits.data.fill_(value)
    task._follow_budget(1)
    assert float(task.learned.beta) == 1.0 and float(task.learned.computed) == 0.75  # within what is asked for


def test_weights_are_scaled_to_their_mean(saved: Path) -> None:
    name = save_tiny("dit", saved)
    own, scaled = task_of(name), task_of(name, objective__lambda_mean="2.0")
    for task in (own, scaled):
        task.learned.router.load_state_dict(own.learned.router.state_dict())
        task._refresh(0)
    assert float(scaled.learned.lambdas.mean()) == pytest.approx(2, rel=1e-5)
    ratio = scaled.learned.lambdas / own.learned.lambdas
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-4, atol=0)


def test_resuming_in_the_middle_of_a_trajectory_equals_never_stopping(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    settings = {"optimizer__schedule": "constant", "module__reuse_op": "linear"}
    resumed_and_whole(name, tmp_path, **settings)


# Learning-to-Cache.
def test_learning_to_cache_routes_every_second_step(name: str, tmp_path: Path) -> None:
    changes = {"objective.kind": "l2c", "objective.lambda_mode": "none"}
    task = trained(name, tmp_path / "run", **changes, module__steps="6", trainer__max_steps="12")
    assert task.config.routed == [1, 3, 5] and torch.stack(list(task.learned.router.logits)).isfinite().all()
    mask = task.masks()[0]
    assert mask[::2].all() and not mask[1::2].all() and int(mask.sum()) == round(0.6 * mask.numel())
    half = task.learned.router.mask_at(0.5)  # at half nothing is left to learn: every second step is held
    assert half[::2].all() and not half[1::2].any()


def test_the_forecast_is_fitted_anew_to_the_steps_of_the_router(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    changes = {
        "module.granularity": "model", "module.reuse_op": "linear", "module.steps": "6", "objective.refit": "true",
        "objective.polish": "1", "data.recorded": "8", "data.searched": "6",
    }  # fmt: skip
    task = trained(name, tmp_path / "run", **changes)
    masks, weights = task.points()
    assert masks.sum((1, 2)).tolist() == task.masks().sum((1, 2)).tolist() == [4, 5]
    before = hooked(task.running.pipe)
    full, student = task.sample_images(2)
    assert full.shape == student.shape and not torch.equal(full, student)
    assert hooked(task.running.pipe) == before  # those of training, and of nothing else
    assert weights.shape == (2, 6, 1, 7) and not weights[masks].any() and weights[~masks].any(1).all()
    task.export_adapter(tmp_path / "adapter")
    running = driver(load_pipeline(name), name)
    with load_adapter(running.pipe, tmp_path / "adapter") as handle, WorkCounter(running.pipe) as counter:
        running.generate([3], [1], **handle.call_kwargs)
    assert counter.blocks == 4 * 4


def test_steps_of_a_bad_router_end_no_further_than_late_ones(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the search moves nothing, only the second start saves a router that computes first and then never."""
    changes = {
        "module.granularity": "model", "module.reuse_op": "linear", "module.steps": "8", "objective.refit": "true",
        "objective.polish": "1", "data.recorded": "8", "data.searched": "6",
    }  # fmt: skip
    task = task_of(save_tiny("dit", saved), **changes)
    assert task.refit is not None
    errors = {}
    for count in (3, 4, 5):
        early = list(range(count))
        late = late_steps(count, 8)
        fitter = Fitter(task.refit.short, 3, task.settings.objective.ridge)
        for start in (early, late):
            errors[tuple(start)] = image_error(fitter)(fitter.fit(mask_of(start, 8))[2])
        monkeypatch.setattr(
            "trainers.harmonica.refit.search_steps", lambda f, e, start, _: (start, errors[tuple(start)])
        )
        found, _ = task.refit(torch.tensor(mask_of(early, 8))[None, :, None])
        assert found.flatten().tolist() == mask_of(min((early, late), key=lambda start: errors[tuple(start)]), 8)
    assert any(errors[tuple(late_steps(count, 8))] < errors[tuple(range(count))] for count in (3, 4, 5)), errors
