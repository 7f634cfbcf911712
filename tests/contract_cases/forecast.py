"""The learned forecast on the tiny DiT pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.contract_cases.interface import ContractCase
from tests.tiny_cache import cache_case
from tests.tiny_forecast import save_tiny, tiny_recipe
from trainers.forecast.task import ForecastTask

LABELS = [3, 1, 4, 1, 5, 9]


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny("dit", folder)

    def graph_outputs(task: ForecastTask) -> Tensor:
        task.runs.conditions.asked["labels"].copy_(torch.tensor(LABELS))
        with torch.no_grad():
            return task.final(task.learned, 0)

    return cache_case(tiny_recipe(name), name, graph_outputs, LABELS)
