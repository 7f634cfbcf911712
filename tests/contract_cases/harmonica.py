"""HarmoniCa on the tiny DiT pipeline, with the learned forecast: every kind of tensor that it has is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.stepped import derive_seed
from tests.contract_cases.interface import ContractCase
from tests.tiny_cache import cache_case
from tests.tiny_forecast import save_tiny, tiny_recipe
from trainers.harmonica.student import Row
from trainers.harmonica.task import HarmoniCaTask

LABELS = [3, 1, 4, 1, 5, 9]
RECIPE = Path(__file__).parents[1] / "harmonica_tiny.yaml"


def hard_final(task: HarmoniCaTask, latents: Tensor, labels: list[int], mask: Tensor) -> Tensor:
    """The training graph's final latents with scores of 0 and 1."""

    def table(step: int) -> Row | None:
        row = task.learned.row(step)
        return None if row is None else (mask[step].float(), row[1])

    return task.sampler.final(latents, task.running.encode(labels), table)


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny("dit", folder)

    def graph_outputs(task: HarmoniCaTask) -> Tensor:
        seeds = [derive_seed(task.recipe.seed, "trajectory", i) for i in range(len(LABELS))]
        with torch.no_grad():
            return hard_final(task, task.running.initial_noise(seeds), LABELS, task.masks()[0])

    return cache_case(tiny_recipe(name, RECIPE, module__reuse_op="linear"), name, graph_outputs, LABELS)
