"""HarmoniCa on the tiny pipelines: tasks, configs and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.harmonica import HarmoniCaConfig
from modules.sites import block_stack
from tests.contract_cases.harmonica import RECIPE
from tests.tiny_forecast import tiny_recipe
from tests.tiny_ilf import GUIDANCE, timesteps_of
from trainers.harmonica.task import HarmoniCaTask
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

STEPS = 5
OPS = ("hold", "taylor1", "taylor2", "linear")


def task_of(name: str, **changes: str) -> HarmoniCaTask:
    return build_task(tiny_recipe(name, RECIPE, **changes))


def trained(name: str, folder: Path, **changes: str) -> HarmoniCaTask:
    task = task_of(name, **changes)
    folder.mkdir(parents=True)
    train(task, RunFolder(folder))
    return task


def resumed_and_whole(name: str, folder: Path, **changes: str) -> tuple[HarmoniCaTask, HarmoniCaTask]:
    """A run that stopped within trajectories and one that never stopped, which must end alike, bit for bit."""
    whole = trained(name, folder / "whole", **changes)
    (folder / "parts").mkdir()
    for stop in ("2", "5", "8"):  # trajectories are three updates long
        part = task_of(name, **changes, trainer__max_steps=stop)
        train(part, RunFolder(folder / "parts"))
    mine, theirs = part.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    return part, whole


def config_of(pipe: Any, granularity: str = "submodule", **changes: Any) -> HarmoniCaConfig:
    stack = block_stack(pipe.transformer)
    parts = [[f"{n}.{part}" for part in stack.submodules(i)] for i, n in enumerate(stack.names)]
    units = {"submodule": sum(parts, []), "block": list(stack.names), "model": [type(pipe.transformer).__name__]}
    values = {
        "units": units[granularity], "routed": list(range(1, STEPS)), "timesteps": timesteps_of(pipe, STEPS),
        "guidance": GUIDANCE, "granularity": granularity,
    }  # fmt: skip
    return HarmoniCaConfig(**{**values, **changes})


def random_mask(units: int, seed: int = 0) -> Tensor:
    mask = torch.rand(STEPS, units, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = True
    return mask
