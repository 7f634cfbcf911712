"""Ranks under a budget, and what training does on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.kv_host import attach_cache
from modules.kv_host.projection import ProjectionCodec, uniform_ranks
from modules.language_models import load_model
from modules.matryoshka_kv import search_ranks
from tests.tiny_kv import save_tiny, tiny_recipe
from trainers.contexts import held_out_rows
from trainers.kv_cases import CacheCase, quality_of
from trainers.kv_rivals import HandleReader
from trainers.recipes import compose_recipe
from trainers.run_folder import RunFolder
from trainers.training import build_task, train


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_task(tiny_recipe("matryoshka_kv", save_tiny(tmp_path_factory.mktemp("tiny"))))


def costs(ranks: Tensor) -> float:
    """A made-up divergence: every unit hurts in its own way."""
    weights = torch.tensor([1.0, 5.0, 2.0, 0.1, 3.0, 1.5, 0.3, 8.0]).reshape(2, 2, 2)
    return float((weights * (1 - ranks / 16.0) ** 2).sum())


@pytest.mark.parametrize("strategy", ["curves", "batched", "exact"])
def test_ranks_are_within_the_budget_and_no_lower(strategy: Any) -> None:
    for budget, ranks in search_ranks(costs, (2, 2, 2), 16, 2, [0.75, 0.5, 0.375, 0.125], strategy).items():
        mean = float(ranks.float().mean()) / 16
        assert budget - 2 / 16 / 8 < mean <= budget
        assert ranks.min() >= 2 and ranks.max() <= 16 and bool((ranks % 2 == 0).all())
        assert costs(ranks) <= costs(torch.full((2, 2, 2), round(budget * 16) // 2 * 2)) + 1e-9


def test_the_exact_search_takes_the_best_cut_at_each_step() -> None:
    ranks = torch.full((2, 2, 2), 16)
    for _ in range(20):
        trials = []
        for unit in range(8):
            trial = ranks.clone()
            trial.view(-1)[unit] -= 2
            if trial.min() >= 2:
                trials.append((costs(trial), unit, trial))
        ranks = min(trials, key=lambda one: one[:2])[2]
    budget = float(ranks.float().mean()) / 16
    assert torch.equal(search_ranks(costs, (2, 2, 2), 16, 2, [budget], "exact")[budget], ranks)


def coupled(ranks: Tensor) -> float:
    """A divergence that no unit tells by itself: the first two hurt only where both are narrow."""
    missing = (1 - ranks.flatten() / 16.0).clamp(min=0)
    return float((missing[2:] ** 2).sum() + 40 * missing[0] * missing[1])


@pytest.mark.parametrize("strategy", ["curves", "exact"])
def test_refining_trades_steps_where_the_search_was_blind(strategy: Any) -> None:
    budgets, calls = [0.75, 0.5], []

    def counted(ranks: Tensor) -> float:
        calls.append(ranks)
        return coupled(ranks)

    plain = search_ranks(coupled, (2, 2, 2), 16, 2, budgets, strategy)
    found = search_ranks(counted, (2, 2, 2), 16, 2, budgets, strategy, refine=9)
    for budget in budgets:
        assert int(found[budget].sum()) == int(plain[budget].sum())
        assert found[budget].min() >= 2 and found[budget].max() <= 16
        assert coupled(found[budget]) <= coupled(plain[budget])
    if strategy == "curves":  # which took both of the first two for free
        assert coupled(found[0.5]) < 0.6 * coupled(plain[0.5])
    before = len(calls)
    search_ranks(counted, (2, 2, 2), 16, 2, [0.5], "curves", refine=1)
    assert len(calls) - before <= 8 * 7 + 1 + 2 * 8 + 3  # one sweep: both neighbours of every unit, and a few trades


def test_curves_are_measured_once_and_searched_ranks_are_no_worse(task: Any) -> None:
    calls = []

    def counted(ranks: Tensor) -> float:
        calls.append(ranks)
        return costs(ranks)

    search_ranks(counted, (2, 2, 2), 16, 2, [0.5, 0.25], "curves")
    assert len(calls) == 8 * 7
    measure = task._divergence()
    found = search_ranks(measure, task.shape[:3], 8, 2, [0.5])[0.5]
    assert measure(found) <= measure(torch.full(task.shape[:3], 4)) * 1.05
    with pytest.raises(ValueError, match="one interval everywhere"):
        search_ranks(costs, (2, 2, 2), 16, 2, [0.1])


# On the embedded model.


def test_a_random_start_stays_behind_principal_directions(tmp_path: Path) -> None:
    """At equal steps: a start that is silently not PCA would still train."""
    changes = {"data.length": "96", "data.shortest": "null", "trainer.max_steps": "40", "logger": "none"}
    found = []
    for start in ("principal", "random"):
        task = build_task(compose_recipe("matryoshka_kv_needle", changes))
        if start == "random":
            bases = torch.randn(task.learned.start.shape, generator=torch.Generator().manual_seed(0))
            task.learned.start.copy_(torch.linalg.qr(bases)[0])
        train(task, RunFolder(tmp_path / start))
        measure = task._divergence()
        found.append([measure(torch.full(task.shape[:3], rank)) for rank in (6, 8, 12)])
    assert all(random > 1.5 * principal for principal, random in zip(*found, strict=True))


@pytest.mark.slow
def test_training_helps_where_pca_fails(tmp_path: Path) -> None:
    changes = {"data.length": "256", "data.shortest": "null", "data.batch_size": "16"}
    task = build_task(compose_recipe("matryoshka_kv_needle", {"trainer.max_steps": "300", "logger": "none", **changes}))
    train(task, RunFolder(tmp_path))
    tensors, ranks = task.tensors(), uniform_ranks(task.sites, 6)  # 37.5 %
    model, tokenizer = load_model("embedded:needle")
    rows = held_out_rows("needle", tokenizer, 512, 64, 16, seed=1234)
    found = []
    for names in (("keys", "values", "means"), ("pca_keys", "pca_values", "pca_means")):
        codec = ProjectionCodec(*(tensors[name] for name in names), ranks)

        @contextmanager
        def enter(context: int, codec: ProjectionCodec = codec) -> Iterator[Any]:
            with attach_cache(model, codec=codec) as handle:
                yield HandleReader(handle)

        found.append(quality_of(model, CacheCase(name="", kind="adapter", enter=enter), rows).accuracy)
    assert found[0] >= found[1] + 0.15
    searched = search_ranks(task._divergence(), task.shape[:3], 16, 2, [0.375])[0.375]
    measure = partial(task._measured, task.learned, [(one.input_ids, one.labels) for one in rows[:2]], [])
    assert measure(searched) <= measure(torch.full(task.shape[:3], 6))  # on rows that neither has seen
