"""Medusa's heads as a decode step runs them: side by side where they can be, and without a word to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from modules.medusa.heads import LowRankVocabulary, MedusaHeads, OwnVocabulary
from modules.medusa.output_layer import OutputLayer

_ALL = slice(None)
_FEW = 6  # rows below which a product is faster with the matrix on its left (CPU)


class StackedHeads:
    """The heads for the few states of a decode step: one kernel where training has one per head.

    Shapes: B sequences (or nodes), k heads asked at once, D hidden size, V' tokens that a head tells apart, R ranks.

    Attributes:
        layers: decoder layers whose outputs they read beside the last hidden state.
        by_path: a guess is made below the guesses before it, so heads run one after the other (`advance`).
    """

    def __init__(self, heads: MedusaHeads, backbone: OutputLayer) -> None:
        parts = [heads.head(number) for number in range(len(heads.heads))]
        self.backbone, self.token_ids = backbone, heads.token_ids
        self.count, self.size, self.by_path = heads.config.num_heads, heads.config.output_size, heads.config.one_cell
        # [K, D, D] and [K, 1, D] of every block, ready for baddbmm; K is 1 where all heads are one cell.
        self._blocks = [
            (
                _stack([head.block(block).linear.weight for head in parts]).transpose(1, 2),
                _stack([head.block(block).linear.bias for head in parts])[:, None],
            )
            for block in range(heads.config.num_blocks)
        ]
        paths = [head.path.weight for head in parts if head.path is not None]
        self._path = _stack(paths).transpose(1, 2) if paths else None
        self._norm = backbone.row_scales() if paths else None
        self.layers, self._width = tuple(heads.config.layers), heads.config.hidden_size
        self._fuse = None if heads.fuse is None else heads.fuse.weight.detach()
        own = [head.vocabulary for head in parts]
        self._own = self._own_bias = self._down = self._up = None
        if isinstance(own[0], OwnVocabulary):
            self._own = _stack([v.weight for v in own if isinstance(v, OwnVocabulary)])
            biases = [v.bias for v in own if isinstance(v, OwnVocabulary) and v.bias is not None]
            self._own_bias = _stack(biases)[:, None] if biases else None
        elif isinstance(own[0], LowRankVocabulary):
            self._down = _stack([v.down for v in own if isinstance(v, LowRankVocabulary)])
            self._up = _stack([v.up for v in own if isinstance(v, LowRankVocabulary)])

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return self._blocks[0][0].device

    def enter(self, features_BF: Tensor) -> Tensor:
        """What the heads begin at, [B, D]: see `MedusaHeads.enter`."""
        features = features_BF.to(self._blocks[0][0].dtype)
        if self._fuse is None:
            return features
        hidden, others = features[:, : self._width], features[:, self._width :]
        return torch.addmm(hidden, others, self._fuse.t())

    def advance(self, states_kBD: Tensor, tokens_B: Tensor | None = None, heads: slice = _ALL) -> Tensor:
        """What the vocabularies of some heads multiply with, [k, B, D].

        Args:
            states_kBD: what `enter` gave; for heads that read the path, what this gave for the tokens before.
            tokens_B: the token after each of them, for heads that read any.
        """
        states = states_kBD
        if self._path is not None and self._norm is not None and tokens_B is not None:
            rows = functional.embedding(tokens_B, self.backbone.weight.detach()) * self._norm[tokens_B]
            matrix = self._of(self._path, heads)
            states = torch.baddbmm(states, rows.to(states.dtype).expand(len(matrix), -1, -1), matrix)
        for weight, bias in self._blocks:
            inner = torch.baddbmm(self._of(bias, heads), states, self._of(weight, heads))
            states = functional.silu(inner, inplace=True).add_(states)
        return states

    def states(self, hidden_BD: Tensor, heads: slice = _ALL, path_BR: Tensor | None = None) -> Tensor:
        """The same from hidden states and all tokens after them, [k, B, D]; arguments as of `logits`."""
        hidden = self.enter(hidden_BD)
        numbers = range(self.count)[heads]
        if not self.by_path:
            root = None if path_BR is None or self._path is None else path_BR[:, 0]
            return self.advance(hidden.expand(len(numbers), *hidden.shape), root, heads)
        walked, states = [], hidden[None]
        for place in range(numbers.stop):
            states = self.advance(states, None if path_BR is None else path_BR[:, place])
            walked.append(states)
        return torch.cat(walked[numbers.start :])

    def logits(self, hidden_BD: Tensor, heads: slice = _ALL, path_BR: Tensor | None = None) -> Tensor:
        """Logits [k, B, V'] of some heads.

        Args:
            hidden_BD: states, with other layers' outputs beside them where the heads read these.
            path_BR: the tokens after them, as many as the last of these heads reads.
        """
        return self.product(self.states(hidden_BD, heads, path_BR), heads)

    def product(self, states_kBD: Tensor, heads: slice = _ALL) -> Tensor:
        """Logits [k, B, V'] of what `advance` gave."""
        if self.by_path and len(states_kBD) > 1:  # one matrix for all
            flat = self.product(states_kBD.flatten(0, 1)[None])
            return flat.view(*states_kBD.shape[:2], -1)
        if self._own is not None:
            product = _rows_times(states_kBD, self._of(self._own, heads))
            bias = self._own_bias
            return self.backbone.finish(product if bias is None else product + self._of(bias, heads))
        product = self.backbone.product(states_kBD)  # one read of the matrix for all heads
        if self._down is not None and self._up is not None:
            down, up = self._of(self._down, heads), self._of(self._up, heads)
            product = product + _rows_times(_rows_times(states_kBD, down), up)
        return self.backbone.finish(product)

    def _of(self, stacked: Tensor, heads: slice) -> Tensor:
        """Some heads' part: the one there is, where all heads are one cell."""
        return stacked if self.by_path or heads == _ALL else stacked[heads]

    def guesses(self, states_kBD: Tensor, ranks: int, heads: slice = _ALL) -> Tensor:
        """The best tokens [k, B, R], best first, of what `advance` gave: no pass is spent on probabilities."""
        return self._named(self.product(states_kBD, heads).topk(ranks, dim=-1).indices)

    def sure_guesses(self, states_kBD: Tensor, ranks: int, heads: slice = _ALL) -> tuple[Tensor, Tensor]:
        """(log-probabilities, tokens) of these, each [k, B, R]."""
        logits = self.product(states_kBD, heads).float()
        best, guesses = logits.topk(ranks, dim=-1)
        return best - logits.logsumexp(-1, keepdim=True), self._named(guesses)

    def _named(self, guesses: Tensor) -> Tensor:
        return guesses if self.token_ids is None else self.token_ids[guesses]

    def top(
        self, hidden_BD: Tensor, ranks: int, heads: slice = _ALL, path_BR: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities, tokens) of the best guesses, each [k, B, R], best first; arguments as of `logits`."""
        return self.sure_guesses(self.states(hidden_BD, heads, path_BR), ranks, heads)

    def tokens(self, hidden_BD: Tensor, ranks: int, heads: slice = _ALL, path_BR: Tensor | None = None) -> Tensor:
        """The tokens of `top` alone."""
        return self.guesses(self.states(hidden_BD, heads, path_BR), ranks, heads)

    def memory_bytes(self) -> int:
        """Bytes of the heads' own tensors, and of what is kept to run them."""
        blocks = [tensor for pair in self._blocks for tensor in pair]
        read = [self._fuse, self._path, self._norm]
        held = [*blocks, *read, self._own, self._own_bias, self._down, self._up, self.token_ids]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _rows_times(states_KBD: Tensor, matrix_KVD: Tensor) -> Tensor:
    """[K, B, V].  With the matrix on the left for a few rows: that takes a third of the time for one, on a CPU."""
    if states_KBD.shape[1] < _FEW:
        return torch.bmm(matrix_KVD, states_KBD.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(states_KBD, matrix_KVD.transpose(1, 2))


def _stack(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.detach() for weight in weights])
