"""Medusa's heads under every strategy with two real processes: what DDP learns, whole in the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints.load import load_adapter, read_tensors
from tests import strategy_worker
from tests.test_strategies import furthest, state_of, told
from tests.tiny_medusa import save_tiny

STAGES = ["deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_3_offload"]
# Four updates of at most 1e-3, whose gradients are summed in another order.
BOUND = 2e-5


def job(name: str, backbone: str, strategy: str, **changes: str) -> dict[str, Any]:
    """Four updates on what the tiny Llama says."""
    settings = {
        "backbone.name": backbone,
        "data.path": str(Path(backbone).with_name("text.jsonl")),
        "data.batch_size": "4",
        "module.reads": "path",  # the output matrix is read by rows, too
        "module.layers": "[1]",
        "optimizer.lr": "1e-3",
        "trainer.strategy": strategy,
        "trainer.devices": "2",
        "trainer.max_steps": "4",
        "trainer.save_every": "2",
        "trainer.sample_every": "2",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {"name": name, "method": "medusa", "overrides": settings}


def started(folder: Path, strategies: list[str], **changes: str) -> Path:
    """The runs of these strategies, and DDP's."""
    name = save_tiny(folder)
    strategy_worker.start(folder, [job(one, name, one, **changes) for one in ["ddp", *strategies]])
    return folder


def assert_as_ddp(folder: Path, strategy: str) -> None:
    """The same checkpoint, the same adapter, and heads that draft for a plain model."""
    assert 0 <= furthest(state_of(folder / strategy), state_of(folder / "ddp")) < BOUND
    assert furthest(read_tensors(folder / strategy / "adapter"), read_tensors(folder / "ddp" / "adapter")) < BOUND
    assert told(folder, strategy)["gradients"] == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    with load_adapter(model, folder / strategy / "adapter") as handle:
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
        assert handle.counts.tokens_per_step >= 1


def test_a_sharded_backbone_teaches_the_same_heads(tmp_path: Path) -> None:
    assert_as_ddp(started(tmp_path, ["fsdp"]), "fsdp")


@pytest.mark.deepspeed
def test_sharded_optimizers_teach_the_same_heads(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    started(tmp_path, STAGES)
    for stage in STAGES:
        assert_as_ddp(tmp_path, stage)


@pytest.mark.deepspeed
def test_lora_in_the_backbone_gets_the_gradient_of_all_ranks(tmp_path: Path) -> None:
    """DDP and DeepSpeed find what learns in different ways; whoever leaves LoRA to each rank is seen here."""
    pytest.importorskip("deepspeed")
    lora = {"lora__rank": "2", "lora__dropout": "0", "lora__lr_scale": "1"}
    started(tmp_path, ["deepspeed_1", "deepspeed_3"], trainer__max_steps="1", trainer__save_every="1", **lora)
    plain = state_of(tmp_path / "ddp")
    learned = [name for name in plain if "lora" in name and name.endswith(".1.weight")]
    assert learned and all(bool(plain[name].any()) for name in learned)
    for stage in ("deepspeed_1", "deepspeed_3"):
        assert 0 <= furthest(state_of(tmp_path / stage), plain) < BOUND
