"""Medusa as a drafter: a fixed tree over the heads' best guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, Tree, order_choices
from modules.decode_host.search import draft_by_chance
from modules.medusa.config import MedusaConfig
from modules.medusa.heads import LowRankVocabulary, MedusaHead, MedusaHeads, OwnVocabulary, root_of
from modules.medusa.output_layer import OutputLayer


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
        self._root = None  # [K, D, D]
        if heads.config.reads_root:
            self._root = torch.stack([cast(nn.Linear, head.root).weight.detach() for head in parts]).transpose(1, 2)
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

    def logits(self, hidden_BD: Tensor, count: int | None = None, root_B: Tensor | None = None) -> Tensor:
        """Logits [K, B, V'] of the first `count` heads, for states [B, D] and the tokens chosen from them [B]."""
        K, dtype = self.count if count is None else count, self._blocks[0][0].dtype
        states = hidden_BD.to(dtype).expand(K, *hidden_BD.shape)
        if self._root is not None:
            rows = self.backbone.rows(root_of(root_B)).to(dtype).expand(K, *hidden_BD.shape)
            states = torch.baddbmm(states, rows, self._root[:K])
        for weight, bias in self._blocks:
            states = states + functional.silu(torch.baddbmm(bias[:K], states, weight[:K]))
        if self._own is not None:
            product = _rows_times(states, self._own[:K])
            return self.backbone.finish(product if self._own_bias is None else product + self._own_bias[:K])
        product = self.backbone.product(states)  # one read of the matrix for all heads
        if self._down is not None and self._up is not None:
            product = product + _rows_times(_rows_times(states, self._down[:K]), self._up[:K])
        return self.backbone.finish(product)

    def top(
        self, hidden_BD: Tensor, ranks: int, count: int | None = None, root_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities, tokens) of the best guesses, each [K, B, R], best first."""
        logits = self.logits(hidden_BD, count, root_B).float()
        best, guesses = logits.topk(ranks, dim=-1)
        tokens = guesses if self.token_ids is None else self.token_ids[guesses]
        return best - logits.logsumexp(-1, keepdim=True), tokens

    def tokens(
        self, hidden_BD: Tensor, ranks: int, count: int | None = None, root_B: Tensor | None = None
    ) -> Tensor:
        """The tokens of `top` alone: no pass over the logits is spent on probabilities."""
        guesses = self.logits(hidden_BD, count, root_B).topk(ranks, dim=-1).indices
        return guesses if self.token_ids is None else self.token_ids[guesses]

    def memory_bytes(self) -> int:
        """Bytes of the heads' own tensors."""
        blocks = [tensor for pair in self._blocks for tensor in pair]
        held = [*blocks, self._root, self._own, self._own_bias, self._down, self._up, self.token_ids]
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
        self.choices, self.tree, self._ranks = ordered, tree, ranks
        self._chance = _chances(ordered, self._accuracy)

    def propose(self, state: DraftState) -> Draft:
        """The tree's tokens, without waiting for the device."""
        if not self.choices:
            return Draft(self.tree, state.root.new_empty(len(state.root), 0))
        hidden = cast(Tensor, state.hidden)
        tokens_KBR = self.heads.tokens(hidden, self._ranks, self.tree.depth, state.root)
        tokens_BN = tokens_KBR.transpose(0, 1).reshape(len(hidden), -1).index_select(1, self._place_N)
        return Draft(self.tree, tokens_BN, None if self._chance is None else [self._chance] * len(hidden))

    def memory_bytes(self) -> int:
        """Bytes of the heads."""
        return self.heads.memory_bytes()


class DynamicMedusaDrafter(Drafter):
    """Another tree at every step: the nodes that this step's own probabilities make the best.

    Reads the probabilities back from the device at every step, which the fixed tree does not.
    """

    def __init__(self, heads: StackedHeads, nodes: int, ranks: int) -> None:
        """`nodes`: below the root.  `ranks`: guesses of each head that may be drafted."""
        self.heads, self.nodes, self.ranks = heads, nodes, ranks

    def propose(self, state: DraftState) -> Draft:
        """The best nodes of this step."""
        chances_KBR, tokens_KBR = self.heads.top(cast(Tensor, state.hidden), self.ranks, root_B=state.root)
        return draft_by_chance(tokens_KBR.transpose(0, 1), chances_KBR.exp().transpose(0, 1), self.nodes)

    def memory_bytes(self) -> int:
        """Bytes of the heads."""
        return self.heads.memory_bytes()


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
