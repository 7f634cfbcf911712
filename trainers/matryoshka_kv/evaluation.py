"""What a MatryoshkaKV adapter is measured against: the full cache, and PCA at the same widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from modules.kv_host import attach_cache, attention_sites
from modules.kv_host.projection import ProjectionCodec, uniform_ranks
from trainers.evaluation import Measured, Request
from trainers.kv_cases import CacheCase, Reader
from trainers.kv_evaluation import Load, measure_adapter
from trainers.kv_rivals import HandleReader


def measure(request: Request) -> Measured:
    """See `trainers.kv_evaluation.measure_adapter`; the budget that is judged is the adapter's own."""
    entry = request.manifest.module
    lora = entry.get("lora") is not None
    budgets = [entry["budget"], *sorted((name for name in entry["ranks"] if name != entry["budget"]), key=float)]
    found = measure_adapter(
        request,
        partial(_own_cases, budgets, entry["head_dim"], lora),
        partial(_rival_cases, budgets, entry["head_dim"]),
    )
    if not lora:
        return found
    changed = f"{found.facts['reference']}; the adapter's LoRA changes the model itself, by itself at full width"
    return replace(found, facts=found.facts | {"reference": changed})


def _own_cases(budgets: list[str], size: int, lora: bool, load: Load, tensors: dict[str, Tensor]) -> list[CacheCase]:
    searched = [
        CacheCase(
            name=f"MatryoshkaKV, {budget}",
            kind="adapter",
            enter=partial(_stored, load, budget),
            group="MatryoshkaKV",
            share=float(budget),
        )
        for budget in budgets
    ]
    uniform = [
        CacheCase(
            name=f"MatryoshkaKV, {budget} everywhere",
            kind="adapter",
            enter=partial(_uniform, load, round(float(budget) * size)),
            group="MatryoshkaKV everywhere",
            share=float(budget),
        )
        for budget in budgets
    ]
    # What LoRA does to the model, with nothing taken from its cache.
    whole = [CacheCase(name="LoRA, full width", kind="adapter", enter=partial(_stored, load, "full"))] if lora else []
    return [*searched, *uniform, *whole]


def _rival_cases(budgets: list[str], size: int, model: Any, tensors: dict[str, Tensor]) -> list[CacheCase]:
    return [
        CacheCase(
            name=f"PCA, {budget}",
            kind="untrained",
            enter=partial(_principal, model, tensors, round(float(budget) * size)),
            group="PCA",
            share=float(budget),
        )
        for budget in budgets
    ]


@contextmanager
def _stored(load: Load, budget: str, context: int) -> Iterator[Reader]:
    with load() as handle:
        handle.use_budget(budget)
        yield HandleReader(handle)


@contextmanager
def _uniform(load: Load, rank: int, context: int) -> Iterator[Reader]:
    with load() as handle:
        handle.projections.use(uniform_ranks(handle.host.sites, rank))
        yield HandleReader(handle)


@contextmanager
def _principal(model: Any, tensors: dict[str, Tensor], rank: int, context: int) -> Iterator[Reader]:
    keys, values, means = (tensors[name].to(model.device) for name in ("pca_keys", "pca_values", "pca_means"))
    codec = ProjectionCodec(keys, values, means, uniform_ranks(attention_sites(model), rank))
    with attach_cache(model, codec=codec) as handle:
        yield HandleReader(handle)
