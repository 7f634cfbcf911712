"""What of a tree is kept: exact rules, and typical acceptance.

Exact rules decide for every node what the backbone says after it: its best token, or a draw.  The kept path is the one
that spells these tokens, so the text is that of plain decoding, token by token or in law.

Shapes: B sequences, M nodes of a tree with its root, V vocabulary, G trees (1 or B).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.decode_host.tree import TreeTables


class Rule(ABC):
    """Turns scores, after all logits processors, into what is kept."""

    def begin(self, batch: int) -> None:  # noqa: B027 - only drawing keeps anything
        """Starts a generation of so many sequences."""

    @abstractmethod
    def keep(self, scores: Tensor, tokens: Tensor, tables: TreeTables) -> tuple[Tensor, Tensor]:
        """The last kept node [B], and the token that follows it [B].

        Args:
            scores: [B, M, V], of the token after each node.
            tokens: [B, M]; the root's is not looked at, and -1 is never kept.
        """

    @abstractmethod
    def keep_one(self, scores: Tensor, row: int, depth: int, tokens: Sequence[int]) -> tuple[dict[int, float], int]:
        """The same at a single node: log-probability by position of those children that are kept, and what follows
        if none is.

        Args:
            scores: [1, V].
            tokens: those of the children.
        """

    def advance(self, taken: Sequence[int]) -> None:  # noqa: B027 - only drawing keeps anything
        """So many tokens were taken by each sequence that still grows."""


class Exact(Rule):
    """The path that the backbone's own best tokens spell."""

    def choose(self, scores: Tensor, rows: Tensor, depth: Tensor, levels: int) -> Tensor:
        """The backbone's token after each node [B, M].

        Args:
            rows: [B, 1], which sequences these are.
            depth: [G, M], all below `levels`.
        """
        return _argmax(scores)

    def keep(self, scores: Tensor, tokens: Tensor, tables: TreeTables) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        chosen = self.choose(scores, rows, tables.depth, tables.path.shape[2])
        if chosen.shape[1] == 1:
            return torch.zeros_like(chosen[:, 0]), chosen[:, 0]
        if chosen.device.type == "cpu":
            return _walked(chosen, tokens, tables)
        spelled = tokens == chosen.gather(1, tables.parent.expand_as(tokens))
        last = (reached(spelled, tables) * (tables.depth + 1)).argmax(dim=1, keepdim=True)
        return last[:, 0], chosen.gather(1, last)[:, 0]

    def keep_one(self, scores: Tensor, row: int, depth: int, tokens: Sequence[int]) -> tuple[dict[int, float], int]:
        """See `Rule`."""
        at = torch.tensor([[row], [depth]], device=scores.device)
        chosen = int(self.choose(scores[:, None], at[:1], at[1:], depth + 1))
        return {tokens.index(chosen): 0.0} if chosen in tokens else {}, chosen


class Sampled(Exact):
    """Draws the backbone's token after each node.

    All nodes of a depth share the random numbers of their position, which only one of them can use: one exponential
    per token of the vocabulary, from the default generator, as `torch.multinomial` takes them.  So the text is that of
    plain sampling with the same seed, as long as all sequences take equally many tokens; a single one always does.
    """

    def begin(self, batch: int) -> None:
        """See `Rule`."""
        self._batch = batch
        self._noise: list[Tensor] = []  # [B, V] for each position from the root's on

    def choose(self, scores: Tensor, rows: Tensor, depth: Tensor, levels: int) -> Tensor:
        """See `Exact`."""
        chance = scores.float().softmax(dim=-1)
        while len(self._noise) < levels:
            self._noise.append(chance.new_empty(self._batch, chance.shape[-1]).exponential_())
        noise = torch.stack(self._noise, dim=1)[rows, depth]
        return (chance / noise).argmax(dim=-1)

    def advance(self, taken: Sequence[int]) -> None:
        """See `Rule`."""
        even = len(set(taken)) == 1
        self._noise = self._noise[taken[0] :] if even else []


@dataclass(frozen=True, kw_only=True)
class Typical(Rule):
    """Typical acceptance: keeps a guess that the backbone finds probable enough.  The text is not the backbone's law.

    A child x of node i is kept iff p_i(x) > min(epsilon, delta * exp(-H(p_i))), H the entropy in nats; of all kept
    paths the longest wins, then the most probable.  What follows is the best token, so the output is deterministic: a
    temperature only decides how bold it is.

    Source: Cai et al. 2024, arXiv:2401.10774, section 3.3.1.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def keep(self, scores: Tensor, tokens: Tensor, tables: TreeTables) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        chance = scores.float().softmax(dim=-1)
        parent = tables.parent.expand_as(tokens)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        of_child = chance[rows, parent, tokens.clamp(0, chance.shape[-1] - 1)]
        kept = (of_child > self.threshold(chance).gather(1, parent)) & (tokens >= 0)
        logs = torch.where(kept, of_child, 1.0).log().double()
        logs[:, 0] = 0.0
        of_path = (tables.ancestors * logs[:, None]).sum(dim=-1)
        # The least log-probability of a float32 is about -104, so a deeper path always weighs more.
        weight = torch.where(reached(kept, tables), 1e4 * (tables.depth + 1) + of_path, -1.0)
        last = weight.argmax(dim=1)
        return last, chance[rows[:, 0], last].argmax(dim=-1)

    def keep_one(self, scores: Tensor, row: int, depth: int, tokens: Sequence[int]) -> tuple[dict[int, float], int]:
        """See `Rule`."""
        chance = scores.float().softmax(dim=-1)
        threshold = float(self.threshold(chance))
        likely = {index: float(chance[0, token]) for index, token in enumerate(tokens) if token >= 0}
        kept = {index: math.log(value) for index, value in likely.items() if value > threshold}
        return kept, int(chance.argmax())

    def threshold(self, chance: Tensor) -> Tensor:
        """What a probability must exceed [...], for distributions [..., V]."""
        entropy = torch.special.entr(chance).sum(dim=-1)
        # Equality rejects, so rounding must not make it an excess.
        return (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon) * (1 + 1e-6)


def _argmax(scores: Tensor) -> Tensor:
    """The first best token.  A tree asks for it in every row, and numpy's is vectorised on a CPU, torch's is not."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _walked(chosen: Tensor, tokens: Tensor, tables: TreeTables) -> tuple[Tensor, Tensor]:
    """The last node whose path spells the chosen tokens, and what follows it: on a CPU a loop beats ten kernels."""
    ends = []
    parent = tables.parent.tolist()
    for row, (best, guesses) in enumerate(zip(chosen.tolist(), tokens.tolist(), strict=True)):
        parents = parent[row % len(parent)]
        spelled, last = [True], 0
        for node in range(1, len(guesses)):
            spelled.append(spelled[parents[node]] and guesses[node] == best[parents[node]])
            if spelled[node]:  # nodes are sorted by depth, so the last is the deepest
                last = node
        ends.append((last, best[last]))
    last_B, root_B = torch.tensor(ends, dtype=torch.int64).unbind(1)
    return last_B, root_B


def reached(kept: Tensor, tables: TreeTables) -> Tensor:
    """Which nodes [B, M] are kept with all their ancestors; the root always is."""
    kept[:, 0] = True
    return (kept[:, None] | ~tables.ancestors).all(dim=-1)
