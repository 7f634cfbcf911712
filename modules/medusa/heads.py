"""Medusa's heads: K small residual networks over one hidden state, each guessing a token further ahead.

Source: Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
arXiv:2401.10774.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.medusa.chunked import Reduce, chunked_sum
from modules.medusa.config import MedusaConfig
from modules.medusa.output_layer import OutputLayer


class ResidualBlock(nn.Module):
    """u + SiLU(A u + b), the identity while A and b are zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """States [..., D] -> states [..., D]."""
        return states + functional.silu(self.linear(states))


class Vocabulary(nn.Module):
    """From a head's state to its logits.  Owns what it multiplies with, and is only ever used through `forward`."""

    reads_backbone = True

    def forward(
        self, states_ND: Tensor, backbone: OutputLayer, reduce: Reduce | None = None, rows: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V'], or with `reduce` their sum over chunks of `rows` rows, see `chunked_sum`."""
        if reduce is None:
            return self.project(states_ND, backbone)
        learned = [*self.parameters(), *(backbone.learned() if self.reads_backbone else ())]
        return chunked_sum(lambda states: self.project(states, backbone), reduce, states_ND, learned, rows)

    def project(self, states: Tensor, backbone: OutputLayer) -> Tensor:
        """Logits of all states at once."""
        return backbone.logits(states)

    @torch.no_grad()
    def start_from(self, backbone: OutputLayer, token_ids: Tensor | None) -> None:
        """Become the backbone's own output layer; there is nothing to copy where it is shared."""


class OwnVocabulary(Vocabulary):
    """A matrix of the head's own, over all tokens or over those that are drafted."""

    reads_backbone = False

    def __init__(self, width: int, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, width))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def project(self, states: Tensor, backbone: OutputLayer) -> Tensor:
        """Logits of all states at once."""
        return backbone.finish(functional.linear(states, self.weight, self.bias))

    @torch.no_grad()
    def start_from(self, backbone: OutputLayer, token_ids: Tensor | None) -> None:
        """Copy the backbone's rows."""
        rows = slice(None) if token_ids is None else token_ids
        self.weight.copy_(backbone.weight[rows])
        if self.bias is not None:
            self.bias.copy_(cast(Tensor, backbone.bias)[rows])


class LowRankVocabulary(Vocabulary):
    """The backbone's matrix plus `up` times `down`; `up` starts at zero."""

    def __init__(self, width: int, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(size, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def project(self, states: Tensor, backbone: OutputLayer) -> Tensor:
        """Logits of all states at once."""
        correction = functional.linear(functional.linear(states, self.down), self.up)
        return backbone.finish(backbone.product(states) + correction)


class MedusaHead(nn.Module):
    """One head: L residual blocks, then logits.

    A head that reads a token x starts its blocks at h + P n(W[x]): W[x] is the token's row of the output matrix, n the
    scaling to a mean square of one, P a matrix [D, D] that starts at zero.
    """

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.path = None if config.reads == "state" else nn.Linear(width, width, bias=False)
        if self.path is not None:
            nn.init.zeros_(self.path.weight)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(config.num_blocks)))
        self.vocabulary: Vocabulary
        if config.vocabulary in ("own", "pruned"):
            self.vocabulary = OwnVocabulary(width, config.output_size, config.output_bias)
        elif config.vocabulary == "low_rank":
            self.vocabulary = LowRankVocabulary(width, config.vocab_size, cast(int, config.rank))
        else:
            self.vocabulary = Vocabulary()

    def block(self, number: int) -> ResidualBlock:
        """One of the residual blocks."""
        return cast(ResidualBlock, self.blocks[number])

    def forward(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the vocabulary multiplies with, [..., D], of states and of what is read of a token, each [..., D]."""
        dtype = self.block(0).linear.weight.dtype
        states = states.to(dtype)
        if self.path is not None and rows is not None:
            states = states + self.path(rows.to(dtype))
        return cast(Tensor, self.blocks(states))


class MedusaHeads(nn.Module):
    """K heads over the backbone's last hidden state.

    Shapes: N positions, D hidden size, V' tokens that a head tells apart (all V unless pruned), K heads.
    Departs from the published code: biases start at zero and matrices as copies of the backbone's, so that every head
    starts as exactly the backbone's own; blocks of one head are different tensors; the tied, pruned and low-rank
    vocabularies; heads that also read tokens.  Those that read the path (as in Hydra, Ankner et al. 2024,
    arXiv:2402.05109) are one and the same cell, applied once more for every token (as in ReDrafter, Cheng et al. 2024,
    arXiv:2403.09919).
    """

    token_ids: Tensor | None

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        width, count = config.hidden_size, len(config.layers)
        self.fuse = nn.Linear(count * width, width, bias=False) if count else None
        if self.fuse is not None:
            nn.init.zeros_(self.fuse.weight)
        self.heads = nn.ModuleList(MedusaHead(config) for _ in range(1 if config.one_cell else config.num_heads))
        ids = None if config.draft_vocab_size is None else torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        self.register_buffer("token_ids", ids)

    def start_from(self, backbone: OutputLayer, token_ids: Tensor | None = None) -> MedusaHeads:
        """Every head becomes the backbone's own.

        Args:
            token_ids: int64 [V'], the tokens that pruned heads tell apart, each once.
        Raises:
            ValueError: another hidden size, vocabulary or bias than the backbone's, or token_ids missing or unfit.
        """
        check_shape(self.config, backbone)
        if (token_ids is None) != (self.token_ids is None):
            raise ValueError(f"token_ids and vocabulary {self.config.vocabulary} do not go together")
        if token_ids is not None and self.token_ids is not None:
            if (different := len(set(token_ids.tolist()))) != len(self.token_ids):
                raise ValueError(
                    f"token_ids names {different} different tokens, but draft_vocab_size is {len(self.token_ids)}"
                )
            self.token_ids.copy_(token_ids)
        for head in self.heads:
            cast(MedusaHead, head).vocabulary.start_from(backbone, token_ids)
        return self

    def head(self, number: int) -> MedusaHead:
        """The module that makes the guesses of a head, from 0."""
        return cast(MedusaHead, self.heads[0 if self.config.one_cell else number])

    def enter(self, features: Tensor) -> Tensor:
        """What the heads begin at, [..., D]: the last hidden state, and what is made of other layers' outputs.

        Source: Li et al. 2025, "EAGLE-3", arXiv:2503.01840, whose draft model reads three layers, fused by a matrix.
        Departs from it: the last hidden state goes in as it is, and the matrix starts at zero.

        Args:
            features: [..., (1 + n) D], see `modules.hidden_states.side_by_side`.
        """
        if self.fuse is None:
            return features
        width, dtype = self.config.hidden_size, self.fuse.weight.dtype
        hidden: Tensor = features[..., :width].to(dtype)
        return hidden + cast(Tensor, self.fuse(features[..., width:].to(dtype)))

    def states(
        self, hidden: Tensor, backbone: OutputLayer, head: int, path: Tensor | None = None, above: Tensor | None = None
    ) -> Tensor:
        """What a head's vocabulary multiplies with, [..., D].

        Args:
            hidden: what `enter` gave, [..., D]; without other layers the last hidden states, after the final norm; any
                float dtype.
            head: from 0; what it guesses after position t is token t + 2 + head.
            path: int64 [..., r or more], the tokens after each state, for heads that read them (`MedusaConfig.reads`).
            above: this function's result for the head before, which heads that read the path go on from.
        Raises:
            ValueError: there are no paths, or shorter ones than the head reads.
        """
        one, count = self.head(head), self.config.tokens_read(head)
        if not count:
            return cast(Tensor, one(hidden))
        if path is None or path.shape[-1] < count:
            given = 0 if path is None else path.shape[-1]
            raise ValueError(
                f"this head reads {count} tokens after the state, and {given} are given: pass them as path"
            )
        goes_on = above is not None and self.config.one_cell
        states = cast(Tensor, above) if goes_on else hidden
        for place in range(count - 1 if goes_on else 0, count):
            states = one(states, backbone.rows(path[..., place]))
        return states

    def forward(
        self,
        hidden: Tensor,
        backbone: OutputLayer,
        head: int,
        reduce: Reduce | None = None,
        rows: int = 0,
        path: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of one head, [..., V']; arguments as of `states`.

        Args:
            hidden: features, see `enter`.
            reduce, rows: the sum of `reduce` over chunks of `rows` rows is returned instead, see `chunked_sum`;
                `hidden` is [N, D] then.
        """
        return self.guesses(self.states(self.enter(hidden), backbone, head, path), backbone, head, reduce, rows)

    def guesses(
        self, states: Tensor, backbone: OutputLayer, head: int, reduce: Reduce | None = None, rows: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same for what `states` gave."""
        return cast("Tensor | tuple[Tensor, Tensor]", self.head(head).vocabulary(states, backbone, reduce, rows))


def check_shape(config: MedusaConfig, backbone: OutputLayer) -> None:
    """Raise ValueError unless heads of this config fit the backbone's output layer."""
    size, width = backbone.weight.shape
    if width != config.hidden_size or size != config.vocab_size:
        raise ValueError(
            f"these heads read hidden size {config.hidden_size} and know {config.vocab_size} tokens, but the backbone "
            f"gives {width} and {size}: load the adapter made for this backbone"
        )
    if config.output_bias and backbone.bias is None:
        raise ValueError("these heads have an output bias and the backbone's output matrix has none")
