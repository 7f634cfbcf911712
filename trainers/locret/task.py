"""The task that trains Locret: one pass of the backbone gives features and labels, the heads are regressed on them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from checkpoints.manifest import describe, fingerprint
from data.contexts import ContextRows, ContextSource
from modules.kv_host import attention_sites
from modules.locret import RetainingHeads, features_and_labels, features_while_evicting
from trainers.adapters import write_task_adapter
from trainers.base import FrozenBackboneTask
from trainers.schemas.locret import Recipe

_WATCHED = 0.1  # share of the tokens that the overlap is measured on

Batch = tuple[Tensor, Tensor, int]
"""Ids, labels of the following tokens, and where these begin."""


class LocretTask(FrozenBackboneTask):
    """Frozen language model, learned retaining heads; no gradient ever enters the backbone."""

    learned: RetainingHeads
    unit = "tokens"

    def __init__(self, recipe: Recipe, model: Any, heads: RetainingHeads, source: ContextSource) -> None:
        super().__init__(model, heads, recipe)
        self.settings, self.source = recipe, source
        self.sites = attention_sites(model)
        self.units_per_sample = recipe.data.length
        self.identity = fingerprint(model), describe(model)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rows by number."""

        def fetch(index: Tensor) -> Batch:
            rows = self.source.rows(index)
            return rows.input_ids, rows.labels, rows.context

        return self.stepped_loader(fetch, len(self.source), self.settings.data.batch_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The regression's loss."""
        rows = ContextRows(*batch)
        question = None
        if self.settings.module.query_aware:
            question = rows.input_ids[:, : rows.context][:, -self.settings.module.local :]
        pairs = features_and_labels(self.backbone, self.sites, rows.input_ids, rows.context, question)
        features, labels = map(list, zip(*pairs, strict=True))
        if self.settings.objective.evicting:
            prompts, policy = rows.input_ids[:, : rows.context], self.learned.config.cache_policy()
            features = features_while_evicting(self.backbone, self.learned, policy, prompts)
        scores = [self.learned(feature, layer) for layer, feature in enumerate(features)]
        loss, regression, steps = retaining_loss(scores, labels, self.settings.objective.smooth_weight)
        self.note(loss=loss, regression=regression, smoothness=steps, overlap=overlap(scores, labels, _WATCHED))
        return loss

    def head_tensors(self) -> dict[str, Tensor]:
        """The exported heads' tensors as the adapter stores them: float32, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.exported.state_dict().items()}

    def export_adapter(self, folder: Path) -> None:
        """The heads, and how the cache is cut by default."""
        write_task_adapter(self, folder, asdict(self.learned.config), self.head_tensors())


def retaining_loss(scores: list[Tensor], labels: list[Tensor], smooth_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two parts: mean over the layers of SmoothL1, and the *sum* over the layers of squared steps.

    Args:
        scores, labels: by layer, [B, n, H].
    Source: Huang et al. 2024, equation 3, with the sum of the published code.
    """
    regression = torch.stack(
        [functional.smooth_l1_loss(mine.float(), wanted) for mine, wanted in zip(scores, labels, strict=True)]
    ).mean()
    steps = torch.stack([mine.float().diff(dim=1).square().mean() for mine in scores]).sum()
    return regression + smooth_weight * steps, regression, steps


@torch.no_grad()
def overlap(scores: list[Tensor], labels: list[Tensor], share: float) -> Tensor:
    """Of the units that a head should keep first, the share that it does, over all layers and KV heads."""
    found = []
    for mine, wanted in zip(scores, labels, strict=True):
        count = max(1, round(share * mine.shape[1]))
        kept = torch.zeros_like(mine).scatter_(1, mine.topk(count, dim=1).indices, 1.0)
        found.append(kept.gather(1, wanted.topk(count, dim=1).indices).mean())
    return torch.stack(found).mean()
