"""HarmoniCa's additions of our own: errors that add up (`objective.drift`), and later reuse (`objective.credit`)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from modules.contracts import Features
from modules.solvers import dpm_solver_table
from tests.contract_cases.harmonica import RECIPE
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_harmonica import resumed_and_whole, task_of, trained
from trainers.harmonica.credit import CreditedCache
from trainers.harmonica.student import SoftCache
from trainers.harmonica.task import HarmoniCaTask
from trainers.harmonica.trajectory import output_weights
from trainers.recipes import ConfigError

BOTH = {"objective.drift": "true", "objective.credit": "true", "objective.lambda_mode": "none"}


def loss_at(task: HarmoniCaTask, number: int) -> Tensor:
    """The loss of one update without an optimizer's step, and what `on_after_backward` reads of it."""
    task.batch_number = number
    loss = task.training_step(torch.tensor([0, 1]), number)
    loss.backward()
    return loss.detach()


def without_clipping(task: HarmoniCaTask) -> None:
    """The tiny DiT samples with clipping, which its random predictions run into; trained ones hardly do."""
    pipe = task.running.pipe
    if isinstance(pipe.scheduler, DDIMScheduler):
        pipe.scheduler = DDIMScheduler(clip_sample=False)


# Drift.
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_output_weights_are_those_of_the_solver(prediction: str) -> None:
    def fresh() -> Any:
        scheduler = DPMSolverMultistepScheduler(prediction_type=prediction)
        scheduler.set_timesteps(7)
        return scheduler

    timesteps, levels = fresh().timesteps.tolist(), fresh().alphas_cumprod
    # The last step goes to clean latents, and with few steps it is of first order.
    table = dpm_solver_table(timesteps, levels, prediction, first_order=[False] * 6 + [True])
    for found, alpha, (newest, *_) in zip(output_weights(fresh), table.alphas, table.data, strict=True):
        sigma = (1 - alpha**2) ** 0.5
        assert found == pytest.approx(newest * (-sigma / alpha if prediction == "epsilon" else -sigma), rel=1e-3)


def test_a_sampler_that_ignores_a_prediction_has_no_drift_in_its_units() -> None:
    def fresh() -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.5])
        return scheduler

    with pytest.raises(ValueError, match="step 1 of FlowMatchEulerDiscreteScheduler .* set objective.drift to false"):
        output_weights(fresh)


def test_the_first_routed_step_has_not_drifted_and_its_loss_is_the_published_one(name: str) -> None:
    plain, drifting = (
        task_of(name, **{"objective.lambda_mode": "none", "objective.drift": on}) for on in ("false", "true")
    )
    drifting.learned.load_state_dict(plain.learned.state_dict())
    for task in (plain, drifting):
        without_clipping(task)
    losses = [loss_at(task, 0) for task in (plain, drifting)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
    first = [task.learned.router.logits[0].grad for task in (plain, drifting)]
    torch.testing.assert_close(first[1], first[0], rtol=1e-3, atol=1e-7)
    assert float(loss_at(drifting, 1)) != pytest.approx(float(loss_at(plain, 1)), rel=1e-2)


def test_drift_is_the_distance_of_next_latents_differentiated_through_the_sampler(name: str) -> None:
    """The loss's gradient, by hand: both samplers from the start, the student's last step with a graph."""
    task, until = task_of(name, **{"objective.lambda_mode": "none", "objective.drift": "true"}), 3
    without_clipping(task)
    sampler, row_of = task.sampler, task.learned.router
    at = task._begun(0, until)
    weight = task.drift.weights[until]
    latents, conditions = task._drawn(2, "trajectory", 0, 0)
    latents = latents * sampler.scheduler().init_noise_sigma
    full, full_scheduler, scheduler, soft = latents, sampler.scheduler(), sampler.scheduler(), SoftCache(task.config)
    for step in range(until + 1):
        with torch.no_grad():
            wanted = sampler.output(full, step, full_scheduler, conditions, None)
        full = full_scheduler.step(wanted, full_scheduler.timesteps[step], full, return_dict=False)[0]
        soft.set_row(row_of(step) if step == until else task.learned.row(step))
        with torch.set_grad_enabled(step == until):
            output = sampler.output(latents, step, scheduler, conditions, soft)
            latents = scheduler.step(output, scheduler.timesteps[step], latents, return_dict=False)[0]
    by_hand = ((latents - full) / weight).square().mean()
    (gradient,) = torch.autograd.grad(by_hand, row_of.logits[until - 1])
    task.learned.beta.zero_()
    loss = task._trajectory_loss(at)
    (found,) = torch.autograd.grad(loss, row_of.logits[until - 1])
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-3) and loss.item() > 0
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_steps_weigh_by_what_they_move_the_latents(saved: Path) -> None:
    name = save_tiny("dit", saved)
    drift = {"objective.lambda_mode": "none", "objective.drift": "true", "objective.beta": "0"}
    even, uneven = task_of(name, **drift), task_of(name, **drift, objective__drift_power="2")
    uneven.learned.load_state_dict(even.learned.state_dict())
    by_step = [[float(loss_at(task, number)) for number in range(3)] for task in (even, uneven)]
    moved = torch.tensor(even.drift.weights[1:]).square()
    wanted = torch.tensor(by_step[0]) * moved / moved.mean()
    torch.testing.assert_close(torch.tensor(by_step[1]), wanted, rtol=1e-4, atol=0)


def test_the_teacher_walks_as_the_plain_sampler_does(name: str) -> None:
    task = task_of(name, **BOTH)
    latents, conditions = task._drawn(2, "trajectory", 0, 0)
    latents = latents * task.sampler.scheduler().init_noise_sigma
    end = task.sampler.final(latents, conditions, lambda step: None)
    loss_at(task, 0)
    at = task._running
    assert at is not None and at.full is not None
    for number in (1, 2):
        loss_at(task, number)
    assert task._running is None and torch.equal(at.full.latents, end) and not torch.equal(at.student.latents, end)


# Credit.
class Straight(SoftCache):
    """Slots with the value of the hard decision and the gradient of the soft one, all in one graph."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.slots: dict[int, Tensor] = {}

    def blend(self, unit: int, step: int, inputs: Features, outputs: Features) -> Features:
        (output,) = outputs
        computed = output.detach()
        if self._scores is None:
            self.slots[unit] = computed
            return outputs
        score, held = self._scores[unit], self.slots[unit]
        turned = (score - score.detach()) * (computed - held.detach())
        self.slots[unit] = (computed if self._computes[unit] else held) + turned
        return (score * output + (1 - score) * held,)


def test_a_score_is_credited_what_its_write_was_worth_to_a_later_step(name: str) -> None:
    """Steps 1 and 2 decide, step 3 reuses; the reference keeps one graph through all three."""
    task = task_of(name, **BOTH)
    units = len(task.config.units)
    scores = torch.full((4, units), 0.7)
    scores[2, ::2] = 0.05  # where step 2 does not write, the slot is that of step 1, and both decisions matter
    latents, conditions = task._drawn(2, "trajectory", 0, 0)

    def error(soft: SoftCache, rows: list[Tensor], graph: tuple[int, ...]) -> Tensor:
        at, scheduler = latents, task.sampler.scheduler()
        for step in range(4):
            soft.set_row((rows[step], None) if step else None)
            with torch.set_grad_enabled(step in graph):
                output = task.sampler.output(at, step, scheduler, conditions, soft)
            if step == 3:
                return output.square().mean()
            at = scheduler.step(output.detach(), scheduler.timesteps[step], at, return_dict=False)[0]
        raise AssertionError

    rows = [row.clone().requires_grad_() for row in scores]
    wanted = torch.autograd.grad(error(Straight(task.config), rows, (1, 2, 3)), rows[1:3])
    soft = CreditedCache(task.config)
    error(soft, [*scores[:3], rows[3]], (3,)).backward()
    found = torch.zeros(4, units)
    for step, unit, worth in soft.worths():
        found[step, unit] += worth
    for step, gradient in zip((1, 2), wanted, strict=True):
        torch.testing.assert_close(found[step], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert found[2].all() and found[1, ::2].all() and not found[1, 1::2].any()
    assert soft.worths() == []  # told once


def test_credit_changes_no_value(name: str) -> None:
    with_credit, without = task_of(name, **BOTH), task_of(name, **(BOTH | {"objective.credit": "false"}))
    with_credit.learned.router.load_state_dict(without.learned.router.state_dict())
    for number in range(3):
        assert torch.equal(loss_at(with_credit, number), loss_at(without, number))


def test_credit_is_paid_out_in_the_next_trajectory(saved: Path, tmp_path: Path) -> None:
    """What rows earned in one trajectory is added to their loss in the next; the last row has no later step."""
    task = trained(save_tiny("dit", saved), tmp_path / "run", **BOTH, trainer__max_steps="3", data__batch_size="2")
    earned, credit = task.learned.earned.clone(), task.learned.credit
    assert earned[0].any() and earned[1].any() and not earned[2].any() and not credit.any()
    task.learned.beta.zero_()
    before = loss_at(task, 3)
    assert torch.equal(credit, earned) and not task.learned.earned.any()
    paid = task.learned.router.logits[0].grad
    task._running, task.learned.router.logits[0].grad = None, None
    assert paid is not None
    scores = task.learned.router(1)[0].detach()
    without = loss_at(task, 3)  # begins again, and nothing was earned meanwhile
    own = task.learned.router.logits[0].grad
    assert own is not None and float(before - without) == pytest.approx(float((earned[0] * scores).sum()), rel=1e-3)
    torch.testing.assert_close(paid - own, earned[0] * scores * (1 - scores), rtol=1e-3, atol=1e-8)


# Both.
def test_an_update_still_moves_one_row_and_nothing_accumulates(saved: Path) -> None:
    def with_graph() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) and x.grad_fn is not None for x in gc.get_objects())

    before = with_graph()
    task = task_of(save_tiny("dit", saved), **BOTH, module__steps="6")
    units = len(task.config.units)
    for number in range(2 * 5):
        for row in task.learned.router.logits:
            row.grad = None
        loss_at(task, number)
        moved = [row.grad is not None and bool(row.grad.any()) for row in task.learned.router.logits]
        assert moved == [row == number % 5 for row in range(5)]
        assert with_graph() == before
        if task._running is not None:
            assert isinstance(task._running.soft, CreditedCache) and len(task._running.soft._slots) == units


@pytest.mark.parametrize("own", [{}, {"module.granularity": "model"}], ids=["submodule", "model"])
def test_resuming_with_drift_and_credit_equals_never_stopping(saved: Path, tmp_path: Path, own: dict[str, str]) -> None:
    settings = BOTH | own | {"optimizer.schedule": "constant", "trainer.ema": "0.5"}
    name = save_tiny("dit", saved)
    part, whole = resumed_and_whole(name, tmp_path, **settings)
    assert whole.learned.credit.any() and torch.equal(part.masks(), whole.masks())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective.kind": "l2c", "objective.lambda_mode": "none", "objective.drift": "true"}, "follow a trajectory"),
        ({"objective.credit": "true", "module.reuse_op": "taylor1"}, "needs module.reuse_op hold"),
        ({"objective.credit": "true", "module.granularity": "block"}, "another module.granularity than block"),
        ({"objective.credit": "true", "trainer.precision": "16-mixed"}, "set trainer.precision to bf16-mixed"),
    ],
)
def test_what_does_not_go_together_is_refused(saved: Path, changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny_recipe(save_tiny("dit", saved), RECIPE, **changes)
