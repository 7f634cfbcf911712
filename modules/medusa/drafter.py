"""Medusa as a drafter: a fixed tree over the heads' best guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, Tree, order_choices
from modules.decode_host.merge import Branches, pack
from modules.decode_host.search import draft_by_chance
from modules.decode_host.tree import Choice
from modules.medusa.config import MedusaConfig
from modules.medusa.heads import LowRankVocabulary, MedusaHead, MedusaHeads, OwnVocabulary, path_rows
from modules.medusa.output_layer import OutputLayer

_WIDTH = 4  # nodes of a depth that a tree of the step's own goes on from


class StackedHeads:
    """All heads side by side, for the few states of a decode step: one kernel where training has one per head.

    Shapes: B sequences, K heads, D hidden size, V' tokens that a head tells apart, R ranks.
    """

    def __init__(self, heads: MedusaHeads, backbone: OutputLayer) -> None:
        parts = [cast(MedusaHead, head) for head in heads.heads]
        self.backbone, self.token_ids = backbone, heads.token_ids
        self.count, self.size = len(parts), heads.config.output_size
        # [K, D, D] and [K, 1, D] of every block, ready for baddbmm.
        self._blocks = [
            (
                torch.stack([head.block(block).linear.weight.detach() for head in parts]).transpose(1, 2),
                torch.stack([head.block(block).linear.bias.detach() for head in parts])[:, None],
            )
            for block in range(heads.config.num_blocks)
        ]
        self.by_path = heads.config.reads == "path"  # a guess is known only when those before it are
        self._paths = [head.path.weight.detach() for head in parts if head.path is not None]
        own = [head.vocabulary for head in parts]
        self._own = self._own_bias = self._down = self._up = None
        if isinstance(own[0], OwnVocabulary):
            self._own = _stack([cast(OwnVocabulary, v).weight for v in own])
            if own[0].bias is not None:
                self._own_bias = torch.stack([cast(Tensor, cast(OwnVocabulary, v).bias).detach() for v in own])[:, None]
        elif isinstance(own[0], LowRankVocabulary):
            self._down = _stack([cast(LowRankVocabulary, v).down for v in own])
            self._up = _stack([cast(LowRankVocabulary, v).up for v in own])

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return self._blocks[0][0].device

    def logits(self, hidden_BD: Tensor, heads: slice = slice(None), path_BR: Tensor | None = None) -> Tensor:
        """Logits [K, B, V'] of some heads.

        Args:
            hidden_BD: states.
            path_BR: the tokens after them, as many as the last of these heads reads.
        """
        states = self._read(hidden_BD.to(self._blocks[0][0].dtype), heads, path_BR)
        for weight, bias in self._blocks:
            states = states + functional.silu(torch.baddbmm(bias[heads], states, weight[heads]))
        if self._own is not None:
            product = _rows_times(states, self._own[heads])
            return self.backbone.finish(product if self._own_bias is None else product + self._own_bias[heads])
        product = self.backbone.product(states)  # one read of the matrix for all heads
        if self._down is not None and self._up is not None:
            product = product + _rows_times(_rows_times(states, self._down[heads]), self._up[heads])
        return self.backbone.finish(product)

    def _read(self, hidden_BD: Tensor, heads: slice, path_BR: Tensor | None) -> Tensor:
        """What the heads' blocks start at, [K, B, D]."""
        if not self._paths:
            return hidden_BD.expand(len(range(self.count)[heads]), *hidden_BD.shape)
        matrices = self._paths[heads]
        most = max(matrix.shape[1] for matrix in matrices) // hidden_BD.shape[1]
        rows = path_rows(self.backbone, path_BR, most).to(hidden_BD.dtype)
        return torch.stack([torch.addmm(hidden_BD, rows[:, : matrix.shape[1]], matrix.t()) for matrix in matrices])

    def top(
        self, hidden_BD: Tensor, ranks: int, heads: slice = slice(None), path_BR: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities, tokens) of the best guesses, each [K, B, R], best first; arguments as of `logits`."""
        logits = self.logits(hidden_BD, heads, path_BR).float()
        best, guesses = logits.topk(ranks, dim=-1)
        tokens = guesses if self.token_ids is None else self.token_ids[guesses]
        return best - logits.logsumexp(-1, keepdim=True), tokens

    def tokens(
        self, hidden_BD: Tensor, ranks: int, heads: slice = slice(None), path_BR: Tensor | None = None
    ) -> Tensor:
        """The tokens of `top` alone: no pass over the logits is spent on probabilities."""
        guesses = self.logits(hidden_BD, heads, path_BR).topk(ranks, dim=-1).indices
        return guesses if self.token_ids is None else self.token_ids[guesses]

    def memory_bytes(self) -> int:
        """Bytes of the heads' own tensors."""
        blocks = [tensor for pair in self._blocks for tensor in pair]
        held = [*blocks, *self._paths, self._own, self._own_bias, self._down, self._up, self.token_ids]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _rows_times(states_KBD: Tensor, matrix_KVD: Tensor) -> Tensor:
    """[K, B, V].  With the matrix on the left: for a single row that takes a third of the time on a CPU."""
    return torch.bmm(matrix_KVD, states_KBD.transpose(1, 2)).transpose(1, 2)


def _stack(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.detach() for weight in weights])


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
        self.heads, self._accuracy = heads, accuracy
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
        """The tree's tokens [B, N], a head after the other: each guesses below all nodes that have children."""
        B, found = len(hidden_BD), []
        path_BMR = root_B[:, None, None]
        for head, level in enumerate(self._levels):
            M = path_BMR.shape[1]
            states = hidden_BD[:, None].expand(B, M, -1).reshape(B * M, -1)
            guesses = self.heads.tokens(states, level.ranks, slice(head, head + 1), path_BMR.flatten(0, 1))
            tokens_BC = guesses.view(B, -1).index_select(1, level.children)
            found.append(tokens_BC)
            above = path_BMR.index_select(1, level.above)
            path_BMR = torch.cat([above, tokens_BC.index_select(1, level.parents)[:, :, None]], dim=2)
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
        self.heads, self.nodes, self.ranks = heads, nodes, ranks

    def propose(self, state: DraftState) -> Draft:
        """The best nodes of this step."""
        hidden = cast(Tensor, state.hidden)
        if self.heads.by_path:
            return pack(self._by_path(hidden, state), self.nodes)
        chances_KBR, tokens_KBR = self.heads.top(hidden, self.ranks, path_BR=state.root[:, None])
        return draft_by_chance(tokens_KBR.transpose(0, 1), chances_KBR.exp().transpose(0, 1), self.nodes)

    def _by_path(self, hidden_BD: Tensor, state: DraftState) -> list[Branches]:
        """Guesses of every head below the most probable guesses of the head before it."""
        rows = [Branches() for _ in range(len(hidden_BD))]
        wide: list[list[tuple[int, ...]]] = [[()] for _ in rows]
        for head in range(self.heads.count):
            paths = [(int(root), *path) for root, each in zip(state.root.tolist(), wide, strict=True) for path in each]
            states = hidden_BD.repeat_interleave(len(wide[0]), dim=0)
            asked = torch.tensor(paths, device=hidden_BD.device)
            chances, tokens = self.heads.top(states, self.ranks, slice(head, head + 1), asked)
            sure = chances[0].exp().view(len(rows), len(wide[0]), -1).tolist()
            guesses = tokens[0].view(len(rows), len(wide[0]), -1).tolist()
            for row, branches in enumerate(rows):
                for path, values, ids in zip(wide[row], sure[row], guesses[row], strict=True):
                    for value, token in zip(values, ids, strict=True):
                        branches.add((*path, token), value * branches.chances.get(path, 1.0))
                deep = [path for path in branches.chances if len(path) == head + 1]
                wide[row] = sorted(deep, key=lambda path: -branches.chances[path])[: min(_WIDTH, self.ranks)]
        return rows

    def memory_bytes(self) -> int:
        """Bytes of the heads."""
        return self.heads.memory_bytes()


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
