"""From a recipe to its task: the backbone, its text, and projections that start as PCA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from data.contexts import ContextSource
from modules.kv_host import attention_sites
from modules.kv_host.projection import principal_bases
from modules.language_models import load_model
from modules.matryoshka_kv import MatryoshkaProjections
from trainers.contexts import training_source
from trainers.devices import training_device
from trainers.matryoshka_kv.task import MatryoshkaTask
from trainers.schemas.matryoshka_kv import Recipe


def build_task(recipe: Recipe) -> MatryoshkaTask:
    """Loads the backbone and takes PCA of its keys and values.

    Raises:
        ValueError: the recipe does not fit the backbone, or what it learns from cannot be read.
    """
    backbone, settings = recipe.backbone, recipe.module
    model, tokenizer = load_model(backbone.name, backbone.revision, backbone.dtype)
    device = training_device(recipe)
    model.to(device)
    sites = attention_sites(model)
    size = sites[0].head_dim
    interval = settings.interval or max(1, size // 8)
    smallest = interval / size
    if size % interval or settings.budget not in settings.budgets or min(settings.budgets) < smallest:
        raise ValueError(
            f"module.interval is {interval}, module.budgets {settings.budgets} and module.budget {settings.budget:g}: "
            f"the interval must divide the head size {size}, no budget be below {smallest:g}, and the budget be one of "
            "the budgets"
        )
    # Every token of a text teaches, not only those behind a context.
    data = recipe.data.model_copy(update={"length": 1, "following": recipe.data.length - 1})
    source = training_source(data if recipe.data.kind == "text" else recipe.data, model, tokenizer)
    moments = principal_bases(model, sites, _calls(source, settings.pca_rows, recipe.data.batch_size, device))
    return MatryoshkaTask(recipe, model, MatryoshkaProjections(moments), source)


def _calls(source: ContextSource, rows: int, batch_size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    for part in torch.arange(min(rows, len(source))).split(batch_size):
        yield {"input_ids": source.rows(part).input_ids.to(device)}
