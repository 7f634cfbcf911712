"""Which ranks to take under a budget: greedy searches over what each cut does to the model's predictions."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Measure = Callable[[Tensor], float]
"""Ranks int64 [L, 2, H] -> divergence of the model's predictions from those at full rank."""
Strategy = Literal["curves", "batched", "exact"]


def search_ranks(
    measure: Measure,
    shape: tuple[int, int, int],
    size: int,
    interval: int,
    budgets: Sequence[float],
    strategy: Strategy = "curves",
    per_round: float = 0.05,
    refine: int = 0,
) -> dict[float, Tensor]:
    """Ranks [L, 2, H] for every budget, multiples of `interval` and at least one.

    `exact` lowers one rank at a time, the one that hurts least, each measured anew beside what is lowered already.
    `batched` lowers the best few per round.  `curves` measures every rank of every unit once with all others full, and
    adds up: L 2 H (d / interval - 1) calls of `measure`, whatever the budgets.

    Args:
        shape: (L, 2, H); a unit is the keys or the values of one KV head.
        size: d.
        budgets: mean ranks, as shares of d.
        per_round: share of the units that `batched` lowers at a time.
        refine: sweeps over the ranks of every budget that trade steps between units while the divergence falls; one
            takes two calls per unit and a few more.
    Raises:
        ValueError: a budget below one interval, or above 1.
    Source: Lin et al. 2024, appendix; `curves` and `batched` are ours, for the published search takes thousands of
        calls per rank.
    """
    if wrong := [budget for budget in budgets if not interval / size <= budget <= 1]:
        raise ValueError(f"the budget {wrong[0]:g} is outside {interval / size:g} (one interval everywhere) and 1")
    full = torch.full(shape, size)
    if strategy == "curves":
        found = _by_curves(measure, full, interval, budgets)
    else:
        count = 1 if strategy == "exact" else max(1, round(per_round * full.numel()))
        found = _by_rounds(measure, full, interval, budgets, count)
    return {budget: _refined(measure, ranks, size, interval, refine) for budget, ranks in found.items()}


def _by_rounds(
    measure: Measure, full: Tensor, interval: int, budgets: Sequence[float], count: int
) -> dict[float, Tensor]:
    size, found, ranks = int(full.flatten()[0]), {}, full
    for budget in sorted(budgets, reverse=True):
        while (over := _steps_over(ranks, size, interval, budget)) > 0:
            ranks = _lowered(measure, ranks, interval, min(count, over))
        found[budget] = ranks
    return found


def _steps_over(ranks: Tensor, size: int, interval: int, budget: float) -> int:
    """How many single cuts are missing until the mean is within the budget."""
    excess = int(ranks.sum()) - budget * ranks.numel() * size
    return max(0, -int(-(excess - 1e-9) // interval))


def _lowered(measure: Measure, ranks: Tensor, interval: int, count: int) -> Tensor:
    """The `count` cuts that hurt least, each measured by itself, made together."""
    costs = []
    for unit in range(ranks.numel()):
        if ranks.flatten()[unit] > interval:
            costs.append((measure(_cut(ranks, [unit], interval)), unit))
    return _cut(ranks, [unit for _, unit in sorted(costs)[:count]], interval)


def _cut(ranks: Tensor, units: Sequence[int], interval: int) -> Tensor:
    lower = ranks.clone()
    lower.view(-1)[list(units)] -= interval
    return lower


def _refined(measure: Measure, ranks: Tensor, size: int, interval: int, sweeps: int) -> Tensor:
    """The ranks after trades of one step: as many as seem to pay by themselves, or half of them until they do pay."""
    best = measure(ranks) if sweeps else 0.0
    for _ in range(sweeps):
        flat = ranks.flatten().tolist()
        losses = [(measure(_cut(ranks, [unit], interval)) - best, unit) for unit, r in enumerate(flat) if r > interval]
        gains = [(best - measure(_cut(ranks, [unit], -interval)), unit) for unit, r in enumerate(flat) if r < size]
        pairs = _trades(sorted(losses), sorted(gains, reverse=True))
        while pairs:
            trial = _cut(_cut(ranks, [giver for giver, _ in pairs], interval), [taker for _, taker in pairs], -interval)
            if (found := measure(trial)) < best:
                ranks, best = trial, found
                break
            pairs = pairs[: len(pairs) // 2]
        if not pairs:
            break
    return ranks


def _trades(losses: Sequence[tuple[float, int]], gains: Sequence[tuple[float, int]]) -> list[tuple[int, int]]:
    """(giver, taker) pairs of different units, best first, that gain more than they lose."""
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    takers = iter(gains)
    for loss, giver in losses:
        if giver in used:
            continue
        taker = next(((gain, unit) for gain, unit in takers if unit not in used and unit != giver), None)
        if taker is None or taker[0] <= loss:
            break
        pairs.append((giver, taker[1]))
        used |= {giver, taker[1]}
    return pairs


def _by_curves(measure: Measure, full: Tensor, interval: int, budgets: Sequence[float]) -> dict[float, Tensor]:
    size, steps = int(full.flatten()[0]), int(full.flatten()[0]) // interval
    curves = []
    for unit in range(full.numel()):
        costs = [0.0] + [measure(_cut(full, [unit], interval * step)) for step in range(1, steps)]
        # A smaller rank is never better: what looks so is noise.
        curves.append(torch.tensor(costs).cummax(0).values.tolist())
    heap = [(curve[1] - curve[0], unit) for unit, curve in enumerate(curves) if steps > 1]
    heapq.heapify(heap)
    found, ranks, done = {}, full, [0] * full.numel()
    for budget in sorted(budgets, reverse=True):
        while _steps_over(ranks, size, interval, budget) > 0:
            _, unit = heapq.heappop(heap)
            done[unit] += 1
            ranks = _cut(ranks, [unit], interval)
            if done[unit] + 1 < steps:
                curve = curves[unit]
                heapq.heappush(heap, (curve[done[unit] + 1] - curve[done[unit]], unit))
        found[budget] = ranks
    return found
