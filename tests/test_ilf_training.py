"""Training ILF: what moves and what does not, the targets, the rollout, and that it learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.trajectories import record_trajectories
from modules.embedded import EMBEDDED_FOLDER
from modules.ilf import ILFModule
from tests.tiny_ilf import (
    DEPTH,
    GUIDANCE,
    INPUTS,
    LEARNED_SOLVER,
    latents_of_call,
    noisy_module,
    save_tiny,
    tiny_driver,
    tiny_recipe,
)
from trainers.base import state_hash
from trainers.callbacks import read_checkpoint
from trainers.ilf.targets import fad_target, trajectory_target
from trainers.ilf.task import ILFTask
from trainers.noise_form import NoisePredictor, image_weights
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

OBJECTIVES: dict[str, dict[str, str]] = {
    "trajectory": {},
    "target timestep": {"module.inner_timestep": "target", "module.scale_shape": "per_step"},
    "fad": {"objective.target": "fad", "objective.lambda_denoise": "1.0"},
    "rollout": {"module.solver": "dpm", "objective.rollout": "true", "module.scale_shape": "channel"},
    "learned solver": {**LEARNED_SOLVER, "objective.unroll": "2", "module.timesteps": "quadratic"},
}


@pytest.fixture(params=["pixart", "dit"])
def backbone(request: pytest.FixtureRequest, saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return save_tiny(request.param, saved, monkeypatch)


@pytest.fixture
def dit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return save_tiny("dit", saved, monkeypatch)


def task_of(name: str, **changes: str) -> ILFTask:
    return build_task(tiny_recipe(name, **changes))


def folder_at(path: Path) -> RunFolder:
    path.mkdir(parents=True)
    return RunFolder(path)


# Property 2.
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_first_the_strengths_alone_have_a_gradient(backbone: str, objective: str) -> None:
    task = task_of(backbone, **OBJECTIVES[objective])
    optimizer = task.configure_optimizers()["optimizer"]
    looped = 1 if objective in ("trajectory", "target timestep", "fad") else 2
    for update in range(3):
        torch.manual_seed(update)
        task.training_step(torch.tensor([0, 3]), update).backward()
        block = [p.grad for p in task.learned.loop.feedback.parameters()]
        strength = task.learned.loop.scale.grad
        assert strength.abs().sum() > 0 and (strength.dim() == 1 or int(strength.flatten(1).any(1).sum()) <= looped)
        if update == 0:
            assert not any(grad.any() for grad in block if grad is not None)
            if hasattr(task.learned, "rows"):
                assert task.learned.rows.data.grad.any() and task.learned.rows.state.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    assert any(grad is not None and grad.any() for grad in block)
    assert all(p.grad is None for p in task.backbone.parameters())


# Property 3.
@pytest.mark.parametrize("objective", ["trajectory", "learned solver"])
def test_the_trainer_moves_what_learns_and_no_bit_of_the_backbone(
    backbone: str, objective: str, tmp_path: Path
) -> None:
    task = task_of(backbone, **OBJECTIVES[objective], trainer__max_steps="6", trainer__sample_every="3")
    pipe = task.running.pipe
    frozen = [state_hash(pipe.transformer), state_hash(pipe.vae)]
    before = copy.deepcopy(task.state_dict())
    train(task, folder_at(tmp_path / "run"))
    assert [state_hash(pipe.transformer), state_hash(pipe.vae)] == frozen
    assert not any(p.requires_grad for p in pipe.transformer.parameters())
    assert not any(part.training for part in pipe.transformer.modules()) and task.learned.training
    assert not any(part.training for part in task.learned.loop.feedback.modules())  # a DiT block would drop labels
    still = [name for name, value in task.state_dict().items() if torch.equal(value, before[name])]
    # Rows of predictions that do not exist yet cannot move, everything else does.
    assert still == []
    assert all(bool(torch.isfinite(value).all()) for value in task.state_dict().values())


def test_resuming_equals_never_stopping_bit_for_bit(dit: str, tmp_path: Path) -> None:
    settings = {**OBJECTIVES["learned solver"], "optimizer__schedule": "constant", "trainer__ema": "0.9"}
    whole, parts = task_of(dit, **settings), folder_at(tmp_path / "parts")
    train(whole, folder_at(tmp_path / "whole"))
    train(task_of(dit, **settings, trainer__max_steps="2"), parts)
    resumed = task_of(dit, **settings)
    train(resumed, parts)
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_holds_the_learned_part_alone(dit: str, tmp_path: Path) -> None:
    run = folder_at(tmp_path / "run")
    train(task_of(dit, **LEARNED_SOLVER, trainer__ema="0.9"), run)
    content = read_checkpoint(run.latest_checkpoint())
    assert {name.split(".")[0] for name in content["state_dict"]} == {"learned", "averaged"}
    assert {name.split(".")[1] for name in content["state_dict"]} == {"loop", "rows"}


# Property 7, and what the targets are otherwise.


@pytest.mark.parametrize("kind", ["pixart", "dit"])
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@torch.no_grad()
def test_targets_are_those_of_the_note(kind: str, guidance: float) -> None:
    driver = tiny_driver(kind)
    predict, conditions = NoisePredictor(driver), driver.encode(INPUTS[kind])
    clean, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2)).unbind()
    for here, there in ((950, 700), (700, 333), (20, -1)):
        latents = predict.add_noise(clean, noise, here)
        once = trajectory_target(predict, latents, here, there, conditions, 1, guidance)
        torch.testing.assert_close(once, predict(latents, here, conditions, guidance), rtol=1e-4, atol=1e-4)
        wanted = trajectory_target(predict, latents, here, there, conditions, 3, guidance)
        walked = latents
        grid = [here, round(here + (there - here) / 3), round(here + 2 * (there - here) / 3), there]
        for a, b in zip(grid, grid[1:], strict=False):
            walked = predict.ddim(walked, predict(walked, a, conditions, guidance), a, b)
        torch.testing.assert_close(predict.ddim(latents, wanted, here, there), walked, rtol=1e-4, atol=1e-4)
    want = predict(predict.add_noise(clean, noise, 250), 250, conditions)
    assert torch.equal(fad_target(predict, clean, noise, 501, conditions), want)


def test_more_substeps_than_timesteps_are_as_many_as_there_are() -> None:
    driver = tiny_driver("dit")
    predict, conditions = NoisePredictor(driver), driver.encode([1])
    latents = driver.initial_noise([3])
    few, many = (trajectory_target(predict, latents, 5, 3, conditions, n) for n in (2, 50))
    assert torch.equal(few, many)


def test_image_weights_have_mean_one_and_follow_the_levels() -> None:
    predict, timesteps = NoisePredictor(tiny_driver("dit")), [900, 600, 300]
    weights = image_weights(predict, timesteps)
    assert sum(weights) / 3 == pytest.approx(1)
    # Moving each step's noise by one moves the clean latents, all else equal, by the square root of its weight.
    clean = torch.zeros(1, dtype=torch.float64)
    moved = []
    for here, there in zip(timesteps, [600, 300, -1], strict=True):
        one, other = (predict.ddim(clean, clean + by, here, there) for by in (0.0, 1.0))
        moved.append(float((other - one) / predict.levels(there)[0]) ** 2)
    assert weights == pytest.approx([m / sum(moved) * 3 for m in moved])


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@torch.no_grad()
def test_the_noise_form_of_other_predictions_steps_as_their_own(prediction: str) -> None:
    from modules.solvers import denoised

    driver = tiny_driver("dit")
    driver.pipe.scheduler.register_to_config(prediction_type=prediction)
    predict, conditions, latents = NoisePredictor(driver), driver.encode([1]), driver.initial_noise([3])
    alpha, sigma = predict.levels(600)
    clean = denoised(driver.guided(latents, torch.tensor(600), conditions, 1.0), latents, alpha, prediction)
    noise = predict(latents, 600, conditions)
    torch.testing.assert_close(alpha * clean + sigma * noise, latents, rtol=1e-5, atol=1e-5)


# The rollout.


@pytest.mark.parametrize("unroll", ["0", "1", "2"])
def test_the_rollout_loss_is_the_distance_to_the_recorded_states(dit: str, unroll: str) -> None:
    task = task_of(dit, **LEARNED_SOLVER, objective__unroll=unroll, objective__weighting="final")
    rollout, runs, learned = task.rollout, task.rollout.runs, task.learned
    learned.loop.load_state_dict(noisy_module(learned.loop.config, task.backbone).state_dict())
    index, last = torch.tensor([4, 1]), rollout.steps
    loss, errors = rollout.loss(learned, task.loop, index, last - 1, 1, torch.tensor([0.1, 0.1, 1.0]))
    final = rollout.final(learned, task.loop, runs.select(index))
    error = (final - runs.at(len(runs.timesteps))[index]).square().mean((1, 2, 3))
    assert errors[:-1].tolist() == [0, 0]
    torch.testing.assert_close(errors[-1], error.mean())
    torch.testing.assert_close(loss, (error + 1e-8).log().mean())


# Property 8.


def final_error(task: ILFTask) -> tuple[float, float]:
    """Mean squared error of the final latents on the training runs: with the loop, and with the loop bypassed."""
    rollout = task.rollout
    want = rollout.runs.at(len(rollout.runs.timesteps))
    errors = [(rollout.final(task.learned, task.loop, rollout.runs) - want).square().mean()]
    with task.loop.bypassed():
        errors.append((rollout.final(task.learned, task.loop, rollout.runs) - want).square().mean())
    return float(errors[0]), float(errors[1])


@pytest.mark.parametrize("changes", [{"module.solver": "dpm", "objective.rollout": "true"}], ids=["rollout"])
def test_a_few_updates_bring_the_sampler_nearer(backbone: str, changes: dict[str, str], tmp_path: Path) -> None:
    task = task_of(backbone, **changes, module__feedback_steps="all", trainer__max_steps="40", optimizer__lr="3e-3")
    before, plain = final_error(task)
    assert before == pytest.approx(plain, rel=1e-5)
    train(task, folder_at(tmp_path / "run"))
    after, still = final_error(task)
    assert still == pytest.approx(plain, rel=1e-5) and after < 0.8 * plain


@pytest.mark.slow
@pytest.mark.skipif(not (EMBEDDED_FOLDER / "dit" / "model_index.json").is_file(), reason="embedded:dit is not shipped")
def test_target_b_beats_the_plain_sampler_on_the_embedded_digits(tmp_path: Path) -> None:
    name = "embedded:dit"
    task = task_of(
        name, module__steps="10", module__span_len="3", module__feedback_steps="9", module__guidance="1.5",
        module__solver="ddim", data__trajectories="256", objective__substeps="2", objective__reference_steps="20",
        optimizer__lr="2e-3", trainer__max_steps="400", data__batch_size="8", trainer__save_every="400",
    )  # fmt: skip
    train(task, folder_at(tmp_path / "run"))
    driver, labels, seeds = task.running, [i % 10 for i in range(40)], list(range(5000, 5040))
    runs = record_trajectories(driver, labels, seeds, steps=100, guidance=1.5, keep=[0, 100])

    def error() -> Tensor:
        with task.sampling() as handle:
            looped = latents_of_call(driver, labels, seeds, **handle.call_kwargs)
            with handle.bypassed():
                plain = latents_of_call(driver, labels, seeds, **handle.call_kwargs)
        return torch.stack([(x - runs.at(100)).square().mean() for x in (looped, plain)])

    looped, plain = error()
    assert looped < plain, (looped, plain)


# Other settings.


def test_a_bfloat16_backbone_trains_float32_masters(backbone: str, tmp_path: Path) -> None:
    for changes in (LEARNED_SOLVER, {}):
        task = task_of(backbone, **changes, backbone__dtype="bfloat16", trainer__max_steps="2")
        assert task.running.dtype == torch.bfloat16
        train(task, folder_at(tmp_path / str(len(changes))))
        state = task.state_dict()
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_images_are_learned_from_too(dit: str, tmp_path: Path, monkeypatch: Any) -> None:
    clean = torch.randn(5, 4, 8, 8)
    monkeypatch.setattr(
        "data.images.image_latents", lambda driver, path, limit: (clean, driver.encode([1, 2, 3, 4, 5]))
    )
    changes = {"data.kind": "latents", "data.path": "somewhere", "module.solver": "ddim"}
    task = task_of(dit, **changes, module__timesteps="quadratic")
    assert task.runs is None and torch.equal(task.clean, clean)
    assert task.learned.loop.config.timesteps == [999, 444, 111]
    train(task, folder_at(tmp_path / "run"))


def test_scratch_and_copy_start_where_they_say(backbone: str) -> None:
    for init, copied in (("copy", True), ("scratch", False)):
        loop: ILFModule = task_of(backbone, module__init=init).learned.loop
        block = task_of(backbone).backbone.transformer_blocks[loop.config.span_end].state_dict()
        same = [torch.equal(value, block[name]) for name, value in loop.feedback.state_dict().items()]
        assert (
            all(same)
            if copied
            else not any(equal for name, equal in zip(block, same, strict=True) if name.endswith("weight"))
        )
        rows = task_of(backbone, module__init=init).parameter_table()
        assert (rows[0].get("copied_from") == f"transformer_blocks.{loop.config.span_end}") is copied


def test_samples_are_the_teachers_and_the_exported_students(backbone: str) -> None:
    task = task_of(backbone, **LEARNED_SOLVER)
    task.learned.loop.load_state_dict(noisy_module(task.learned.loop.config, task.backbone).state_dict())
    teacher, student = task.sample_images(2)
    inputs, seeds, _ = task._judged_by()
    want = tiny_driver("dit" if "dit" in backbone else "pixart", DEPTH)
    call = {"num_inference_steps": 20, "guidance_scale": task.settings.module.guidance}
    torch.testing.assert_close(teacher, want.generate(inputs[:2], seeds[:2], **call), rtol=0, atol=1e-5)
    assert not torch.allclose(student, teacher, atol=1e-2) and student.shape == teacher.shape
    # Afterwards training goes on with the loop in place.
    final = task.rollout.final(task.learned, task.loop, task.rollout.runs)
    with task.loop.bypassed():
        assert not torch.allclose(task.rollout.final(task.learned, task.loop, task.rollout.runs), final, atol=1e-2)
