"""How much is kept, and the order in which a prompt goes into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Positions = Literal["original", "compact"]


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What the host does with a selector's scores.

    Attributes:
        budget: units kept per KV head of every layer, or of each layer; None keeps all.
        chunk: tokens of the prompt that enter at a time; None takes them all at once.  No layer ever holds more than
            budget + chunk units while the prompt is read.
        stabilizers: last tokens of every chunk but the last that stay whatever their scores.
        local: last tokens of the prompt, which enter after the last eviction: where the question is.
        positions: `original` leaves keys rotated by their places in the text; `compact` gives what is kept the places
            0, 1, 2, .. after every eviction, so that none exceeds budget + chunk + local.
        ordered: keep units in the order of the text, which copies all of them at every eviction; otherwise newcomers
            are written over those that leave, wherever the order plays no part.
        decode_every: generated tokens after which the cache is cut back to budget + local again; None lets it grow.
        query_first: the local tokens are also read before everything else, at places before 0, so that every eviction
            has seen the question.
    """

    budget: int | tuple[int, ...] | None = None
    chunk: int | None = None
    stabilizers: int = 0
    local: int = 0
    positions: Positions = "original"
    ordered: bool = False
    decode_every: int | None = None
    query_first: bool = False

    def __post_init__(self) -> None:
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        smallest = min((budget for budget in budgets if budget is not None), default=None)
        if smallest is not None and not 0 <= self.stabilizers < smallest:
            raise ValueError(
                f"budget is {self.budget} and stabilizers is {self.stabilizers}: give a budget of 1 or more, and fewer "
                "stabilizers than that"
            )
        if (self.chunk is not None and self.chunk < 1) or self.local < 0 or (self.decode_every or 1) < 1:
            raise ValueError(
                f"chunk is {self.chunk}, local is {self.local} and decode_every is {self.decode_every}: chunk and "
                "decode_every must be 1 or more, local 0 or more"
            )
        if self.positions not in ("original", "compact"):
            raise ValueError(f"positions is '{self.positions}': it must be original or compact")
        if self.query_first and not self.local:
            raise ValueError("query_first reads the local tokens first, and local is 0: say how many the question has")

    def budget_of(self, layer: int) -> int | None:
        """Units that a layer keeps per head."""
        return self.budget[layer] if isinstance(self.budget, tuple) else self.budget


@dataclass(frozen=True)
class PrefillStep:
    """One call of the backbone.

    Attributes:
        columns: int64 [B, T], which tokens of the prompt; any where `valid` is false.
        positions: int64 [B, T], their places in each text.
        valid: bool [B, T], None where all are text.
        evict: whether the cache is cut back after it.
        protected: bool [B, T], tokens that stay whatever their scores; None for none.
    """

    columns: Tensor
    positions: Tensor
    valid: Tensor | None = None
    evict: bool = False
    protected: Tensor | None = None


def prefill_steps(mask: Tensor, seen: int, policy: CachePolicy) -> Iterator[PrefillStep]:
    """The calls for the tokens from column `seen` on.

    Every sequence is cut into chunks from its own first token, so that it is read as if it were alone; shorter ones are
    filled up.

    Args:
        mask: bool [B, columns], which columns are text.
    """
    fresh = mask[:, seen:]
    place = mask.cumsum(1)[:, seen:] - 1
    width = fresh.shape[1]
    local = min(policy.local, width)
    head = fresh[:, : width - local]
    counts = head.sum(1)
    # Text first, in its order; what is left of a row is filling.
    columns = (~head).to(torch.uint8).sort(dim=1, stable=True).indices
    positions = place.gather(1, columns)
    tail = torch.arange(width - local, width, device=mask.device).expand(len(mask), -1)
    if policy.query_first and seen == 0:
        if not bool(fresh.gather(1, tail).all() & (counts > 0).all()):
            raise ValueError(f"query_first reads the last {local} tokens first, and a sequence has no more than those")
        columns = torch.cat([tail, columns], dim=1)
        positions = torch.cat([tail - width, positions], dim=1)
        counts = counts + local
    longest = int(counts.max()) if len(counts) else 0
    size = policy.chunk or max(longest, 1)
    for start in range(0, longest, size):
        end = min(start + size, longest)
        number = torch.arange(start, end, device=mask.device)
        valid = number < counts[:, None]
        # A sequence's last chunk, in which nothing is protected, is the one that holds its last token.
        last = counts[:, None] <= start + size
        protected = None
        if policy.stabilizers:
            protected = (number >= end - policy.stabilizers) & ~last & valid
        yield PrefillStep(
            columns[:, start:end] + seen,
            positions[:, start:end].where(valid, 0),
            None if bool(valid.all()) else valid,
            True,
            protected,
        )
    if local:
        valid = fresh.gather(1, tail)
        yield PrefillStep(tail + seen, place.gather(1, tail).where(valid, 0), None if bool(valid.all()) else valid)
