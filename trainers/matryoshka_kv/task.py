"""The task that trains MatryoshkaKV: the model with random ranks is taught by itself without projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from data.contexts import ContextSource
from data.stepped import step_generator
from data.text import IGNORED
from modules.kv_host import attention_sites
from modules.kv_host.interface import attending, probing
from modules.matryoshka_kv import (
    MatryoshkaConfig,
    MatryoshkaProjections,
    draw_masks,
    projecting_probe,
    rank_masks,
    search_ranks,
)
from trainers.adapters import write_task_adapter
from trainers.lora_task import LoraTask
from trainers.schemas.matryoshka_kv import Recipe

_WATCHED = (2, 4, 8)  # eighths of the width that the divergence is watched at
_TOGETHER = 4  # rows of a search that run at a time

Batch = tuple[Tensor, Tensor]
"""Ids, and labels where something is to be predicted."""


class MatryoshkaTask(LoraTask):
    """Frozen language model, learned projections of its cache, and with `lora.rank` LoRA in its layers.

    Attributes:
        interval: ranks are multiples of it.
    """

    learned: MatryoshkaProjections
    unit = "tokens"

    def __init__(self, recipe: Recipe, model: Any, projections: MatryoshkaProjections, source: ContextSource) -> None:
        super().__init__(model, projections, recipe, recipe.lora)
        self.settings, self.source = recipe, source
        self.sites = attention_sites(model)
        self.units_per_sample = recipe.data.length
        self.may_leave_unused = bool(recipe.lora.alone)
        self.interval = recipe.module.interval or max(1, projections.head_dim // 8)
        self._tables: tuple[int, dict[str, Any]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, 2, KV heads, head size)."""
        return tuple(self.learned.start.shape[:4])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Nothing of the projections decays: zero is PCA, not nothing."""
        return [{"params": [self.learned.skew, self.learned.means], "weight_decay": 0.0}, *self.lora_group()]

    def train_dataloader(self) -> DataLoader[Any]:
        """Rows by number."""

        def fetch(index: Tensor) -> Batch:
            rows = self.source.rows(index)
            return rows.input_ids, rows.labels

        return self.stepped_loader(fetch, len(self.source), self.settings.data.batch_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Divergence from the model as it was, and cross entropy with the text, at random ranks."""
        if self.global_step < self.settings.lora.alone:
            return self._lora_loss(batch)
        generator = step_generator(self.recipe.seed, "ranks", self.batch_number, self.global_rank)
        masks = draw_masks(self.shape, self.interval, generator).to(self.device)
        loss, kl, ce = self.losses(batch, self.learned, masks)
        self.note(loss=loss, kl=kl, ce=ce)
        return loss

    def losses(self, batch: Batch, projections: MatryoshkaProjections, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its two parts, of some masks [L, 2, H, d]."""
        ids, labels = batch
        asked, targets = labels[:, 1:] != IGNORED, labels[:, 1:]
        with torch.no_grad(), attending(self.backbone), self.without_lora():
            teacher = functional.log_softmax(self._logits(ids, asked), -1)
        with self.projected(projections, masks):
            logits = self._logits(ids, asked)
        kl = functional.kl_div(functional.log_softmax(logits, -1), teacher, reduction="batchmean", log_target=True)
        ce = functional.cross_entropy(logits, targets[asked])
        objective = self.settings.objective
        return objective.kl_weight * kl + objective.ce_weight * ce, kl, ce

    def _lora_loss(self, batch: Batch) -> Tensor:
        """Cross entropy with the text at full rank."""
        ids, labels = batch
        asked, targets = labels[:, 1:] != IGNORED, labels[:, 1:]
        with attending(self.backbone):
            loss = functional.cross_entropy(self._logits(ids, asked), targets[asked])
        self.note(loss=loss)
        return loss

    def _logits(self, ids: Tensor, asked: Tensor) -> Tensor:
        logits = cast(Any, self.backbone)(input_ids=ids, use_cache=False).logits
        return cast(Tensor, logits[:, :-1][asked].float())

    @contextmanager
    def projected(self, projections: MatryoshkaProjections, masks: Tensor) -> Iterator[None]:
        """Inside, the backbone attends through the projections, as the truncated cache would have it."""
        bases = projections()
        probes = {
            site.module: projecting_probe(site, bases[i], projections.means[i], masks[i])
            for i, site in enumerate(self.sites)
        }
        with probing(self.backbone, probes):
            yield

    # Ranks and export.

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `sample_every` updates: the divergence at some ranks."""
        every = self.settings.trainer.sample_every
        if every and self.steps_done % every == 0:
            with self.consolidated(), self.evaluating():
                size, measure = self.learned.head_dim, self._divergence()
                for eighths in _WATCHED:
                    rank = max(self.interval, size * eighths // 8 // self.interval * self.interval)
                    self.note(**{f"kl_at_{rank}": torch.tensor(measure(torch.full(self.shape[:3], rank)))})

    def on_train_end(self) -> None:
        """Where only all ranks can run the backbone, they search the ranks while they are all there."""
        super().on_train_end()
        if not self.backbone_is_whole:
            with self.consolidated():
                self.tables()

    def tables(self) -> dict[str, Any]:
        """Ranks by budget, of the present weights."""
        if self._tables is None or self._tables[0] != self.steps_done:
            settings = self.settings.module
            with self.evaluating():
                found = search_ranks(
                    self._divergence(),
                    cast(Any, self.shape[:3]),
                    self.learned.head_dim,
                    self.interval,
                    settings.budgets,
                    settings.search,
                    refine=settings.refine,
                )
            self._tables = self.steps_done, {f"{budget:g}": ranks.tolist() for budget, ranks in found.items()}
        return self._tables[1]

    def _divergence(self) -> Any:
        """Measures ranks [L, 2, H] by the divergence on fixed rows from full rank, with LoRA where there is any."""
        projections = cast(MatryoshkaProjections, self.exported)
        count = min(self.settings.module.search_rows, len(self.source))
        size = min(_TOGETHER, self.settings.data.batch_size)
        rows = [self.source.rows(part) for part in torch.arange(count).split(size)]
        batches = [(one.input_ids.to(self.device), one.labels.to(self.device)) for one in rows]
        teachers: list[Tensor] = []
        return partial(self._measured, projections, batches, teachers)

    @torch.no_grad()
    def _measured(
        self, projections: MatryoshkaProjections, batches: list[Batch], teachers: list[Tensor], ranks: Tensor
    ) -> float:
        total, count = 0.0, 0
        if not teachers:
            with attending(self.backbone):
                asked = [labels[:, 1:] != IGNORED for _, labels in batches]
                pairs = zip(batches, asked, strict=True)
                teachers += [functional.log_softmax(self._logits(ids, places), -1) for (ids, _), places in pairs]
        masks = rank_masks(ranks.to(self.device), projections.head_dim)
        for (ids, labels), teacher in zip(batches, teachers, strict=True):
            with self.projected(projections, masks):
                own = functional.log_softmax(self._logits(ids, labels[:, 1:] != IGNORED), -1)
            total += float(functional.kl_div(own, teacher, reduction="sum", log_target=True))
            count += len(teacher)
        return total / count

    def config(self) -> MatryoshkaConfig:
        """What the adapter stores, the ranks included."""
        layers, _, heads, size = self.shape
        ropes = cast(Any, self.backbone).config.get_text_config(decoder=True).rope_parameters or {}
        return MatryoshkaConfig(
            num_layers=layers,
            kv_heads=heads,
            head_dim=size,
            interval=self.interval,
            budget=f"{self.settings.module.budget:g}",
            ranks=self.tables(),
            rope=str(ropes.get("rope_type", "default")),
            lora=self.settings.lora.entry(),
        )

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Orthogonal matrices in float32, not what they are made of; means, the variances along PCA's columns, LoRA."""
        projections = cast(MatryoshkaProjections, self.exported)
        bases = projections()
        named = {
            "keys": bases[:, 0],
            "values": bases[:, 1],
            "means": projections.means,
            "spectra": projections.spectra,
            "pca_keys": projections.start[:, 0],
            "pca_values": projections.start[:, 1],
            "pca_means": projections.start_means,
        }
        named |= self.lora_tensors()
        return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}

    def export_adapter(self, folder: Path) -> None:
        """Bases, means, the tables of ranks, and LoRA where it was trained."""
        write_task_adapter(self, folder, asdict(self.config()), self.tensors())
