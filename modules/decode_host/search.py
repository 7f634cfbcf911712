"""Which tree to draft: the nodes whose guesses are right most often, and how many of them pay."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from modules.contracts import Drafter
from modules.decode_host.backbone import Backbone, stepping
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.rules import Exact
from modules.decode_host.tree import Choice, Tree, order_choices
from modules.decode_host.verify import Verifier

_TIE = 0.03


def accuracy(hits: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[float]]:
    """Share of right guesses by head and rank, from hits [K][R] and how often each head was compared [K]."""
    return [[hit / max(count, 1) for hit in row] for row, count in zip(hits, counts, strict=True)]


def best_choices(chances: Sequence[Sequence[float]], nodes: int) -> list[tuple[Choice, float]]:
    """The `nodes` choices that add most to the expected tokens per step, best first, with what each adds.

    A choice (c_1, .., c_m) takes guess c_i of head i and adds the product of their chances, heads taken as
    independent.  All beginnings of the list are optimal trees; it is shorter where there are no more choices.

    Args:
        chances: by head and rank, how probable the guess is to be right; in any order within a head.
    """
    # Sorted by chance, no choice is better than its parent or its sibling before it, so a heap meets the best first.
    order = [[rank for _, rank in sorted((-chance, rank) for rank, chance in enumerate(row))] for row in chances]
    found: list[tuple[Choice, float]] = []
    heap: list[tuple[float, int, tuple[int, ...], float]] = []

    def push(places: tuple[int, ...], above: float) -> None:
        head = len(places) - 1
        if head < len(order) and places[-1] < len(order[head]):
            value = above * chances[head][order[head][places[-1]]]
            heapq.heappush(heap, (-value, len(places), places, above))

    push((0,), 1.0)
    while heap and len(found) < nodes:
        negative, _, places, above = heapq.heappop(heap)
        found.append((tuple(order[head][place] for head, place in enumerate(places)), -negative))
        push((*places[:-1], places[-1] + 1), above)
        push((*places, 0), -negative)
    return found


def expected_tokens(chances: Sequence[Sequence[float]], choices: Sequence[Choice]) -> float:
    """Expected tokens per step of a tree, heads taken as independent."""
    return 1.0 + sum(float(np.prod([chances[head][rank] for head, rank in enumerate(c)])) for c in choices)


def draft_by_chance(tokens: Tensor, chances: Tensor, nodes: int) -> Draft:
    """A tree of its own for each sequence: the `nodes` choices that this step's chances make the best.

    Args:
        tokens, chances: [B, K, R], the guesses of each head and their probabilities.
    """
    trees, drafted, sure = [], [], []
    for guesses, row in zip(tokens.tolist(), chances.tolist(), strict=True):
        value = dict(best_choices(row, nodes))
        ordered = order_choices(value)
        trees.append(Tree.from_choices(ordered))
        drafted.append([guesses[len(choice) - 1][choice[-1]] for choice in ordered])
        sure.append([value[choice] for choice in ordered])
    return Draft(trees[0] if len(trees) == 1 else tuple(trees), tokens.new_tensor(drafted), sure)


def fastest(tokens: Sequence[float], seconds: Sequence[float]) -> int:
    """Which of several trees gives most tokens per second, by the tokens and seconds of its step.

    Of those that timing does not tell from the best one (`_TIE`) the one with most tokens: the optimum is flat, and
    calls saved are worth more wherever a call is dearer than in the measurement.
    """
    rates = [each / time for each, time in zip(tokens, seconds, strict=True)]
    level = [index for index, rate in enumerate(rates) if rate >= (1 - _TIE) * max(rates)]
    return max(level, key=lambda index: tokens[index])


@torch.no_grad()
def time_steps(
    model: Any,
    rows: Sequence[int],
    context: int = 256,
    repeats: int = 15,
    drafter: Drafter | Mapping[int, Drafter] | None = None,
) -> dict[int, float]:
    """Seconds of one decoding step by rows of the tree, the root among them: median of interleaved repeats.

    A step is what decoding does: drafting (where a drafter is given), backbone call, verification and commit.

    Args:
        drafter: whose time counts, one for all or by rows.
        context: committed tokens behind which the steps run.
    """
    device = model.device
    ids = torch.arange(context, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    drafters = drafter if isinstance(drafter, Mapping) else {n: drafter for n in rows if drafter is not None}
    layers = next((one.hidden_layers for one in drafters.values() if one.hidden_layers), ())
    backbone = Backbone(model, any(one.needs_hidden for one in drafters.values()), layers)
    verifier = Verifier(Exact(), [], 1, keep_scores=False)
    config = GenerationConfig(max_length=context + max(rows) + 2)
    config._mask_length = context
    inputs = {"past_key_values": DynamicCache(), "position_ids": torch.arange(context, device=device)[None]}
    trees = {n: Tree(tuple((node - 1) // 2 if node else -1 for node in range(n))) for n in rows}
    times: dict[int, list[float]] = {n: [] for n in rows}
    with backbone.decoding(), ExitStack() as steps:
        backbone.prefill(ids, config, {**inputs, "use_cache": True})
        state = DraftState(ids.tolist(), ids[:, -1], _last(backbone.hidden), [True], max(rows))
        for one in dict.fromkeys(drafters.values()):
            one.begin(state.rows)
        steps.enter_context(stepping())
        for _ in range(repeats + 1):
            for n, tree in trees.items():
                path = tree.paths[-1][:: max(1, tree.depth)]  # the root and the last node, whose rows move
                tokens, tables = ids[:, -1:].repeat(1, n), tree.tables(device)
                start = _now(device)
                if n in drafters:
                    drafters[n].propose(state)
                logits = backbone(tokens, tables)
                verifier(logits, tokens, [tree], tables, lambda row: ids, [True])
                backbone.commit([path], [True])
                times[n].append(_now(device) - start)
                backbone.rewind(len(path))
    return {n: median(seconds[1:]) for n, seconds in times.items()}


def _last(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else hidden[:, -1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
