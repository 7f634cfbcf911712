"""The learned forecast: what it computes, that skipped steps are not run, how it is fitted, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from checkpoints.load import load_adapter
from data.inputs import training_inputs
from data.stepped import derive_seed
from data.trajectories import record_trajectories
from modules.diffusion_host import WorkCounter
from modules.forecast import ForecastConfig, ForecastModule, attach_module
from modules.linear_forecast import LinearForecast, combined, ridge, taylor_weights
from modules.pipelines import driver, load_pipeline
from modules.reuse import Taylor
from tests.tiny import tiny_pipeline
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, driver_of, hooked, latents_of_call, timesteps_of
from trainers.forecast.budget import computed_steps
from trainers.forecast.fitting import Fitter, even_steps, late_steps, mask_of, search_steps
from trainers.forecast.task import ForecastTask
from trainers.forecast.walk import Walk
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

STEPS = 8


def module_at(pipe: Any, computed: list[list[int]], seed: int = 0) -> ForecastModule:
    """Random weights around holding the last prediction."""
    module = ForecastModule(
        ForecastConfig(computed=computed, timesteps=timesteps_of(pipe, STEPS), guidance=GUIDANCE, history=2)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (module.outputs, module.inputs):
            part.copy_(0.1 * torch.randn(part.shape, generator=generator))
        module.outputs[..., 0] += 1
    return module


def recorded(kind: str, count: int = 4, scheduler: Any = None) -> tuple[Any, Any]:
    pipe = tiny_pipeline(kind)
    if scheduler is not None:
        pipe.scheduler = scheduler
    running = driver_of(pipe, kind)
    inputs = (INPUTS[kind] * count)[:count]
    return running, record_trajectories(running, inputs, list(range(count)), steps=STEPS, guidance=GUIDANCE)


# ---- what it computes


@torch.no_grad()
def test_a_skipped_step_is_the_weighted_sum_and_runs_nothing(kind: str) -> None:
    """Against a loop written out by hand: the network on computed steps, sums of kept tensors on the others."""
    pipe = tiny_pipeline(kind)
    running, module = driver_of(pipe, kind), module_at(pipe, [[0, 3, 4, 6]])
    with attach_module(pipe, module) as handle, WorkCounter(pipe) as counter:
        got = latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
        assert counter.blocks == 4 * 4  # computed steps, blocks
        everything = counter.macs
        counter.reset()
        handle.use(1.0)
        latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
        assert counter.macs == 2 * everything  # half of the steps, and of a skipped one not even the output layer
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents, conditions = running.initial_noise(SEEDS), running.encode(INPUTS[kind])
    outputs, inputs = [], []
    for step, timestep in enumerate(scheduler.timesteps):
        if step in (0, 3, 4, 6):
            outputs.insert(0, running.guided(latents, timestep, conditions, GUIDANCE))
            inputs.insert(0, latents)
            output = outputs[0]
        else:
            output = sum(w * x for w, x in zip(module.outputs[0, step], outputs[:2], strict=False))
            output += sum(w * x for w, x in zip(module.inputs[0, step], [latents, *inputs[:2]], strict=False))
        latents = scheduler.step(output, timestep, latents).prev_sample
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4)


def test_all_computed_is_the_plain_pipeline_bit_for_bit(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running = driver_of(pipe, kind)
    plain = latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS)
    with attach_module(pipe, module_at(pipe, [list(range(STEPS))])) as handle:
        assert torch.equal(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), plain)
    with attach_module(pipe, module_at(pipe, [[0, 4]])) as handle:
        assert not torch.equal(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), plain)
        with handle.bypassed():
            assert torch.equal(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), plain)
    assert hooked(pipe) == [] and torch.equal(
        latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS), plain
    )


def test_two_runs_in_a_row_and_other_batch_sizes_between_are_the_same(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running = driver_of(pipe, kind)
    with attach_module(pipe, module_at(pipe, [[0, 2, 5]])) as handle:
        first, _, again = (
            latents_of_call(running, INPUTS[kind][:n], SEEDS[:n], **handle.call_kwargs) for n in (2, 3, 2)
        )
    assert torch.equal(first, again)


def test_a_slot_is_freed_after_its_last_use(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running = driver_of(pipe, kind)
    with attach_module(pipe, module_at(pipe, [[0, 1, 4, 6, 7]])) as handle:
        handle.reuse.watches_memory = True
        running.generate(INPUTS[kind], SEEDS, **handle.call_kwargs)
        output = 2 * 4 * 8 * 8 * 8 * 4  # guidance halves, images, output channels, size, bytes
        assert handle.reuse.peak_bytes == 2 * (output + output // 2) and handle.reuse.memory_bytes() == 0


def test_taylor_weights_are_what_taylor_predicts() -> None:
    values = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    predictor = Taylor(1)
    for step, value in zip((0, 3, 5), values, strict=True):
        predictor.observe(0, step, (), (value,))
    weights = taylor_weights(9, [5, 3, 0], 3)
    torch.testing.assert_close(combined(weights, [], values.flip(0).unbind(), []), predictor.predict(0, 9, ())[0])
    assert taylor_weights(4, [2], 3) == [1.0, 0.0, 0.0] and taylor_weights(4, [2, 1], 1) == [1.0]


def test_latents_count_towards_the_first_channels_of_a_prediction_with_variances() -> None:
    output, latents = torch.ones(1, 4, 2, 2), torch.full((1, 2, 2, 2), 10.0)
    got = combined([2.0], [0.5, 0.0], [output], [latents, latents])
    assert got[:, :2].eq(7).all() and got[:, 2:].eq(2).all()


def test_sums_are_taken_in_float32() -> None:
    big, small = torch.full((4, 1), 256.0, dtype=torch.bfloat16), torch.ones(4, 1, dtype=torch.bfloat16)
    assert combined([1.0, 1.0], [-1.0, 0.0], [big, small], [big, big]).eq(1).all()


# ---- how it is fitted


def test_ridge_goes_from_least_squares_to_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    features, prior = torch.randn(3, 50, generator=generator), torch.tensor([1.0, -2.0, 0.5])
    truth = torch.tensor([0.3, 0.2, -0.7])
    target = truth @ features
    torch.testing.assert_close(ridge(features, target, prior, 1e-12).float(), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ridge(features, target, prior, 1e9).float(), prior, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, lambda: DDIMScheduler(clip_sample=False)])
def test_a_fitted_step_leads_nearest_to_the_recorded_run(kind: str, scheduler: Any) -> None:
    """The first skipped step: no other weights bring the student's next latents nearer, in the mean over all runs."""
    running, runs = recorded(kind, scheduler=scheduler())
    walk = Walk(running, runs, GUIDANCE, 2)
    outputs, inputs, _ = Fitter(walk, strength=1e-12).fit(mask_of([0, 1, 3, 5], STEPS))

    def off(o: Tensor, i: Tensor) -> float:
        state = walk.begin()
        with torch.no_grad():
            for step in (0, 1):
                state = walk.computed(state, step)
            return float((walk.forecast(state, 2, (o, i)).latents - runs.at(3)).square().mean())

    best = off(outputs[2], inputs[2])
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        other = [x + 3e-2 * torch.randn(x.shape, generator=generator) for x in (outputs[2], inputs[2])]
        assert off(*other) > best
    assert best < off(torch.tensor(taylor_weights(2, [1, 0], 2)), torch.zeros(3))


def test_runs_that_do_not_fit_are_only_carried_along(kind: str) -> None:
    running, runs = recorded(kind, 6)
    few = runs.select(torch.arange(4))
    alone = Fitter(Walk(running, few, GUIDANCE, 2)).fit(mask_of([0, 2, 4], STEPS))
    together = Fitter(Walk(running, runs, GUIDANCE, 2), fitted=4).fit(mask_of([0, 2, 4], STEPS))
    torch.testing.assert_close(together[2][:4], alone[2], rtol=1e-3, atol=1e-3)


def test_walking_on_from_a_common_start_is_walking_anew(kind: str) -> None:
    running, runs = recorded(kind)
    fitter = Fitter(Walk(running, runs, GUIDANCE, 2))
    for computed in ([0, 2, 4, 6], [0, 2, 4, 5], [0, 1, 4, 5], [0, 1, 4, 5]):
        mask = mask_of(computed, STEPS)
        fresh = Fitter(Walk(running, runs, GUIDANCE, 2)).fit(mask)
        assert all(map(torch.equal, fitter.fit(mask), fresh))


def test_search_keeps_the_count_and_never_gets_worse() -> None:
    running, runs = recorded("dit", 6)
    fitter = Fitter(Walk(running, runs, GUIDANCE, 2), fitted=3)

    def judge(final: Tensor) -> float:
        return float((final[3:] - runs.at(STEPS)[3:]).square().mean())

    before = judge(fitter.fit(mask_of([0, 1, 2], STEPS))[2])
    found, error = search_steps(fitter, judge, [0, 1, 2])
    assert len(found) == 3 and found[0] == 0 and found != [0, 1, 2] and error < before
    assert judge(fitter.fit(mask_of(found, STEPS))[2]) == error


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_starting_points_have_as_many_steps_as_asked_for(count: int) -> None:
    for spread in (even_steps, late_steps):
        found = spread(count, STEPS)
        assert len(set(found)) == count and found == sorted(found) and found[0] == 0 and found[-1] < STEPS


# ---- training, export, use


def log_error(task: ForecastTask, module: ForecastModule) -> float:
    """What training makes small, on all recorded runs and operating points."""
    want = task.runs.at(6)
    with torch.no_grad():
        finals = [task.final(module, point) for point in range(len(module.config.computed))]
    return float(torch.stack([(final - want).square().mean((1, 2, 3)).log().mean() for final in finals]).mean())


def test_the_closed_form_beats_holding_and_taylor(name: str) -> None:
    task: ForecastTask = build_task(tiny_recipe(name, module__compute="[0.5]"))
    held, taylor = ForecastModule(task.learned.config), ForecastModule(task.learned.config)
    with torch.no_grad():
        held.outputs[..., 0] = 1
        for step, before in ((1, [0]), (3, [2, 0]), (5, [4, 2])):
            taylor.outputs[0, step] = torch.tensor(taylor_weights(step, before, 2))
    assert log_error(task, task.learned) < min(log_error(task, held), log_error(task, taylor))


def test_updates_go_on_from_the_closed_form(saved: Path, tmp_path: Path) -> None:
    task: ForecastTask = build_task(
        tiny_recipe(save_tiny("dit", saved), trainer__max_steps="40", trainer__save_every="40", optimizer__lr="1e-3")
    )
    fitted = log_error(task, task.learned)
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    assert log_error(task, task.learned) < fitted
    assert all(p.grad is None for p in task.backbone.parameters())


def test_the_exported_adapter_has_every_operating_point(name: str, tmp_path: Path) -> None:
    task: ForecastTask = build_task(tiny_recipe(name))
    task.export_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 64 * 1024
    running = driver(load_pipeline(name), name)
    inputs = training_inputs(name, task.recipe.data.prompts, task.recipe.seed, 6)
    seeds = [derive_seed(task.recipe.seed, "trajectory", i) for i in range(6)]
    with load_adapter(running.pipe, tmp_path / "adapter") as handle, WorkCounter(running.pipe) as counter:
        assert handle.shares == pytest.approx([3 / 6, 2 / 6])
        for point, share in enumerate(handle.shares):
            assert handle.use(share) == share
            counter.reset()
            got = latents_of_call(running, inputs, seeds, **handle.call_kwargs)
            assert counter.blocks == pytest.approx(4 * 6 * share)
            with torch.no_grad():
                torch.testing.assert_close(got, task.final(task.learned, point), rtol=1e-4, atol=1e-4)
        assert handle.use(0.45) == pytest.approx(2 / 6)
        with pytest.raises(ValueError, match="compute is 0.2, and this adapter has 0.333, 0.5"):
            handle.use(0.2)


def test_resuming_equals_never_stopping_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    settings = {"optimizer__schedule": "constant"}
    folders = [RunFolder(tmp_path / part) for part in ("whole", "parts")]
    for folder in folders:
        folder.path.mkdir()
    whole = build_task(tiny_recipe(name, **settings))
    train(whole, folders[0])
    train(build_task(tiny_recipe(name, **settings, trainer__max_steps="3")), folders[1])
    resumed = build_task(tiny_recipe(name, **settings))
    train(resumed, folders[1])
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_speedup_becomes_the_most_steps_that_reach_it() -> None:
    fixed, computed, skipped, steps = 0.2, 0.1, 0.01, 20

    def seconds(count: int) -> float:
        return fixed + count * computed + (steps - count) * skipped

    short = fixed + 5 * computed
    for speedup in (1.5, 2.0, 3.0):
        count = computed_steps(steps, 5, seconds(steps), short, seconds(1), speedup)
        assert seconds(steps) / seconds(count) >= speedup > seconds(steps) / seconds(count + 1)
    with pytest.raises(ValueError, match=r"speedup 9 is out of reach here: one computed step of 20 gives 4\.\d\dx"):
        computed_steps(steps, 5, seconds(steps), short, seconds(1), 9)


def test_a_recipe_that_asks_for_a_speedup_gets_one_operating_point(saved: Path, monkeypatch: Any) -> None:
    name = save_tiny("dit", saved)
    monkeypatch.setattr("trainers.forecast.task.steps_for_speedup", lambda *_: 4)
    task: ForecastTask = build_task(tiny_recipe(name, module__speedup="1.3", module__computed="searched"))
    assert [len(steps) for steps in task.learned.config.computed] == [4]


# ---- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ForecastConfig(computed=[[1, 2]], timesteps=[9, 5, 1], guidance=1.0), "must rise from 0"),
        (lambda: ForecastConfig(computed=[[0, 3]], timesteps=[9, 5, 1], guidance=1.0), "within the 3 steps"),
        (lambda: ForecastConfig(computed=[[0]], timesteps=[9], guidance=1.0, default=1), "there are 1 operating"),
        (lambda: LinearForecast(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)), "outputs are"),
    ],
)
def test_wrong_settings_name_what_is_allowed(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module__compute": "[1.0]"}, "compute has 1 but must lie"),
        ({"module__computed": "[[0,1,2],[0,1]]", "module__compute": "[0.5]"}, "computed has 2 lists but compute"),
        ({"module__computed": "[[0,1]]", "module__compute": "[0.5]"}, "computed has 2 of 6 steps"),
        ({"module__computed": "[[0,1,2]]", "module__compute": "[0.5]", "module__speedup": "2.0"}, "set computed to"),
        ({"data__searched": "99"}, "data.searched is 99, more than"),
    ],
)
def test_a_recipe_whose_parts_disagree_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_recipe("dit", **changes)
