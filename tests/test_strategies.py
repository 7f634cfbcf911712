"""DDP and FSDP with two real processes: the same training, the same checkpoint, nothing frozen that is sent or kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.load import load_adapter, read_tensors
from tests import strategy_worker
from tests.tiny_ilf import LEARNED_SOLVER, save_tiny, tiny_driver
from trainers.callbacks import read_checkpoint
from trainers.run_folder import RunFolder
from trainers.settings import ConfigError

STEPS, HALF = 6, 3
# Largest difference of a tensor after 6 updates of at most 1e-3 each: sums are taken in another order, and AdamW
# divides by the root of squares that are as small as the differences.
BOUND = 2e-5


def job(name: str, folder: Path, strategy: str = "auto", ranks: int = 2, source: str = "", **changes: str) -> Any:
    """A rollout whose global batch is 2 whatever the number of ranks, so that no rank draws noise of its own."""
    settings = {
        "backbone.name": changes.pop("backbone__name", "") or save_tiny("dit", folder),
        "data.batch_size": str(2 // ranks),
        "optimizer.lr": "1e-3",
        "trainer.strategy": strategy,
        "trainer.devices": str(ranks),
        "trainer.max_steps": str(STEPS),
        "trainer.save_every": str(HALF),
        "trainer.log_every": "1",
        "trainer.ema": "0.9",
        **LEARNED_SOLVER,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {"name": name, "from": source, "overrides": settings}


def pair(folder: Path, strategy: str) -> list[Any]:
    """A run, the same run stopped half-way, and its continuation."""
    half = job(f"{strategy}-half", folder, strategy, trainer__max_steps=str(STEPS))
    half["overrides"]["trainer.max_steps"] = str(HALF)
    # The schedule of a run that will go on must be that of the whole.
    half["overrides"]["optimizer.schedule"] = "constant"
    whole = job(strategy, folder, strategy, optimizer__schedule="constant")
    rest = job(f"{strategy}-rest", folder, strategy, source=f"{strategy}-half", optimizer__schedule="constant")
    return [whole, half, rest]


def deep(folder: Path, strategy: str) -> Any:
    """One update of a module on a backbone that is 100 times larger."""
    name = save_tiny("dit", folder / "deep", layers=110)
    return job(f"deep-{strategy}", folder, strategy, backbone__name=name, trainer__max_steps="1", trainer__ema="0")


def assert_small_checkpoint(folder: Path, strategy: str) -> None:
    """What is kept holds float32 weights and two moments, and no part of the backbone."""
    run = RunFolder(folder / f"deep-{strategy}")
    adapter = run.adapter / "adapter_model.safetensors"
    assert told(folder, f"deep-{strategy}")["whole"] > 100 * adapter.stat().st_size
    checkpoint = run.latest_checkpoint()
    assert checkpoint.is_file() and checkpoint.stat().st_size <= 4 * adapter.stat().st_size


def assert_equal_losses(folder: Path, name: str) -> None:
    """The mean over ranks is the loss of one process with the whole batch; losses are of order 1."""
    curves = []
    for run in (name, "single"):
        with (folder / run / "metrics.csv").open(newline="") as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def state_of(folder: Path) -> dict[str, Tensor]:
    """The last checkpoint's tensors."""
    return read_checkpoint(RunFolder(folder).latest_checkpoint())["state_dict"]


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of any element."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def told(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a rank told of a job."""
    return json.loads((folder / name / f"rank_{rank}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    strategy_worker.run(folder, job("single", folder, ranks=1, optimizer__schedule="constant"))
    half = job("single-half", folder, ranks=1, optimizer__schedule="constant", trainer__max_steps=str(HALF))
    strategy_worker.run(folder, half)
    jobs = [*pair(folder, "ddp"), *pair(folder, "fsdp"), deep(folder, "ddp"), deep(folder, "fsdp")]
    jobs.append(job("single-to-ddp", folder, "ddp", source="single-half", optimizer__schedule="constant"))
    jobs.append(job("bf16-fsdp", folder, "fsdp", backbone__dtype="bfloat16"))
    noisy = {"module__solver": "backbone", "objective__rollout": "false"}
    jobs.append(job("noisy-fsdp", folder, "fsdp", trainer__sample_every="3", **noisy))
    strategy_worker.start(folder, jobs)
    strategy_worker.run(
        folder, job("ddp-to-single", folder, ranks=1, source="ddp-half", optimizer__schedule="constant")
    )
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(runs: Path, strategy: str) -> None:
    assert told(runs, strategy)["world_size"] == 2
    assert 0 < furthest(state_of(runs / strategy), state_of(runs / "single")) < BOUND
    adapters = [read_tensors(runs / name / "adapter") for name in (strategy, "single")]
    assert furthest(*adapters) < BOUND


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_loss_curve_is_that_of_one_process(runs: Path, strategy: str) -> None:
    assert_equal_losses(runs, strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(runs: Path, strategy: str) -> None:
    assert furthest(state_of(runs / f"{strategy}-rest"), state_of(runs / strategy)) == 0


def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    for name in ("single-to-ddp", "ddp-to-single"):
        assert furthest(state_of(runs / name), state_of(runs / "single")) < BOUND
        assert read_checkpoint(RunFolder(runs / name).latest_checkpoint())["data_position"] == [STEPS, 2 * STEPS]


def test_a_sharded_backbone_is_held_in_parts_and_keeps_its_dtype(runs: Path) -> None:
    parts = [told(runs, "bf16-fsdp", rank) for rank in (0, 1)]
    assert parts[0]["dtypes"] == ["torch.bfloat16"] and parts[0]["learned_dtypes"] == ["torch.float32"]
    # Shards are along the first dimension, whose odd sizes are not halved exactly.
    assert all(0.45 < part["held"] / told(runs, "ddp")["whole"] * 2 < 0.6 for part in parts)
    assert told(runs, "ddp")["held"] == told(runs, "ddp")["whole"]
    assert all(told(runs, name)["gradients"] == 0 for name in ("ddp", "fsdp"))


def test_samples_are_drawn_while_the_backbone_is_sharded(runs: Path) -> None:
    assert sorted(path.name for path in (runs / "noisy-fsdp" / "samples").iterdir()) == [
        "step_0000003.png",
        "step_0000006.png",
    ]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_several_processes_export_loads_into_a_plain_pipeline(runs: Path, strategy: str) -> None:
    running = tiny_driver("dit")
    with load_adapter(running.pipe, runs / strategy / "adapter") as handle:
        images = running.generate([3, 7], [1, 2], **handle.call_kwargs)
    assert torch.isfinite(images).all()


def test_checkpoints_are_of_the_same_content_under_every_strategy(runs: Path) -> None:
    first = read_checkpoint(RunFolder(runs / "single").latest_checkpoint())
    for name in ("ddp", "fsdp"):
        other = read_checkpoint(RunFolder(runs / name).latest_checkpoint())
        assert other.keys() == first.keys()
        assert other["optimizer_states"][0]["state"].keys() == first["optimizer_states"][0]["state"].keys()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_is_at_most_four_adapters(runs: Path, strategy: str) -> None:
    assert_small_checkpoint(runs, strategy)


@pytest.mark.parametrize("wrong", ["deepspeed_4", "deepspeed", "DDP", "zero"])
def test_an_unknown_strategy_is_refused_with_those_that_there_are(tmp_path: Path, wrong: str) -> None:
    from trainers import recipes

    with pytest.raises(ConfigError, match="deepspeed_3_offload"):
        recipes.compose_recipe("ilf_pixart", {"trainer.strategy": wrong})


def test_deepspeed_refuses_a_precision_that_it_would_not_scale_the_loss_of() -> None:
    from trainers import recipes

    with pytest.raises(ConfigError, match="bf16-mixed"):
        recipes.compose_recipe("ilf_pixart", {"trainer.strategy": "deepspeed_2", "trainer.precision": "16-mixed"})
