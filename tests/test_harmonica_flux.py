"""Flux: two kinds of blocks, two streams, distilled guidance, a flow sampler; routed by block, forecast by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afterburner import cacheable
from checkpoints.load import load_adapter
from modules.diffusion_host import WorkCounter, attach_reuse
from modules.harmonica import HarmoniCaConfig, attach_masks
from modules.pipelines import FluxDriver, driver, load_pipeline
from modules.reuse import Hold, StepTable
from modules.sites import block_stack, finest_granularity
from tests.contract_cases.harmonica import RECIPE, hard_final
from tests.tiny_flux import CALL, DOUBLE, PROMPTS, SINGLE, save_tiny_flux, tiny_flux_driver
from tests.tiny_forecast import tiny_recipe
from tests.tiny_ilf import hooked
from trainers import diffusion_cases
from trainers.base import state_hash
from trainers.cache_cases import cache_setup
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

STEPS, GUIDANCE, SEEDS, BLOCKS = 5, 3.0, [1, 2], DOUBLE + SINGLE


@pytest.fixture
def name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return save_tiny_flux(saved, monkeypatch)


def flux_recipe(name: str, recipe: Path = RECIPE, **changes: str) -> Any:
    more = {"module__granularity": "block"} if recipe == RECIPE else {}
    return tiny_recipe(name, recipe, **more, **changes)


def latents_of(running: FluxDriver, seeds: list[int] = SEEDS, **call: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    packed = running.pipe(PROMPTS[: len(seeds)], generator=generators, output_type="latent", **CALL, **call).images
    return running.pipe._unpack_latents(packed, CALL["height"], CALL["width"], running.pipe.vae_scale_factor)


def config_of(running: FluxDriver, **changes: Any) -> HarmoniCaConfig:
    values = {
        "units": list(block_stack(running.transformer).names), "routed": list(range(1, STEPS)),
        "timesteps": [int(t) for t in running.sampler(STEPS).timesteps], "guidance": GUIDANCE,
        "granularity": "block", "call": CALL,
    }  # fmt: skip
    return HarmoniCaConfig(**{**values, **changes})


def random_mask(seed: int = 0) -> Tensor:
    mask = torch.rand(STEPS, BLOCKS, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = True
    return mask


@torch.no_grad()
@pytest.mark.parametrize("distilled", [True, False])
def test_the_driver_is_the_pipelines_own_call(distilled: bool) -> None:
    running = tiny_flux_driver(distilled)
    scheduler, conditions = running.sampler(STEPS), running.encode(PROMPTS)
    latents = running.initial_noise(SEEDS)
    for timestep in scheduler.timesteps:
        output = running.guided(latents, timestep, conditions, GUIDANCE)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    assert torch.equal(latents, latents_of(running, **call))
    images = running.generate(PROMPTS, SEEDS, **call)
    torch.testing.assert_close(running.decode(latents), images, rtol=0, atol=1e-5)
    other = latents_of(running, num_inference_steps=STEPS, guidance_scale=9.0)
    assert torch.equal(latents, other) != distilled


def test_latents_are_what_decoding_undoes() -> None:
    running = tiny_flux_driver()
    running.pipe.vae.encode = lambda images: type("Latents", (), {"latents": images})()
    decoded = []
    running.pipe.vae.decode = lambda latents: decoded.append(latents) or type("Images", (), {"sample": latents})()
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    running.decode(running.latents_of(given))
    torch.testing.assert_close(decoded[0], given)


def test_units_are_the_blocks_of_both_kinds_in_call_order() -> None:
    running = tiny_flux_driver()
    order: list[str] = []
    for unit, block in zip(*_named(running), strict=True):
        block.register_forward_hook(lambda *_, unit=unit: order.append(unit))
    with attach_reuse(running.pipe, StepTable([True]), Hold(), "block") as handle:
        latents_of(running, num_inference_steps=1)
        assert list(handle.unit_names) == order and len(order) == BLOCKS
    assert finest_granularity(running.transformer) == "block"
    with pytest.raises(ValueError, match="a FluxTransformerBlock has no attn1, attn2 or ff to take apart: use block"):
        attach_reuse(running.pipe, StepTable([True]), Hold(), "submodule")


def _named(running: FluxDriver) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    stack = block_stack(running.transformer)
    return stack.names, stack.blocks


@pytest.mark.parametrize("op", ["hold", "taylor2"])
def test_all_ones_is_uncached_and_calls_are_the_true_entries(op: str) -> None:
    running = tiny_flux_driver()
    plain = latents_of(running, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    before = hooked(running.pipe)  # an empty registry, which Flux' own call leaves behind
    masks = torch.stack([random_mask(), torch.ones(STEPS, BLOCKS, dtype=torch.bool)])
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    with attach_masks(running.pipe, config_of(running, reuse_op=op), masks, None) as handle:
        with WorkCounter(running.pipe) as counter:
            assert not torch.equal(latents_of(running, **call), plain)
        assert counter.blocks == int(masks[0].sum())
        handle.use(1.0)
        assert torch.equal(latents_of(running, **call), plain)
    assert hooked(running.pipe) == before


@torch.no_grad()
def test_a_reused_block_adds_what_it_added_when_it_was_computed() -> None:
    """Row 2 all false, against blocks that are replaced by hand: both streams keep flowing through."""
    running = tiny_flux_driver()
    mask = torch.ones(1, STEPS, BLOCKS, dtype=torch.bool)
    mask[0, 2] = False
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    with attach_masks(running.pipe, config_of(running), mask, None):
        got = latents_of(running, **call)
    step, added = [-1], dict[str, tuple[Tensor, ...]]()

    def replaced(unit: str, block: Any) -> Any:
        def forward(**kwargs: Any) -> tuple[Tensor, ...]:
            given = (kwargs["encoder_hidden_states"], kwargs["hidden_states"])
            if step[0] != 2:
                outputs = type(block).forward(block, **kwargs)
                added[unit] = tuple(output - before for output, before in zip(outputs, given, strict=True))
                return outputs
            return tuple(before + more for before, more in zip(given, added[unit], strict=True))

        return forward

    running.transformer.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for unit, block in zip(*_named(running), strict=True):
        block.forward = replaced(unit, block)
    torch.testing.assert_close(got, latents_of(running, **call), rtol=1e-6, atol=1e-6)


def test_another_guidance_than_the_trained_one_is_refused() -> None:
    running = tiny_flux_driver()
    with attach_masks(running.pipe, config_of(running), random_mask()[None], None):
        with pytest.raises(ValueError, match="trained for guidance_scale 3 and the pipeline runs 4"):
            latents_of(running, num_inference_steps=STEPS, guidance_scale=4.0)
        with pytest.raises(ValueError, match="trained for 5 steps"):
            latents_of(running, num_inference_steps=STEPS + 1, guidance_scale=GUIDANCE)


def test_training_moves_the_table_alone_and_the_adapter_does_what_the_student_did(name: str, tmp_path: Path) -> None:
    task = build_task(flux_recipe(name, module__guidance="3.0"))
    assert task.config.units[:1] + task.config.units[-1:] == ["transformer_blocks.0", "single_transformer_blocks.1"]
    frozen, before = state_hash(task.backbone), [row.detach().clone() for row in task.learned.router.logits]
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    assert state_hash(task.backbone) == frozen and all(p.grad is None for p in task.backbone.parameters())
    assert not any(map(torch.equal, before, task.learned.router.logits))
    task.export_adapter(tmp_path / "adapter")
    mask = task.masks()[0]
    student = hard_final(task, task.running.initial_noise(SEEDS), PROMPTS, mask)
    running = driver(load_pipeline(name), name)
    with load_adapter(running.pipe, tmp_path / "adapter") as handle, WorkCounter(running.pipe) as counter:
        call = {key: value for key, value in handle.call_kwargs.items() if key not in CALL}
        torch.testing.assert_close(latents_of(running, **call), student, rtol=1e-4, atol=1e-4)
    assert counter.blocks == int(mask.sum()) == round(0.6 * mask.numel())


def test_the_forecast_of_whole_steps_works_with_it(name: str, tmp_path: Path) -> None:
    task = build_task(flux_recipe(name, Path(__file__).with_name("forecast_tiny.yaml")))
    task.export_adapter(tmp_path / "adapter")
    running = driver(load_pipeline(name), name)
    with load_adapter(running.pipe, tmp_path / "adapter") as handle, WorkCounter(running.pipe) as counter:
        images = running.generate(PROMPTS, SEEDS, **handle.call_kwargs)
        assert counter.blocks == 3 * BLOCKS  # half of six steps
        handle.use(1.0)
        full = running.generate(PROMPTS, SEEDS, **handle.call_kwargs)
    with cacheable(running.pipe):
        own = running.pipe.transformer.enable_cache(tmp_path / "adapter")
        assert torch.equal(images, running.generate(PROMPTS, SEEDS, **own.call_kwargs))
    call = {"num_inference_steps": 6, "guidance_scale": handle.call_kwargs["guidance_scale"]}
    assert torch.equal(full, running.generate(PROMPTS, SEEDS, **call)) and not torch.equal(full, images)
    last = len(task.runs.timesteps)
    with torch.no_grad():
        near = (task.final(task.learned, 0) - task.runs.at(last)).square().mean()
        with attach_reuse(running.pipe, StepTable([True, False] * 3), Hold(), "model"):
            held = [latents_of(running, [seed], **call) for seed in SEEDS]
    assert near < (torch.cat(held) - torch.cat([latents_of(running, [s], **call) for s in SEEDS])).square().mean()


@pytest.mark.parametrize("changes", [{"objective.kind": "l2c", "objective.lambda_mode": "none"},
                                     {"objective.lambda_mode": "analytic"}])  # fmt: skip
def test_what_needs_noise_levels_is_refused_for_a_flow(name: str, changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a FlowMatchEulerDiscreteScheduler is a flow, without noise levels"):
        build_task(flux_recipe(name, **changes))


def test_every_rival_runs_on_whole_blocks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_cases, "_BISECTIONS", 2)
    monkeypatch.setattr(diffusion_cases, "_WARMUPS", (1, 2))
    build_task(flux_recipe(name, module__guidance="3.0")).export_adapter(tmp_path / "adapter")
    running = driver(load_pipeline(name), name)
    config = EvaluateConfig.model_validate(
        {"adapter": str(tmp_path), "evaluation": {"inputs": 2, "timing_batch": 2, "batch_size": 2,
                                                  "prompts": str(Path(name).parent / "prompts.txt")}}
    )  # fmt: skip
    setup = cache_setup(running, tmp_path / "adapter", config)
    probe = Probe(driver=running, inputs=setup.inputs, seeds=setup.seeds, reference=setup.reference)
    work = {case.name: probe.run(case)[0] for case in setup.cases}
    groups = {case.group for case in setup.cases if case.kind == "untrained"}
    assert {"hold", "TaylorSeer", "DP schedule"} <= groups and work["4 steps"] == 4 * BLOCKS
    own = min(work[case.name] for case in setup.cases if case.kind == "adapter")
    assert all(work[case.name] >= own for case in setup.cases if case.kind == "untrained")
