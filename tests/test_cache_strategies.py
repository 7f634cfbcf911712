"""Learned caches, of diffusion and of keys and values, under every strategy with two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints.load import read_tensors
from tests import strategy_worker, tiny_ilf, tiny_kv
from tests.test_strategies import furthest, state_of, told
from trainers import recipes
from trainers.callbacks import read_checkpoint
from trainers.run_folder import RunFolder
from trainers.settings import ConfigError

LORA = "matryoshka_kv and lora"
METHODS = ["forecast", "harmonica", "locret", "matryoshka_kv", LORA]
STAGES = ["deepspeed_1", "deepspeed_2", "deepspeed_3"]
# Four updates of at most 1e-3, whose gradients are summed in another order.
BOUND = 2e-5


def jobs(folder: Path, strategies: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """A few updates of each method under each strategy; jobs are called METHOD-STRATEGY."""
    pipeline, model = tiny_ilf.save_tiny("dit", folder), tiny_kv.save_tiny(folder)
    backbones = {
        "forecast": {"backbone.name": pipeline},
        "harmonica": {"backbone.name": pipeline, "objective.drift": "true", "objective.credit": "true"},
        "locret": {"backbone.name": model, "data.path": str(folder / "text")},
        "matryoshka_kv": {"backbone.name": model, "data.path": str(folder / "text")},
    }
    common = {"optimizer.lr": "1e-3", "trainer.devices": "2", "trainer.max_steps": "4", "trainer.save_every": "2"}
    backbones["matryoshka_kv"] |= {"trainer.max_steps": "1", "trainer.save_every": "1"}
    backbones[LORA] = {**backbones["matryoshka_kv"], "lora.rank": "2", "lora.dropout": "0", "lora.lr_scale": "1"}
    return [
        {
            "name": f"{method}-{strategy}",
            "method": method.partition(" ")[0],
            "overrides": {**common, **backbones[method], "trainer.strategy": strategy},
        }
        for method in methods
        for strategy in strategies
    ]


def assert_as_ddp(folder: Path, method: str, strategy: str) -> None:
    """The same checkpoint and the same adapter; nothing frozen has a gradient."""
    run, plain = folder / f"{method}-{strategy}", folder / f"{method}-ddp"
    found, wanted = (state_of(one) for one in (run, plain))
    adapters = [read_tensors(one / "adapter") for one in (run, plain)]
    if method.startswith("matryoshka_kv"):
        # Most of a random model's turns have no gradient but rounding, of which AdamW makes whole steps.
        checkpoint = RunFolder(plain).latest_checkpoint()
        assert checkpoint is not None
        state = read_checkpoint(checkpoint)["optimizer_states"][0]["state"][0]
        taught = state["exp_avg_sq"].sqrt() > 1e-7
        assert taught.float().mean() > 0.2
        for one in (found, wanted):
            one["learned.skew"] = one["learned.skew"].where(taught, 0.0)
        for adapter in adapters:
            del adapter["keys"], adapter["values"]
    assert 0 <= furthest(found, wanted) < BOUND
    assert furthest(*adapters) < BOUND
    if method == LORA:
        assert all(bool(value.any()) for name, value in adapters[0].items() if name.endswith("proj.B"))
        return  # which learns inside of the backbone
    assert told(folder, f"{method}-{strategy}")["gradients"] == 0


def test_a_sharded_backbone_teaches_the_same_caches(tmp_path: Path) -> None:
    strategy_worker.start(tmp_path, jobs(tmp_path, ["ddp", "fsdp"], METHODS))
    for method in METHODS:
        assert_as_ddp(tmp_path, method, "fsdp")


@pytest.mark.deepspeed
def test_every_stage_teaches_the_same_caches(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    methods = [method for method in METHODS if method != "harmonica"]  # which refuses it
    strategy_worker.start(tmp_path, jobs(tmp_path, ["ddp", *STAGES], methods))
    for method in methods:
        for stage in STAGES:
            assert_as_ddp(tmp_path, method, stage)


def test_a_router_is_refused_what_would_step_all_its_rows() -> None:
    with pytest.raises(ConfigError, match="ddp or fsdp"):
        recipes.compose_recipe("harmonica_dit", {"trainer.strategy": "deepspeed_1"})
