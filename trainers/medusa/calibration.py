"""How often the heads are right along the backbone's own decode, and which tree that makes the best."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from modules.decode_host.search import best_choices, expected_tokens, fastest, time_steps
from modules.medusa import MedusaConfig, MedusaDrafter, StackedHeads
from modules.medusa.output_layer import features

# Of a step, the root among them.  Matrix products take whole fours or eights of rows: seven cost more than eight.
_ROWS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)
_QUICK, _CLOSE, _HOPE = 5, 40, 0.85  # repeats of a look, and the share of the best rate that leads to the second
_POSITIONS = 32  # states whose guesses are made at a time


@dataclass(frozen=True)
class Text:
    """A prompt and what the backbone went on with.  `ids` holds both, `prompt` says how many are the prompt's."""

    ids: tuple[int, ...]
    prompt: int


@torch.no_grad()
def greedy_texts(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int, pad: int
) -> list[Text]:
    """The backbone's own greedy continuations, up to and with the end token.

    Args:
        prompts: token ids, each at least one.
        batch_size: prompts at a time; they are padded on the left.
    """
    texts = []
    for start in range(0, len(prompts), batch_size):
        part = [list(prompt) for prompt in prompts[start : start + batch_size]]
        longest = max(map(len, part))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
        )
        ends = _ends(model)
        for prompt, row in zip(part, output[:, longest:].tolist(), strict=True):
            stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            texts.append(Text((*prompt, *row[:stop]), len(prompt)))
    return texts


def _ends(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


@torch.no_grad()
def count_hits(model: Any, heads: StackedHeads, texts: Sequence[Text], ranks: int) -> tuple[list[list[int]], list[int]]:
    """(hits [K][R], counts [K]): how often rank r of head k was the token that came, among so many comparisons.

    The states are those that decoding would have had: the last of the prompt, and every one after it.
    """
    hits = torch.zeros(heads.count, ranks, dtype=torch.int64, device=model.device)
    counts = [0] * heads.count
    for text in texts:
        ids = torch.tensor([text.ids], device=model.device)
        states_TD = features(model, heads.layers, input_ids=ids, use_cache=False)[0, text.prompt - 1 : -2]
        # Heads that read the path are asked below the path that came: their hits are shares of right parents.
        after = functional.pad(ids[0, text.prompt :], (0, heads.count)).unfold(0, heads.count, 1)[: len(states_TD)]
        came = ids[0, text.prompt + 1 :]  # came[t + k] is what head k guesses at state t
        for start in range(0, len(states_TD), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            guesses_KTR = heads.tokens(states_TD[part], ranks, path_BR=after[part])
            for head in range(heads.count):
                true = came[start + head : start + head + guesses_KTR.shape[1]]
                hits[head] += (guesses_KTR[head, : len(true)] == true[:, None]).sum(0)
                counts[head] += len(true)
    return hits.tolist(), counts


def best_tree(accuracy: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """The tree of so many nodes that promises the most tokens per step; guesses that never hit are left out."""
    return [list(choice) for choice, value in best_choices(accuracy, nodes) if value > 0]


def fastest_tree(model: Any, heads: StackedHeads, accuracy: Sequence[Sequence[float]]) -> list[list[int]]:
    """The tree that promises the most tokens per second here: by the measured time of a step with just this tree.

    Heads that run one after the other cost time by the tree's depth, so that is chosen along.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    context = max(1, min(256, limit - _ROWS[-1] - 1))
    depths = range(1 if heads.by_path else len(accuracy), len(accuracy) + 1)
    trees = {(depth, rows): best_tree(accuracy[:depth], rows - 1) for depth in depths for rows in _ROWS}
    tokens = {
        place: expected_tokens(accuracy, [tuple(choice) for choice in tree])
        for place, tree in trees.items()
        if len(tree) == place[1] - 1 and (len(depths) == 1 or place[0] == max(map(len, tree), default=1))
    }
    drafters = {place: MedusaDrafter(heads, trees[place]) for place in tokens}

    def steps(places: Collection[tuple[int, int]], repeats: int) -> dict[tuple[int, int], float]:
        """In plain steps of the same minute, since a machine has better and worse ones."""
        took: dict[tuple[int, int], float] = {}
        for depth in sorted({depth for depth, _ in places}):
            own = {rows: drafters[depth, rows] for at, rows in places if at == depth}
            seconds = time_steps(model, sorted({1, *own}), context=context, repeats=repeats, drafter=own)
            took |= {(depth, rows): seconds[rows] / seconds[1] for rows in own}
        return took

    # Only those that a quick look does not rule out are looked at closely.
    quick = steps(tokens, _QUICK)
    rate = {place: tokens[place] / took for place, took in quick.items()}
    close = steps([place for place in rate if rate[place] >= _HOPE * max(rate.values())], _CLOSE)
    places = list(close)
    return trees[places[fastest([tokens[place] for place in places], list(close.values()))]]


def calibrated(
    model: Any, heads: StackedHeads, config: MedusaConfig, texts: Sequence[Text], ranks: int, nodes: int | str
) -> MedusaConfig:
    """The config with hits and counts of these heads, and with their best tree.

    Args:
        texts: the backbone's own, see `greedy_texts`.
        ranks: guesses of each head that are counted.
        nodes: of the tree, or "measured" for as many as pay on this device.
    """
    hits, counts = count_hits(model, heads, texts, min(ranks, config.output_size))
    counted = replace(config, hits=hits, counts=counts)
    accuracy = counted.accuracy()
    tree = fastest_tree(model, heads, accuracy) if isinstance(nodes, str) else best_tree(accuracy, nodes)
    return replace(counted, tree=tree)
