"""What only a GPU can show: no host synchronisation in a step, and the same images as on the CPU."""

from __future__ import annotations

import pytest
import torch

from modules.ilf import ILFConfig, ILFHandle, ILFModule
from modules.pipelines import driver, load_pipeline
from trainers import recipes, training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _looping(device: str) -> tuple[object, ILFHandle]:
    running = driver(load_pipeline("embedded:pixart").to(device), "embedded:pixart")
    config = ILFConfig(
        span_start=2,
        span_len=2,
        feedback=[True] * 4,
        timesteps=[999, 700, 400, 100],
        guidance=2.5,
        scale_shape="per_step",
    )
    torch.manual_seed(0)
    module = ILFModule(config, running.transformer).to(device).requires_grad_(False)
    module.scale += 0.05
    return running, ILFHandle(running.transformer, module)


def test_a_looped_step_never_waits_for_the_device():
    running, handle = _looping("cuda")
    conditions = running.encode(["a small red circle at the center on a white background"] * 2)
    latents, timestep = running.initial_noise([0, 1]), torch.tensor(700, device="cuda")
    with handle, torch.no_grad():
        handle.clock.begin(4)
        running.guided(latents, timestep, conditions, 2.5)  # warm-up: cuBLAS and autotuning may synchronise once
        torch.cuda.set_sync_debug_mode("error")
        try:
            running.guided(latents, timestep, conditions, 2.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_looped_step_on_the_gpu_equals_the_cpu():
    outputs = []
    for device in ("cpu", "cuda"):
        running, handle = _looping(device)
        conditions = running.encode(["a small red circle at the center on a white background"])
        with handle, torch.no_grad():
            handle.clock.pin(1)
            timestep = torch.tensor(700, device=device)
            outputs.append(running.guided(running.initial_noise([0]), timestep, conditions, 2.5).cpu())
    assert (outputs[0] - outputs[1]).abs().max() < 2e-3 * outputs[0].abs().max()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_dry_run_trains_exports_and_reloads(precision):
    from rich.console import Console

    recipe = recipes.compose_recipe(
        "ilf_pixart", {"data.trajectories": "8", "data.batch_size": "4", "trainer.precision": precision}
    )
    training.dry_run(recipe, Console(quiet=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload"])
def test_one_gpu_under_every_strategy_learns_what_a_plain_run_does(strategy, tmp_path):
    from tests import strategy_worker
    from tests.test_strategies import furthest, job, state_of, told

    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    gpu = {"trainer__accelerator": "gpu", "optimizer__schedule": "constant"}
    names = ("auto", strategy)
    # A process of its own for each: torch keeps one process group for good.
    for name in names:
        strategy_worker.start(tmp_path, [job(name, tmp_path, name, ranks=1, **gpu)], ranks=1, device="cuda")
    assert told(tmp_path, strategy)["world_size"] == 1
    # Six updates of at most 1e-3, with GPU sums in another order.
    assert furthest(*(state_of(tmp_path / name) for name in names)) < 2e-4
