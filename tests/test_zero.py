"""DeepSpeed ZeRO 1 to 3 with two real processes: the same training and the same checkpoint as one plain process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from checkpoints.load import load_adapter, read_tensors
from tests import strategy_worker
from tests.strategy_worker import ROOT
from tests.test_strategies import (
    BOUND,
    STEPS,
    assert_equal_losses,
    assert_small_checkpoint,
    deep,
    furthest,
    job,
    pair,
    state_of,
    told,
)
from tests.tiny import tiny_pipeline
from tests.tiny_ilf import tiny_driver
from trainers.callbacks import read_checkpoint
from trainers.run_folder import RunFolder

pytestmark = pytest.mark.deepspeed
pytest.importorskip("deepspeed")

STAGES = ["deepspeed_1", "deepspeed_2", "deepspeed_3"]
WIDE = {"num_attention_heads": 3, "attention_head_dim": 64, "num_layers": 4}
FLAT = {"optimizer__schedule": "constant"}


def wide(folder: Path) -> str:
    """A backbone whose matrices, and its module's, are larger than what DeepSpeed keeps whole anyway."""
    pipe = tiny_pipeline("dit")
    names = ("in_channels", "out_channels", "sample_size", "patch_size", "num_embeds_ada_norm")
    shared = {name: pipe.transformer.config[name] for name in names}
    torch.manual_seed(0)
    pipe.register_modules(transformer=DiTTransformer2DModel(**WIDE, **shared))
    pipe.save_pretrained(folder / "wide_dit")
    return str(folder / "wide_dit")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    strategy_worker.run(folder, job("single", folder, ranks=1, **FLAT))
    strategy_worker.run(folder, job("single-half", folder, ranks=1, trainer__max_steps="3", **FLAT))
    jobs = []
    for stage in STAGES:
        jobs += pair(folder, stage)
        jobs.append(job(f"single-to-{stage}", folder, stage, source="single-half", **FLAT))
    jobs += [job(f"{stage}_offload", folder, f"{stage}_offload", **FLAT) for stage in STAGES[1:]]
    jobs.append(job("ddp-half", folder, "ddp", trainer__max_steps="3", **FLAT))
    jobs.append(job("ddp-to-deepspeed_3", folder, "deepspeed_3", source="ddp-half", **FLAT))
    twice = {"trainer__accumulate_grad_batches": "2", "trainer__max_steps": "3"}
    jobs += [job(f"twice-{name}", folder, name, **twice, **FLAT) for name in ("ddp", "deepspeed_2")]
    mixed = {"trainer__precision": "bf16-mixed", "backbone__dtype": "bfloat16"}
    jobs += [job(f"bf16-{name}", folder, name, **mixed, **FLAT) for name in ("ddp", "deepspeed_2", "deepspeed_3")]
    plain = {"trainer__ema": "0", "trainer__sample_every": "3"}
    jobs.append(job("no-average", folder, "deepspeed_3", **plain, **FLAT))
    noisy = {"module__solver": "backbone", "objective__rollout": "false"}
    jobs.append(job("noisy", folder, "deepspeed_3", **noisy))
    jobs.append(job("fad", folder, "deepspeed_3", objective__target="fad", **noisy))
    jobs += [deep(folder, stage) for stage in STAGES]
    backbone = {"backbone__name": wide(folder)}
    strategy_worker.run(folder, job("wide", folder, ranks=1, **backbone, **FLAT))
    jobs += [job("wide-3", folder, "deepspeed_3", **backbone, **FLAT)]
    half = job("wide-half", folder, "deepspeed_3", trainer__max_steps="3", **backbone, **FLAT)
    jobs += [half, job("wide-rest", folder, "deepspeed_3", source="wide-half", **backbone, **FLAT)]
    strategy_worker.start(folder, jobs)
    for stage in STAGES:
        strategy_worker.run(folder, job(f"{stage}-to-single", folder, ranks=1, source=f"{stage}-half", **FLAT))
    return folder


@pytest.mark.parametrize("name", [*STAGES, "deepspeed_2_offload", "deepspeed_3_offload"])
def test_two_ranks_learn_what_one_plain_process_does(runs: Path, name: str) -> None:
    assert told(runs, name)["world_size"] == 2 and told(runs, name)["strategy"] == "ZeRO"
    assert 0 < furthest(state_of(runs / name), state_of(runs / "single")) < BOUND
    assert furthest(read_tensors(runs / name / "adapter"), read_tensors(runs / "single" / "adapter")) < BOUND


@pytest.mark.parametrize("name", [*STAGES, "deepspeed_2_offload", "deepspeed_3_offload"])
def test_the_loss_curve_is_that_of_one_process(runs: Path, name: str) -> None:
    assert_equal_losses(runs, name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(runs: Path, stage: str) -> None:
    assert furthest(state_of(runs / f"{stage}-rest"), state_of(runs / stage)) == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["single-to-{}", "{}-to-single"])
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(runs: Path, stage: str, way: str) -> None:
    assert furthest(state_of(runs / way.format(stage)), state_of(runs / "single")) < BOUND


def test_a_run_of_ddp_goes_on_under_zero_3(runs: Path) -> None:
    assert furthest(state_of(runs / "ddp-to-deepspeed_3"), state_of(runs / "single")) < BOUND


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_is_that_of_a_plain_run(runs: Path, stage: str) -> None:
    ours, plain = (read_checkpoint(RunFolder(runs / name).latest_checkpoint()) for name in (stage, "single"))
    assert ours.keys() == plain.keys() and ours["global_step"] == STEPS
    mine, theirs = ours["optimizer_states"][0], plain["optimizer_states"][0]
    assert [group["params"] for group in mine["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    for number, state in theirs["state"].items():
        assert state.keys() == mine["state"][number].keys() and float(mine["state"][number]["step"]) == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert mine["state"][number][key].shape == state[key].shape
            # Moments of losses of order 1, reduced in another order.
            assert torch.allclose(mine["state"][number][key], state[key], atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_at_most_four_adapters(runs: Path, stage: str) -> None:
    assert_small_checkpoint(runs, stage)


def test_stage_3_shards_the_backbone_in_its_own_dtype(runs: Path) -> None:
    parts = [told(runs, "bf16-deepspeed_3", rank) for rank in (0, 1)]
    assert parts[0]["dtypes"] == ["torch.bfloat16"] and parts[0]["learned_dtypes"] == ["torch.float32"]
    assert parts[0]["gradients"] == 0


def test_stage_3_shards_large_matrices_of_the_backbone_and_learns_the_same(runs: Path) -> None:
    assert 0 < furthest(state_of(runs / "wide-3"), state_of(runs / "wide")) < BOUND
    assert furthest(state_of(runs / "wide-rest"), state_of(runs / "wide-3")) == 0
    held = [told(runs, "wide-3", rank) for rank in (0, 1)]
    # Halves of the large matrices; those of up to 100,000 elements are whole beside their halves, as DeepSpeed has it.
    assert all(0.5 <= part["held"] / part["whole"] < 0.8 for part in held)


def test_updates_of_several_batches_are_those_of_ddp(runs: Path) -> None:
    assert furthest(state_of(runs / "twice-deepspeed_2"), state_of(runs / "twice-ddp")) < BOUND


@pytest.mark.parametrize("stage", ["deepspeed_2", "deepspeed_3"])
def test_mixed_precision_means_what_it_means_elsewhere(runs: Path, stage: str) -> None:
    assert furthest(state_of(runs / f"bf16-{stage}"), state_of(runs / "bf16-ddp")) < 10 * BOUND


@pytest.mark.parametrize("name", ["no-average", "noisy", "fad", "deepspeed_3"])
def test_no_tensor_of_an_adapter_is_empty_or_partial(runs: Path, name: str) -> None:
    tensors, plain = (read_tensors(runs / one / "adapter") for one in (name, "single"))
    assert {key: value.shape for key, value in tensors.items()} == {key: value.shape for key, value in plain.items()}
    running = tiny_driver("dit")
    with load_adapter(running.pipe, runs / name / "adapter") as handle:
        assert torch.isfinite(running.generate([3], [1], **handle.call_kwargs)).all()


def test_samples_are_drawn_while_everything_is_sharded(runs: Path) -> None:
    assert len(list((runs / "no-average" / "samples").iterdir())) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_recipe_runs_dry(stage: str, tmp_path: Path) -> None:
    small = ["data.trajectories=8", "data.batch_size=2", "trainer.accelerator=cpu", f"trainer.strategy={stage}"]
    command = [sys.executable, "-m", "trainers.fit", "recipe=ilf_pixart", "--dry-run", "trainer.devices=2", *small]
    names = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("exported and loaded again") == 1 and not list(tmp_path.iterdir())
