"""Medusa as a drafter: a fixed tree over the heads' best guesses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, Tree, order_choices
from modules.decode_host.search import draft_by_chance
from modules.decode_host.tree import Choice
from modules.medusa.config import MedusaConfig
from modules.medusa.stacked import StackedHeads

_WIDTH = 4  # nodes of a depth that a tree of the step's own goes on from


class MedusaDrafter(Drafter):
    """The heads' best guesses in a tree that is the same at every step, so that every shape is fixed.

    Source: Cai et al. 2024, arXiv:2401.10774.  Departs from it: heads run on the one state that is needed, the deeper
    ones only if the tree is that deep, and the tree is the optimum for the calibration's counts.
    """

    def __init__(self, heads: StackedHeads, choices: Sequence[Sequence[int]], accuracy: Sequence[Sequence[float]] = ()):
        """
        Args:
            choices: nodes below the root, each as the ranks (from 0) that lead to it; none is plain decoding.
            accuracy: [k][r], for the nodes' chances; empty if it is not known.
        Raises:
            ValueError: a node without its parent, deeper than there are heads, or of a rank that no head has.
        """
        self.heads, self._accuracy, self.hidden_layers = heads, accuracy, heads.layers
        self.use_tree(choices)

    @classmethod
    def of(cls, heads: StackedHeads, config: MedusaConfig) -> MedusaDrafter:
        """The drafter of an adapter."""
        return cls(heads, config.tree, config.accuracy())

    def use_tree(self, choices: Sequence[Sequence[int]]) -> None:
        """Draft another tree from now on; see `__init__`."""
        heads, ordered = self.heads, order_choices(choices)
        if ordered and len(ordered[-1]) > heads.count:
            raise ValueError(f"the tree is {len(ordered[-1])} deep but there are {heads.count} heads")
        tree, ranks = Tree.from_choices(ordered), 1 + max((max(choice) for choice in ordered), default=0)
        if ranks > heads.size:
            raise ValueError(f"the tree asks for rank {ranks} but a head tells {heads.size} tokens apart")
        place = [(len(choice) - 1) * ranks + choice[-1] for choice in ordered]
        self._place_N = torch.tensor(place, dtype=torch.int64, device=heads.device)
        self._levels = _levels(ordered, heads.device) if heads.by_path else []
        self.choices, self.tree, self._ranks = ordered, tree, ranks
        self._chance = _chances(ordered, self._accuracy)

    def propose(self, state: DraftState) -> Draft:
        """The tree's tokens, without waiting for the device."""
        if not self.choices:
            return Draft(self.tree, state.root.new_empty(len(state.root), 0))
        hidden = cast(Tensor, state.hidden)
        chance = None if self._chance is None else [self._chance] * len(hidden)
        if self._levels:
            return Draft(self.tree, self._by_path(hidden, state.root), chance)
        tokens_KBR = self.heads.tokens(hidden, self._ranks, slice(self.tree.depth), state.root[:, None])
        tokens_BN = tokens_KBR.transpose(0, 1).reshape(len(hidden), -1).index_select(1, self._place_N)
        return Draft(self.tree, tokens_BN, chance)

    def _by_path(self, hidden_BD: Tensor, root_B: Tensor) -> Tensor:
        """The tree's tokens [B, N], depth after depth: guesses below all nodes that have children."""
        B, found = len(hidden_BD), []
        states, tokens = self.heads.enter(hidden_BD)[None], root_B
        for level in self._levels:
            states = self.heads.advance(states, tokens)
            guesses = self.heads.guesses(states, level.ranks)
            drafted_BC = guesses.view(B, -1).index_select(1, level.children)
            found.append(drafted_BC)
            if len(level.parents):
                tokens = drafted_BC.index_select(1, level.parents).flatten()
                states = states.view(B, -1, states.shape[-1]).index_select(1, level.above).flatten(0, 1)[None]
        return torch.cat(found, dim=1)

    def memory_bytes(self) -> int:
        """Bytes of the heads."""
        return self.heads.memory_bytes()


class DynamicMedusaDrafter(Drafter):
    """Another tree at every step: the nodes that this step's own probabilities make the best.

    Reads the probabilities back from the device at every step, which the fixed tree does not.  Heads that read the path
    guess below the `_WIDTH` most probable nodes of every depth (as EAGLE-2 does, Li et al. 2024, arXiv:2406.16858).
    """

    def __init__(self, heads: StackedHeads, nodes: int, ranks: int) -> None:
        """`nodes`: below the root.  `ranks`: guesses of each head that may be drafted."""
        self.heads, self.nodes, self.ranks, self.hidden_layers = heads, nodes, ranks, heads.layers

    def propose(self, state: DraftState) -> Draft:
        """The best nodes of this step."""
        hidden = cast(Tensor, state.hidden)
        if self.heads.by_path:
            return self._by_path(hidden, state.root)
        chances_KBR, tokens_KBR = self.heads.top(hidden, self.ranks, path_BR=state.root[:, None])
        return draft_by_chance(tokens_KBR.transpose(0, 1), chances_KBR.exp().transpose(0, 1), self.nodes)

    def _by_path(self, hidden_BD: Tensor, root_B: Tensor) -> Draft:
        """Guesses of every depth below the most probable guesses of the depth before it."""
        states = self.heads.enter(hidden_BD)[None]
        _, B, D = states.shape
        tokens_BM, sure_BM = root_B[:, None], states.new_zeros(B, 1, dtype=torch.float32)
        depths: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.heads.count):
            states = self.heads.advance(states, tokens_BM.flatten())
            logs, tokens = (part.view(B, -1, self.ranks) for part in self.heads.sure_guesses(states, self.ranks))
            sure_BC, place = (logs + sure_BM[:, :, None]).flatten(1).sort(dim=1, descending=True)
            sure_BC, place = sure_BC[:, : self.nodes], place[:, : self.nodes]
            above_BC, tokens_BC = place // self.ranks, tokens.flatten(1).gather(1, place)
            depths.append((tokens_BC, sure_BC, above_BC))
            tokens_BM, sure_BM, parent = tokens_BC[:, :_WIDTH], sure_BC[:, :_WIDTH], above_BC[:, :_WIDTH, None]
            states = states.view(B, -1, D).gather(1, parent.expand(-1, -1, D)).flatten(0, 1)[None]
        # To the host once: float64 holds token ids and float32 exactly.
        columns = [torch.cat(each, dim=1).double() for each in zip(*depths, strict=True)]
        return _most_probable(torch.stack(columns, dim=1).tolist(), [part[0].shape[1] for part in depths], self.nodes)

    def memory_bytes(self) -> int:
        """Bytes of the heads."""
        return self.heads.memory_bytes()


def _most_probable(told: Sequence[Sequence[Sequence[float]]], sizes: Sequence[int], nodes: int) -> Draft:
    """The most probable guesses of each sequence as its tree.

    Args:
        told: of each sequence (tokens, log-probabilities, places of the parents among the depth before), depth after
            depth, of which `sizes` says how many guesses each has.
    """
    start = [sum(sizes[:depth]) for depth in range(len(sizes))]
    depth_of = [depth for depth, size in enumerate(sizes) for _ in range(size)]
    trees, drafted, sure = [], [], []
    for tokens, logs, parents in told:
        # A parent comes before its children, so that of equal chances it is taken first.
        kept = sorted(sorted(range(len(logs)), key=lambda guess: -logs[guess])[:nodes])
        node = {guess: number for number, guess in enumerate(kept, start=1)}
        above = [node[start[depth - 1] + int(parents[g])] if (depth := depth_of[g]) else 0 for g in kept]
        trees.append(Tree.of((-1, *above)))
        drafted.append([int(tokens[guess]) for guess in kept])
        sure.append([math.exp(logs[guess]) for guess in kept])
    return Draft(trees[0] if len(trees) == 1 else tuple(trees), torch.tensor(drafted), sure)


@dataclass(frozen=True)
class _Level:
    """One depth of a tree drafted a head after the other; the nodes above it that have children are its parents.

    Attributes:
        ranks: guesses that the head makes below every parent.
        children: among these guesses, parent after parent, the nodes of this depth.
        parents, above: among the nodes of this depth, those that have children; and their own parents.
    """

    ranks: int
    children: Tensor
    parents: Tensor
    above: Tensor


def _levels(ordered: Sequence[Choice], device: torch.device) -> list[_Level]:
    """The depths of a tree's choices, which are in the order of its nodes."""
    levels: list[_Level] = []
    parents: list[Choice] = [()]
    for depth in range(1, len(ordered[-1]) + 1 if ordered else 1):
        nodes = [choice for choice in ordered if len(choice) == depth]
        branching = {choice[:-1] for choice in ordered if len(choice) == depth + 1}
        number = {parent: place for place, parent in enumerate(parents)}
        ranks = 1 + max(choice[-1] for choice in nodes)
        children = [number[choice[:-1]] * ranks + choice[-1] for choice in nodes]
        kept = [place for place, choice in enumerate(nodes) if choice in branching]
        above = [number[nodes[place][:-1]] for place in kept]
        levels.append(
            _Level(ranks, *(torch.tensor(one, dtype=torch.int64, device=device) for one in (children, kept, above)))
        )
        parents = [nodes[place] for place in kept]
    return levels


def _chances(choices: Sequence[Sequence[int]], accuracy: Sequence[Sequence[float]]) -> list[float] | None:
    """How probable each node is to be accepted, were the heads independent."""
    if not accuracy:
        return None
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for choice in choices:
        row = accuracy[len(choice) - 1]
        own = row[choice[-1]] if choice[-1] < len(row) else 0.0
        chances[tuple(choice)] = chances[tuple(choice[:-1])] * own
    return list(chances.values())[1:]
