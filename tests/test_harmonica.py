"""HarmoniCa's router: the numbered properties of a correct implementation, and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.diffusion_host import StepClock, WorkCounter
from modules.harmonica import HarmoniCaConfig, RouterTable, attach_masks, operating_points, reuse_ratio
from modules.linear_forecast import taylor_weights
from modules.pipelines import load_pipeline
from modules.reuse import Taylor
from modules.sites import block_stack
from tests.contract_cases.harmonica import RECIPE, hard_final
from tests.tiny import call_kwargs, tiny_pipeline
from tests.tiny_forecast import tiny_recipe
from tests.tiny_harmonica import OPS, STEPS, config_of, random_mask, task_of, trained
from tests.tiny_ilf import INPUTS, SEEDS, driver_of, hooked, latents_of_call
from trainers.harmonica.student import SoftCache


# Property 1.
def test_all_ones_is_uncached_bit_for_bit(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    plain = latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS)
    with attach_masks(pipe, config, torch.ones(1, STEPS, len(config.units), dtype=torch.bool), None) as handle:
        assert torch.equal(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), plain)
    assert hooked(pipe) == []


@pytest.mark.parametrize("op", OPS)
def test_all_ones_is_uncached_in_the_student_too(name: str, op: str) -> None:
    task = task_of(name, module__reuse_op=op)
    ones = torch.ones(4, len(task.config.units), dtype=torch.bool)
    inputs = INPUTS["dit" if "dit" in name else "pixart"]
    noise = task.running.initial_noise(SEEDS)
    plain = task.sampler.final(noise, task.running.encode(inputs), lambda step: None)
    assert torch.equal(hard_final(task, noise, inputs, ones), plain)


# Property 2.
@pytest.mark.parametrize("op", ["hold", "taylor2"])
def test_calls_are_the_true_entries_of_the_mask(kind: str, op: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe, reuse_op=op)
    mask = random_mask(len(config.units))
    with attach_masks(pipe, config, mask[None], None) as handle, WorkCounter(pipe) as counter:
        running.generate(INPUTS[kind], SEEDS, **handle.call_kwargs)
    assert counter.submodules == int(mask.sum())
    assert reuse_ratio(mask) == pytest.approx(1 - counter.submodules / mask.numel())


def test_a_reused_attention_projects_no_keys_or_values(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    calls, attention = [], block_stack(pipe.transformer).blocks[2].attn1
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (attention.to_k, attention.to_v)]
    mask = torch.ones(1, STEPS, len(config.units), dtype=torch.bool)
    mask[:, 1:, config.units.index("transformer_blocks.2.attn1")] = False
    with attach_masks(pipe, config, mask, None) as handle:
        running.generate(INPUTS[kind], SEEDS, **handle.call_kwargs)
    assert len(calls) == 2
    for hook in hooks:
        hook.remove()


# Property 3.
@torch.no_grad()
def test_a_reused_row_is_residual_plus_gate_times_the_kept_outputs(kind: str) -> None:
    """Row 2 all false: sub-modules are replaced by constants in a plain model, and everything around them runs."""
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    mask = torch.ones(1, STEPS, len(config.units), dtype=torch.bool)
    mask[0, 2] = False
    with attach_masks(pipe, config, mask, None) as handle:
        got = latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
    step, kept = [-1], dict[str, Tensor]()

    def replaced(unit: str, part: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if step[0] != 2:
                kept[unit] = type(part).forward(part, *args, **kwargs)
            return kept[unit]

        return forward

    pipe.transformer.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for unit in config.units:
        part = pipe.transformer.get_submodule(unit)
        part.forward = replaced(unit, part)
    assert torch.equal(got, latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS))


# Property 4.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("granularity", ["submodule", "block", "model"])
def test_hard_scores_make_student_and_inference_agree(name: str, op: str, granularity: str) -> None:
    task = task_of(name, module__reuse_op=op, module__granularity=granularity, module__steps=str(STEPS))
    inputs, noise = INPUTS["dit" if "dit" in name else "pixart"], task.running.initial_noise(SEEDS)
    mask = random_mask(len(task.config.units), seed=3)
    mask[2] = granularity != "model"
    with torch.no_grad():
        for row in task.learned.router.corrections:
            row.add_(0.05 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    student = hard_final(task, noise, inputs, mask)
    task.reuse.detach()
    weights = task.learned.router.forecast_weights(mask)[None] if op == "linear" else None
    with attach_masks(task.running.pipe, task.config, mask[None], weights) as handle:
        got = latents_of_call(task.running, inputs, SEEDS, **handle.call_kwargs)
    torch.testing.assert_close(got, student, rtol=1e-4, atol=1e-4)


# Property 8.
def test_state_is_reset_between_runs_and_batch_sizes(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe, reuse_op="taylor1")
    with attach_masks(pipe, config, random_mask(len(config.units))[None], None) as handle:
        first, _, again = (
            latents_of_call(running, INPUTS[kind][:n], SEEDS[:n], **handle.call_kwargs) for n in (2, 3, 2)
        )
    assert torch.equal(first, again)


# Property 12, and budgets.
def test_a_budget_is_met_exactly_by_the_highest_scores(kind: str) -> None:
    config = config_of(tiny_pipeline(kind))
    router = RouterTable(config, torch.Generator().manual_seed(4))
    scores = router.scores()
    assert (scores[0] == 1).all() and torch.equal(router.mask(), scores > 0.1)
    for share in (0.9, 0.5, 0.35, 0.2):
        mask = router.mask_at(share)
        assert mask[0].all() and int(mask.sum()) == max(len(config.units), round(share * mask.numel()))
        if mask[1:].any():
            assert scores[1:][mask[1:]].min() >= scores[1:][~mask[1:]].max()
    assert router.mask_at(0.2).sum() == len(config.units)


# The learned forecast.
def test_corrections_are_added_to_taylor_at_the_steps_computed_before(kind: str) -> None:
    config = config_of(tiny_pipeline(kind), reuse_op="linear")
    router = RouterTable(config)
    mask = torch.ones(STEPS, len(config.units), dtype=torch.bool)
    mask[[2, 4], 1] = False
    with torch.no_grad():
        router.corrections[3][1, 2] = 0.25
    weights = router.forecast_weights(mask)
    assert weights[2, 1].tolist() == taylor_weights(2, [1, 0], 3)
    assert weights[4, 1].tolist() == pytest.approx([1.5, -0.5, 0.25])
    point = operating_points(config, mask[None], weights[None])[0]
    values = torch.randn(2, 3, 4)
    learned, taylor = point.predictor(), Taylor(1)
    for predictor in (learned, taylor):
        for step in (0, 1):
            predictor.observe(1, step, (), (values[step],))
    torch.testing.assert_close(learned.predict(1, 2, ())[0], taylor.predict(1, 2, ())[0])


# The adapter.
def test_a_router_is_small_and_names_what_it_routes(name: str, tmp_path: Path) -> None:
    task = trained(name, tmp_path / "run")
    task.export_adapter(tmp_path / "adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size <= 64 * 1024
    pipe = load_pipeline(name)
    other = HarmoniCaConfig(**{**vars(task.config), "units": ["elsewhere", *task.config.units[1:]]})
    with pytest.raises(ValueError, match="routes elsewhere, which the transformer lacks"):
        attach_masks(pipe, other, task.masks(), None)
    assert hooked(pipe) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__target_compute": "0.2"}, "a share of 0.2 must be below 1 and at least 0.25"),
        ({"objective__kind": "l2c"}, "set it to none for l2c"),
        ({"objective__refit": "true"}, "needs module.granularity model"),
        ({"objective__polish": "1"}, "set objective.refit"),
        ({"data__searched": "999"}, "data.searched is 999"),
        ({"trainer__accumulate_grad_batches": "2"}, "an update is one step of a trajectory"),
    ],
)
def test_a_recipe_whose_parts_disagree_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_recipe("dit", RECIPE, **changes)


@pytest.mark.slow
def test_the_table_adds_no_graph_break(kind: str) -> None:
    """Under torch.compile a step breaks where the clock counts it, and nowhere else, reused units or not."""
    model = tiny_pipeline(kind).transformer
    arguments = {"timestep": torch.full((2,), 500), **call_kwargs(kind, 2)}

    def breaks() -> int:
        torch._dynamo.reset()
        return int(torch._dynamo.explain(model)(torch.ones(2, 4, 8, 8), **arguments).graph_break_count)

    with StepClock(model):
        counting = breaks()
    config = config_of(tiny_pipeline(kind))
    with attach_masks(model, config, random_mask(len(config.units))[None], None), torch.no_grad():
        assert [breaks() for _ in range(STEPS)] == [counting] * STEPS
    torch._dynamo.reset()


def test_soft_scores_blend_and_write_hard() -> None:
    config = HarmoniCaConfig(units=["a", "b"], routed=[1], timesteps=[9, 1], guidance=1.0)
    soft = SoftCache(config)
    old, new = torch.ones(2), torch.full((2,), 3.0, requires_grad=True)
    soft.set_row(None)
    for unit in (0, 1):
        soft.blend(unit, 0, (), (old,))
    scores = torch.tensor([0.25, 0.05], requires_grad=True)
    soft.set_row((scores, None))
    blended = [soft.blend(unit, 1, (), (2 * new,))[0] for unit in (0, 1)]
    assert blended[0].tolist() == pytest.approx([2.25, 2.25]) and blended[1].tolist() == pytest.approx([1.25, 1.25])
    torch.stack(blended).sum().backward()
    assert scores.grad.tolist() == pytest.approx([10.0, 10.0]) and new.grad.tolist() == pytest.approx([0.6, 0.6])
    assert [soft.predictor.predict(unit, 1, ())[0].tolist() for unit in (0, 1)] == [[6.0, 6.0], [1.0, 1.0]]
