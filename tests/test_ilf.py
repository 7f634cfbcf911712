"""ILF's module in its host: the properties of the method's note that need no training."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from modules.diffusion_host import StepClock, WorkCounter
from modules.ilf import ILFConfig, ILFModule, attach, attach_module, centred_span
from tests.tiny import call_kwargs, tiny_pipeline, tiny_transformer
from tests.tiny_ilf import (
    DEPTH,
    GUIDANCE,
    INPUTS,
    SEEDS,
    driver_of,
    hooked,
    ilf_config,
    latents_of_call,
    manifest_of,
    noisy_module,
    solver_entry,
    tensors_of,
    timesteps_of,
    tiny_driver,
)

TIMESTEPS = [901, 640, 333, 120]


def bare_config(**changes: Any) -> ILFConfig:
    values = {"span_start": 1, "span_len": 2, "feedback": [True, False, True, True], "timesteps": TIMESTEPS}
    return ILFConfig(**{**values, "guidance": 1.0, **changes})


def inputs_of(kind: str, batch: int, step: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(step + 1))
    return latents, torch.full((batch,), TIMESTEPS[step]), call_kwargs(kind, batch)


def run(model: nn.Module, kind: str, batch: int = 2, step: int = 0) -> Tensor:
    latents, timestep, rest = inputs_of(kind, batch, step)
    return model(latents, timestep=timestep, **rest).sample


def straight_line(model: Any, kind: str, module: ILFModule, batch: int, step: int) -> Tensor:
    """The note's section 2 written out, without hooks."""
    config, (latents, timestep, rest) = module.config, inputs_of(kind, batch, step)
    inner = timestep
    if config.inner_timestep == "target" and config.feedback[step]:
        inner = torch.full_like(timestep, [*TIMESTEPS[1:], 0][step])
    hidden = model.pos_embed(latents)
    if kind == "pixart":
        sizes = {"resolution": None, "aspect_ratio": None}
        (outer_c, _), (inner_c, head_c) = (
            model.adaln_single(t, sizes, batch_size=batch, hidden_dtype=torch.float32) for t in (timestep, inner)
        )
        context = {"encoder_hidden_states": model.caption_projection(rest["encoder_hidden_states"])}
        shift, scale = (model.scale_shift_table[None] + head_c[:, None]).chunk(2, dim=1)
    else:
        outer_c, inner_c, context = timestep, inner, rest
        emb = model.transformer_blocks[0].norm1.emb(inner, rest["class_labels"], hidden_dtype=torch.float32)
        shift, scale = (part[:, None] for part in model.proj_out_1(silu(emb)).chunk(2, dim=1))
    start, stop, blocks = config.span_start, config.span_start + config.span_len, model.transformer_blocks
    for block in blocks[:start]:
        hidden = block(hidden, timestep=outer_c, **context)
    kept = hidden
    for block in blocks[start:stop]:
        hidden = block(hidden, timestep=outer_c, **context)
    if config.feedback[step]:
        fed = module.feedback(hidden, timestep=outer_c, **context)
        fed = fed - hidden if config.feedback_output == "delta" else fed
        row = sum(config.feedback[:step])
        hidden = kept
        for j, block in enumerate(blocks[start:stop]):
            strength = module.scale[j] if config.scale_shape == "scalar" else module.scale[row, j]
            hidden = block(hidden + strength * fed, timestep=inner_c, **context)
    for block in blocks[stop:]:
        hidden = block(hidden, timestep=inner_c, **context)
    hidden = model.norm_out(hidden) * (1 + scale) + shift
    hidden = (model.proj_out if kind == "pixart" else model.proj_out_2)(hidden)
    patches = hidden.reshape(batch, 4, 4, 2, 2, -1)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(batch, -1, 8, 8)


# Section 5, property 1.
@pytest.mark.parametrize("init", ["copy", "scratch"])
@pytest.mark.parametrize("shape", ["scalar", "per_step", "channel"])
@torch.no_grad()
def test_untrained_feedback_is_the_backbone_bit_for_bit(kind: str, init: str, shape: str) -> None:
    model = tiny_transformer(kind)
    want = [run(model, kind, step=step) for step in range(4)]
    module = ILFModule(bare_config(scale_shape=shape), model, init)
    with attach_module(model, module), WorkCounter(model) as counter:
        assert all(torch.equal(run(model, kind, step=step), want[step]) for step in range(4))
    assert counter.blocks == 4 * DEPTH + 3 * 2  # it did loop


# Property 5; `full` with `delta`'s combinations, one image and a guidance batch.
@pytest.mark.parametrize(
    ("inner", "shape", "output", "batch"),
    [
        (inner, shape, output, 1 if shape == "channel" else 2)
        for inner, shape, output in itertools.product(
            ["outer", "target"], ["scalar", "per_step", "channel"], ["full", "delta"]
        )
    ],
)
@torch.no_grad()
def test_hooks_equal_the_straight_line(kind: str, inner: str, shape: str, output: str, batch: int) -> None:
    model = tiny_transformer(kind)
    config = bare_config(inner_timestep=inner, scale_shape=shape, feedback_output=output)
    module = noisy_module(config, model)
    want = [straight_line(model, kind, module, batch, step) for step in range(4)]
    plain = run(model, kind, batch)
    with attach_module(model, module):
        got = [run(model, kind, batch, step) for step in range(4)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got[0], plain, rtol=1e-3)


# Property 4.
def test_paper_scale_accounting_is_332_blocks() -> None:
    steps = [i in (1, 3, 6, 8) for i in range(10)]
    config = ILFConfig(span_start=8, span_len=12, feedback=steps, timesteps=list(range(100, 0, -10)), guidance=4.5)
    assert config.looped == 4 and config.blocks(28) == 332 and centred_span(28, 12) == 8


@pytest.mark.parametrize("feedback", [(False,) * 4, (True, False, True, True), (True,) * 4], ids=str)
def test_executed_blocks_are_those_of_the_formula(kind: str, feedback: tuple[bool, ...]) -> None:
    driver = tiny_driver(kind)
    module = noisy_module(ilf_config(driver.pipe, feedback), driver.transformer)
    with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
        with WorkCounter(driver.transformer) as counter:
            counter.also(handle.module.feedback)
            driver.generate(INPUTS[kind][:2], SEEDS[:2], **handle.call_kwargs)
    assert counter.blocks == module.config.blocks(DEPTH) == 4 * DEPTH + sum(feedback) * 3


# Property 6.
@pytest.mark.parametrize("inner", ["outer", "target"])
def test_feedback_off_is_the_plain_sampler_bit_for_bit(kind: str, inner: str) -> None:
    driver = tiny_driver(kind)
    want = latents_of_call(driver, INPUTS[kind][:2], SEEDS[:2], num_inference_steps=4)
    for feedback, bypass in (((False,) * 4, False), ((True,) * 4, True)):
        config = ilf_config(driver.pipe, feedback, inner_timestep=inner)
        module = noisy_module(config, driver.transformer)
        with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
            if bypass:
                with handle.bypassed():
                    got = latents_of_call(driver, INPUTS[kind][:2], SEEDS[:2], **handle.call_kwargs)
            else:
                got = latents_of_call(driver, INPUTS[kind][:2], SEEDS[:2], **handle.call_kwargs)
        assert torch.equal(got, want)


@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize("inner", ["outer", "target"])
def test_detach_leaves_nothing(kind: str, inner: str, solver: bool) -> None:
    driver = tiny_driver(kind)
    pipe, scheduler, keys = driver.pipe, driver.pipe.scheduler, list(driver.transformer.state_dict())
    want = latents_of_call(driver, INPUTS[kind][:1], SEEDS[:1], num_inference_steps=4)
    config = ilf_config(pipe, inner_timestep=inner, solver=solver_entry(pipe, 4) if solver else None)
    module = noisy_module(config, driver.transformer)
    handle = attach(pipe, manifest_of(module, driver.transformer), tensors_of(module))
    assert list(driver.transformer.state_dict()) == keys  # the module is no part of the backbone
    changed = latents_of_call(driver, INPUTS[kind][:1], SEEDS[:1], **handle.call_kwargs)
    assert not torch.allclose(changed, want, rtol=1e-2)
    handle.detach()
    handle.detach()
    assert pipe.scheduler is scheduler and hooked(pipe) == []
    assert list(driver.transformer.state_dict()) == keys
    assert torch.equal(latents_of_call(driver, INPUTS[kind][:1], SEEDS[:1], num_inference_steps=4), want)


# Property 9.
@pytest.mark.parametrize("inner", ["outer", "target"])
def test_calls_do_not_know_of_each_other(kind: str, inner: str) -> None:
    driver = tiny_driver(kind)
    config = ilf_config(driver.pipe, inner_timestep=inner, solver=solver_entry(driver.pipe, 4))
    module = noisy_module(config, driver.transformer)
    with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:

        def sample(batch: int) -> Tensor:
            return latents_of_call(driver, INPUTS[kind][:batch], SEEDS[:batch], **handle.call_kwargs)

        first = sample(1)
        assert torch.equal(sample(1), first)
        torch.testing.assert_close(sample(3)[:1], first, rtol=1e-4, atol=1e-4)
        assert torch.equal(sample(1), first)
        for fatal in (1, 2, 6):  # within a step, between two steps, in a later one
            with _failing(driver.transformer.transformer_blocks[2], fatal), pytest.raises(KeyboardInterrupt):
                sample(2)
            assert torch.equal(sample(1), first)


class _failing:  # noqa: N801  (reads as the sentence that it is)
    """The module raises at its n-th call."""

    def __init__(self, module: nn.Module, fatal: int) -> None:
        self.module, self.left = module, fatal

    def __enter__(self) -> None:
        self.remover = self.module.attn1.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self.remover.remove()


def test_a_bypass_within_a_bypass_ends_with_the_outer_one(kind: str) -> None:
    model = tiny_transformer(kind)
    handle = attach_module(model, noisy_module(bare_config(inner_timestep="target"), model))
    handle.clock.pin(0)
    with torch.no_grad(), handle.bypassed():
        want = run(model, kind)
        with handle.bypassed():
            pass
        assert torch.equal(run(model, kind), want)


# What others do on the same pipeline.


def test_a_counter_that_was_there_first_is_not_copied_along(kind: str) -> None:
    driver = tiny_driver(kind)
    module = noisy_module(ilf_config(driver.pipe), driver.transformer)
    with WorkCounter(driver.transformer) as counter, StepClock(driver.pipe):
        with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
            assert not any(
                part._forward_pre_hooks or hasattr(part, "_diffusers_hook") for part in handle.module.modules()
            )
            driver.generate(INPUTS[kind][:1], SEEDS[:1], **handle.call_kwargs)
        assert counter.blocks == 4 * DEPTH + 3 * 2  # the feedback block is counted where one asks for it


def test_a_hook_on_a_sub_module_is_not_copied_along(kind: str) -> None:
    from modules.diffusion_host import attach_reuse
    from modules.reuse import EveryN, Hold

    model = tiny_transformer(kind)
    with attach_reuse(model, EveryN(2), Hold(), "submodule"):
        module = ILFModule(bare_config(), model)
    assert not any(hasattr(part, "_diffusers_hook") or "forward" in vars(part) for part in module.modules())


# What half precision changes.


def test_a_bfloat16_backbone_runs_with_float32_masters(kind: str) -> None:
    model = tiny_transformer(kind).bfloat16()
    module = noisy_module(bare_config(), model).float().requires_grad_(True)
    latents, timestep, rest = inputs_of(kind, 2, 0)
    rest = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in rest.items()}
    with attach_module(model, module):
        out = model(latents.bfloat16(), timestep=timestep, **rest).sample
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and bool(torch.isfinite(out).all())
    grads = [p.grad for p in module.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in grads)


# Refusals.


def test_configs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="feedback lists 4 steps but timesteps lists 1"):
        bare_config(timesteps=[5])
    with pytest.raises(ValueError, match="scale_shape is 'vector', which is not one of scalar, per_step, channel"):
        bare_config(scale_shape="vector")


def test_modules_that_do_not_fit_or_could_never_learn_are_refused() -> None:
    model = tiny_transformer("dit")
    with pytest.raises(ValueError, match="the span is blocks 3 to 4, but the backbone has blocks 0 to 3"):
        ILFModule(bare_config(span_start=3), model)
    silent = model.transformer_blocks[2].norm1.linear
    nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    with pytest.raises(ValueError, match="delta with zero-initialised gates cannot learn: use full"):
        ILFModule(bare_config(feedback_output="delta"), model)
    ILFModule(bare_config(feedback_output="full"), model)


@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_another_guidance_is_refused_and_the_right_one_runs(kind: str, batch: int, solver: bool) -> None:
    driver = tiny_driver(kind)
    inputs, seeds = INPUTS[kind][:batch], SEEDS[:batch]
    for made in (GUIDANCE, 1.0):
        entry = solver_entry(driver.pipe, 4) if solver else None
        module = noisy_module(ilf_config(driver.pipe, guidance=made, solver=entry), driver.transformer)
        with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
            for wrong in {1.0, 2.5, GUIDANCE} - {made}:
                with pytest.raises(ValueError, match=f"guidance_scale {made:g} and the pipeline runs {wrong:.3g}"):
                    driver.generate(inputs, seeds, **{**handle.call_kwargs, "guidance_scale": wrong})
            driver.generate(inputs, seeds, **handle.call_kwargs)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_guidance_that_changes_nothing_is_not_refused(kind: str, guidance: float) -> None:
    """Two equal images without guidance, or a prompt that says nothing: both halves are the same."""
    driver = tiny_driver(kind)
    module = noisy_module(ilf_config(driver.pipe, guidance=guidance), driver.transformer)
    inputs = [INPUTS[kind][0]] * 2 if guidance == 1 else ["" if kind == "pixart" else 1000] * 2
    with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
        driver.generate(inputs, [1, 1], **handle.call_kwargs)


def test_a_guarded_scheduler_shows_its_own_arguments(kind: str) -> None:
    """Pipelines look at `step` to know whether it takes a generator or eta."""
    import inspect

    driver = tiny_driver(kind)
    want = inspect.signature(driver.pipe.scheduler.step)
    module = noisy_module(ilf_config(driver.pipe), driver.transformer)
    with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)):
        assert inspect.signature(driver.pipe.scheduler.step) == want


@pytest.mark.parametrize("solver", [False, True])
def test_another_number_of_steps_is_refused(kind: str, solver: bool) -> None:
    driver = tiny_driver(kind)
    module = noisy_module(
        ilf_config(driver.pipe, solver=solver_entry(driver.pipe, 4) if solver else None), driver.transformer
    )
    with attach(driver.pipe, manifest_of(module, driver.transformer), tensors_of(module)) as handle:
        words = "fitted for 4 steps" if solver else "trained for 4 steps at timesteps"
        with pytest.raises(ValueError, match=words):
            driver.generate(INPUTS[kind][:1], SEEDS[:1], **{**handle.call_kwargs, "num_inference_steps": 5})
        driver.generate(INPUTS[kind][:1], SEEDS[:1], **handle.call_kwargs)


def test_a_bare_transformer_runs_as_many_steps_as_were_trained(kind: str) -> None:
    model = tiny_transformer(kind)
    module = noisy_module(bare_config(), model)
    with attach(model, manifest_of(module, model), tensors_of(module)) as handle, torch.no_grad():
        first = [run(model, kind, step=step) for step in range(4)]
        with pytest.raises(ValueError, match="step 5 of a trajectory of 4"):
            run(model, kind)
        handle.clock.begin(4)
        assert all(torch.equal(run(model, kind, step=step), first[step]) for step in range(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta_end": 0.01}, "beta_end 0.02 and the pipeline's has 0.01"),
        ({"prediction_type": "v_prediction"}, "prediction_type 'epsilon' and the pipeline's has 'v_prediction'"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing '.*' and the pipeline's has 'trailing'"),
    ],
)
def test_another_noise_schedule_is_refused_and_leaves_nothing(kind: str, change: dict[str, Any], words: str) -> None:
    pipe = tiny_pipeline(kind)
    module = noisy_module(ilf_config(pipe), pipe.transformer)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **change)
    with pytest.raises(ValueError, match=words):
        attach(pipe, manifest_of(module, pipe.transformer), tensors_of(module))
    assert hooked(pipe) == []


def test_another_scheduler_class_is_refused_unless_the_adapter_brings_its_own(kind: str) -> None:
    from diffusers import EulerDiscreteScheduler

    from modules.guards import sampler_entry

    pipe = tiny_pipeline(kind)
    module = noisy_module(ilf_config(pipe), pipe.transformer)
    entry = solver_entry(pipe, 4)
    brings = replace(module.config, solver=entry, sampler=sampler_entry(pipe.scheduler, False))
    manifest, tensors, own = manifest_of(module, pipe.transformer), tensors_of(module), type(pipe.scheduler).__name__
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"scheduler with class '{own}' and the pipeline's has 'EulerDiscrete"):
        attach(pipe, manifest, tensors)
    assert hooked(pipe) == []
    module.config = brings
    with attach(pipe, manifest_of(module, pipe.transformer), tensors) as handle:
        driver_of(pipe, kind).generate(INPUTS[kind][:1], SEEDS[:1], **handle.call_kwargs)
        assert timesteps_of(pipe, 4) == entry["timesteps"]
